"""Wait queues and completions: who is woken, in which order, and that nobody sleeps for ever."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from interleavings import interleavings
from machines import boot, call, results, run_to_the_end, spawn, struct_of

from elf.errors import KlpemuError
from emu.machine import Machine
from emu.memory import read_u64
from emu.schedules import RoundRobin, Seeded
from emu.task import Task
from emu.thread_info import (
    TASK_INTERRUPTIBLE,
    TASK_NORMAL,
    TASK_RUNNING,
    TASK_UNINTERRUPTIBLE,
    TIF_SIGPENDING,
    set_tsk_thread_flag,
)
from emu.view import list_for_each_entry

UINT_MAX = 0xFFFF_FFFF
ERESTARTSYS = (1 << 64) - 512
EXCLUSIVE = 1


@pytest.fixture
def machine() -> Machine:
    """Two vCPUs that take turns."""
    machine = boot(cpus=2)
    machine.hub.schedule = RoundRobin()
    return machine


def completion(machine: Machine) -> Any:
    """The fixture kernel's completion, without doors."""
    return machine.layouts.view("completion", machine.space, machine.symbol("delivery"))


def waiting_for_delivery(machine: Machine) -> list[int]:
    found = list_for_each_entry(completion(machine).wait.task_list, "swait_queue", "task_list")
    return [each.task for each in found]


def sleepers(machine: Machine, function: str, *arguments: int, count: int = 1) -> list[Task]:
    """Tasks asleep in a call, in the order in which they fell asleep."""
    tasks = []
    for number in range(count):
        tasks.append(spawn(machine, f"t{number}", call(machine, function, *arguments), kthread=True))
        machine.run(lambda: False, 3)
    return tasks


# Completions.


def test_a_completion_lets_one_waiter_go_on_in_the_order_they_came(machine: Machine) -> None:
    tasks = sleepers(machine, "await_delivery", count=3)
    assert waiting_for_delivery(machine) == [task.struct for task in tasks]
    for done in range(1, 4):
        machine.call(machine.symbol("deliver"))
        machine.run(lambda: False, 3)
        assert [bool(results(task)) for task in tasks] == [True] * done + [False] * (3 - done)
    assert completion(machine).done == 0


def test_a_completion_that_comes_first_is_not_forgotten(machine: Machine) -> None:
    machine.call(machine.symbol("deliver"))
    machine.call(machine.symbol("deliver"))
    assert completion(machine).done == 2
    run_to_the_end(machine, spawn(machine, "t", call(machine, "await_delivery"), repeat=2), jiffies=10)
    assert completion(machine).done == 0


def test_complete_all_lets_everybody_go_on_now_and_later(machine: Machine) -> None:
    tasks = sleepers(machine, "await_delivery", count=3)
    machine.call(machine.symbol("complete_all"), machine.symbol("delivery"))
    run_to_the_end(machine, *tasks, jiffies=10)
    run_to_the_end(machine, spawn(machine, "late", call(machine, "await_delivery"), repeat=5), jiffies=10)
    machine.call(machine.symbol("deliver"))
    assert completion(machine).done == UINT_MAX


def test_the_waiter_is_on_its_own_stack(machine: Machine) -> None:
    (task,) = sleepers(machine, "await_delivery")
    entry = completion(machine).wait.task_list.next
    assert struct_of(machine, task).thread.sp < entry < task.stack_top
    assert struct_of(machine, task).__state == TASK_UNINTERRUPTIBLE


@pytest.mark.parametrize("jiffies", [1, 10, 1000])
def test_a_wait_with_a_limit_that_passes_returns_nothing_and_leaves_the_queue(
    machine: Machine, jiffies: int
) -> None:
    start = machine.timers.now
    function = machine.symbol("wait_for_completion_timeout")
    assert machine.call(function, machine.symbol("delivery"), jiffies) == 0
    assert machine.timers.now - start == jiffies
    assert waiting_for_delivery(machine) == []


def test_a_wait_with_a_limit_returns_what_is_left_of_it(machine: Machine) -> None:
    (task,) = sleepers(machine, "wait_for_completion_timeout", machine.symbol("delivery"), 100)
    machine.run(lambda: False, 40)
    machine.call(machine.symbol("deliver"))
    machine.run(lambda: bool(results(task)), 10)
    assert results(task) == [57]


def test_a_wait_with_a_limit_that_is_over_already_returns_at_least_one(machine: Machine) -> None:
    function, delivery = machine.symbol("wait_for_completion_timeout"), machine.symbol("delivery")
    machine.call(machine.symbol("deliver"))
    assert machine.call(function, delivery, 0) == 1
    machine.call(machine.symbol("deliver"))
    assert machine.call(function, delivery, 100) == 100


def test_a_signal_ends_an_interruptible_wait_and_takes_nothing(machine: Machine) -> None:
    delivery = machine.symbol("delivery")
    task = spawn(machine, "t", kthread=True)
    service = machine.hub.serve(
        task,
        "waits",
        lambda: machine.hub.call_guest(machine.symbol("wait_for_completion_interruptible"), delivery),
    )
    machine.run(lambda: False, 4)
    assert struct_of(machine, task).__state == TASK_INTERRUPTIBLE
    set_tsk_thread_flag(machine, task.struct, TIF_SIGPENDING)
    machine.sched.try_to_wake_up(task, TASK_INTERRUPTIBLE)
    machine.run(lambda: service.finished, 10)
    assert service.result == ERESTARTSYS
    assert waiting_for_delivery(machine) == []
    machine.call(machine.symbol("deliver"))
    assert machine.call(machine.symbol("wait_for_completion_interruptible"), delivery) == 0


def test_a_wake_up_that_is_none_of_the_completions_changes_nothing(machine: Machine) -> None:
    first, second = sleepers(machine, "await_delivery", count=2)
    machine.sched.try_to_wake_up(first)
    machine.run(lambda: False, 5)
    assert waiting_for_delivery(machine) == [first.struct, second.struct]
    machine.call(machine.symbol("deliver"))
    machine.run(lambda: False, 5)
    assert (results(first), results(second)) == ([1], [])


def test_whoever_is_torn_out_of_a_wait_takes_nobodys_completion(machine: Machine) -> None:
    with pytest.raises(KlpemuError, match="deadlock: init waits for wait_for_completion"):
        machine.call(machine.symbol("await_delivery"))
    assert waiting_for_delivery(machine) == []
    (task,) = sleepers(machine, "await_delivery")
    machine.call(machine.symbol("deliver"))
    run_to_the_end(machine, task, jiffies=10)


def test_a_completion_made_by_guest_code_works() -> None:
    machine = boot()
    mine = machine.slab.kzalloc(machine.layouts.sizeof("completion"), "completion")
    head = mine + machine.layouts.offsetof("completion", "wait")
    machine.call(machine.symbol("__init_swait_queue_head"), head)
    machine.call(machine.symbol("complete"), mine)
    assert machine.call(machine.symbol("wait_for_completion_timeout"), mine, 5) == 5
    assert machine.call(machine.symbol("wait_for_completion_timeout"), mine, 5) == 0


# Wait queues.


def new_queue(machine: Machine) -> int:
    head = machine.slab.kzalloc(machine.layouts.sizeof("wait_queue_head"), "wait_queue_head")
    machine.call(machine.symbol("__init_waitqueue_head"), head)
    return head


def queued(machine: Machine, head: int) -> list[int]:
    queue = machine.layouts.view("wait_queue_head", machine.space, head)
    return [each.private for each in list_for_each_entry(queue.head, "wait_queue_entry", "entry")]


def waiter(
    machine: Machine,
    head: int,
    name: str,
    flags: int = 0,
    *,
    prepare: str = "prepare_to_wait_event",
    state: int = TASK_UNINTERRUPTIBLE,
) -> tuple[Task, list[int]]:
    """A task that waits once on a queue; the list gets what prepare_to_wait_event() returned, and then 0."""
    task = spawn(machine, name, kthread=True)
    done: list[int] = []

    def body() -> None:
        entry = machine.on_stack(machine.layouts.sizeof("wait_queue_entry"))
        call_guest, symbol = machine.hub.call_guest, machine.symbol
        call_guest(symbol("init_wait_entry"), entry, flags)
        done.append(call_guest(symbol(prepare), head, entry, state))
        if not done[0] or prepare == "prepare_to_wait":
            machine.sched.schedule("the queue")
        call_guest(symbol("finish_wait"), head, entry)
        done.append(0)

    machine.hub.serve(task, "waits", body)
    machine.run(lambda: False, 3)
    return task, done


def wake_up(machine: Machine, head: int, nr_exclusive: int = 1, mode: int = TASK_NORMAL) -> int:
    return machine.call(machine.symbol("__wake_up"), head, mode, nr_exclusive, 0)


def ended(waiters: list[tuple[Task, list[int]]]) -> list[bool]:
    return [len(done) == 2 for _, done in waiters]


def test_a_wake_up_wakes_all_that_are_not_exclusive(machine: Machine) -> None:
    head = new_queue(machine)
    waiters = [waiter(machine, head, f"t{number}") for number in range(3)]
    assert queued(machine, head) == [task.struct for task, _ in reversed(waiters)]
    assert wake_up(machine, head) == 3
    machine.run(lambda: False, 5)
    assert ended(waiters) == [True] * 3
    assert queued(machine, head) == []


@pytest.mark.parametrize(("nr_exclusive", "woken"), [(1, 1), (2, 2), (0, 3), (7, 3)])
def test_of_the_exclusive_ones_only_so_many_are_woken_in_the_order_they_came(
    machine: Machine, nr_exclusive: int, woken: int
) -> None:
    head = new_queue(machine)
    exclusive = [waiter(machine, head, f"e{number}", EXCLUSIVE) for number in range(3)]
    other = waiter(machine, head, "other")
    assert wake_up(machine, head, nr_exclusive) == woken + 1
    machine.run(lambda: False, 5)
    assert ended(exclusive) == [True] * woken + [False] * (3 - woken)
    assert ended([other]) == [True]


def test_the_high_half_of_the_register_of_an_int_argument_does_not_count(machine: Machine) -> None:
    head = new_queue(machine)
    exclusive = [waiter(machine, head, f"e{number}", EXCLUSIVE) for number in range(3)]
    assert wake_up(machine, head, 0xDEAD_0000_0000_0001) == 1
    machine.run(lambda: False, 5)
    assert ended(exclusive) == [True, False, False]


def test_only_who_sleeps_in_the_mode_is_woken(machine: Machine) -> None:
    head = new_queue(machine)
    deep = waiter(machine, head, "deep", state=TASK_UNINTERRUPTIBLE)
    light = waiter(machine, head, "light", state=TASK_INTERRUPTIBLE)
    assert wake_up(machine, head, mode=TASK_INTERRUPTIBLE) == 1
    machine.run(lambda: False, 5)
    assert ended([deep, light]) == [False, True]
    assert queued(machine, head) == [deep[0].struct]


def test_prepare_to_wait_makes_an_entry_that_is_not_exclusive(machine: Machine) -> None:
    head = new_queue(machine)
    waiters = [
        waiter(machine, head, f"t{number}", EXCLUSIVE, prepare="prepare_to_wait") for number in range(2)
    ]
    assert wake_up(machine, head) == 2
    machine.run(lambda: False, 5)
    assert ended(waiters) == [True, True]


def test_a_signal_takes_the_entry_off_the_queue_before_it_sleeps(machine: Machine) -> None:
    head = new_queue(machine)
    task = spawn(machine, "t", kthread=True)
    set_tsk_thread_flag(machine, task.struct, TIF_SIGPENDING)
    answers = []

    def body() -> None:
        entry = machine.on_stack(machine.layouts.sizeof("wait_queue_entry"))
        machine.hub.call_guest(machine.symbol("init_wait_entry"), entry, 0)
        for state in (TASK_UNINTERRUPTIBLE, TASK_INTERRUPTIBLE):
            answer = machine.hub.call_guest(machine.symbol("prepare_to_wait_event"), head, entry, state)
            answers.append((answer, queued(machine, head)))
        machine.hub.call_guest(machine.symbol("finish_wait"), head, entry)

    machine.hub.serve(task, "waits", body)
    machine.run(lambda: not task.activities, 10)
    assert answers == [(0, [task.struct]), (ERESTARTSYS, [])]
    assert struct_of(machine, task).__state != TASK_RUNNING


def test_a_guest_function_that_says_stop_ends_the_wake_up(machine: Machine) -> None:
    """A negative return of an entry's function: whoever comes behind is not asked."""
    head = new_queue(machine)
    behind = waiter(machine, head, "behind")
    front, _ = waiter(machine, head, "front")
    entry = machine.layouts.view("wait_queue_head", machine.space, head).head.next
    offset = machine.layouts.offsetof("wait_queue_entry", "entry")
    first = machine.layouts.view("wait_queue_entry", machine.space, entry - offset)
    first.func = machine.symbol("test_export")
    machine.traps.exports["test_export"] = lambda machine, registers: 0xFFFF_FFFF
    assert wake_up(machine, head) == 0
    assert queued(machine, head) == [front.struct, behind[0].struct]


def test_the_default_function_leaves_the_entry_on_the_queue(machine: Machine) -> None:
    head = new_queue(machine)
    entry = machine.layouts.view(
        "wait_queue_entry",
        machine.space,
        machine.slab.kzalloc(machine.layouts.sizeof("wait_queue_entry"), "e"),
    )
    (task,) = sleepers(machine, "msleep", 4000)
    entry.private = task.struct
    wake = machine.symbol("default_wake_function")
    assert machine.call(wake, entry.address_, TASK_INTERRUPTIBLE, 0, 0) == 0
    assert machine.call(wake, entry.address_, TASK_NORMAL, 0, 0) == 1
    assert (
        read_u64(machine.space, head + machine.layouts.offsetof("wait_queue_head", "head")) != entry.address_
    )


def test_an_entry_of_nobody_is_said_to_be_one(machine: Machine) -> None:
    entry = machine.slab.kzalloc(machine.layouts.sizeof("wait_queue_entry"), "entry")
    with pytest.raises(KlpemuError, match="pointer to no task_struct"):
        machine.call(machine.symbol("default_wake_function"), entry, TASK_NORMAL, 0, 0)


# Under every interleaving.


Call = tuple[int, str, tuple[int, ...]]
Bounds = tuple[int, int | None]


def each_end(machine: Machine, bounds: Bounds, *calls: Call) -> Iterator[list[int]]:
    """What the calls, each on a task of its own, return under each schedule; a deadlock is an error."""
    tasks = machine.tasks
    for schedule in interleavings(*bounds):
        machine.hub.schedule = schedule
        begun = [
            machine.hub.call(tasks[at], machine.symbol(name), arguments) for at, name, arguments in calls
        ]
        for (at, _, _), guest in zip(calls, begun, strict=True):
            machine.hub.finish(tasks[at], guest)
        yield [guest.result for guest in begun]


# At most so many switches that nothing forces, and so many instructions at a time (None: up to an export).
TWO = [pytest.param((2, None), marks=pytest.mark.slow), (1, None), (1, 1)]
FOUR = [(1, None), (1, 5)]


@pytest.mark.parametrize("bounds", TWO)
def test_a_delivery_is_never_lost(bounds: Bounds) -> None:
    machine = boot(cpus=2)
    ends = list(each_end(machine, bounds, (0, "await_delivery", ()), (1, "deliver", ())))
    assert {each[0] for each in ends} == {1}
    assert len(ends) > 20
    assert completion(machine).done == 0
    assert waiting_for_delivery(machine) == []


@pytest.mark.parametrize("bounds", FOUR)
def test_two_deliveries_reach_two_waiters(bounds: Bounds) -> None:
    machine = boot(cpus=4)
    waits: list[Call] = [(0, "await_delivery", ()), (2, "await_delivery", ())]
    for ends in each_end(machine, bounds, *waits, (1, "deliver", ()), (3, "deliver", ())):
        assert ends[:2] == [1, 1]
        assert completion(machine).done == 0


@pytest.mark.parametrize("bounds", TWO)
def test_a_flag_that_is_raised_is_always_seen(bounds: Bounds) -> None:
    machine = boot(cpus=2)
    seen = []
    for ends in each_end(machine, bounds, (0, "await_flag", ()), (1, "raise_flag", (3,))):
        seen.append(ends[0])
        machine.space.write(machine.symbol("flag"), bytes(8))
    assert set(seen) == {3}
    assert len(seen) > 20


@pytest.mark.parametrize("bounds", FOUR)
def test_two_who_raise_a_flag_wake_two_who_wait(bounds: Bounds) -> None:
    machine = boot(cpus=4)
    waits: list[Call] = [(0, "await_flag", ()), (2, "await_flag", ())]
    for ends in each_end(machine, bounds, *waits, (1, "raise_flag", (3,)), (3, "raise_flag", (5,))):
        assert set(ends[:2]) <= {3, 5}
        machine.space.write(machine.symbol("flag"), bytes(8))


@pytest.mark.parametrize(("seed", "preemption"), list(product(range(8), [False, True])))
def test_many_who_wait_and_wake_at_random_all_come_to_their_end(seed: int, preemption: bool) -> None:
    machine = boot(cpus=3)
    machine.hub.schedule = Seeded(seed)
    machine.sched.full_preemption = preemption
    tasks = [
        spawn(machine, f"{function}{number}", call(machine, function, *arguments), cpu=number % 3, repeat=4)
        for number, (function, *arguments) in enumerate(
            [("await_delivery",), ("deliver",), ("await_flag",), ("raise_flag", 7)] * 3
        )
    ]
    run_to_the_end(machine, *tasks)
    assert completion(machine).done == 0
    assert waiting_for_delivery(machine) == []
    assert machine.slab.corruptions(machine.space) == []
