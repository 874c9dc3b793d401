"""Mutexes: one owner, waiters in the order they came, and nobody left asleep."""

import errno
from typing import Any

import pytest
from interleavings import interleavings
from machines import Checked, boot, call, is_gone, results, run_to_the_end, spawn, struct_of

from emu.events import EventKind
from emu.machine import Machine
from emu.mutex import mutex_held
from emu.schedules import RoundRobin
from emu.task import Service, Task
from emu.thread_info import (
    TASK_UNINTERRUPTIBLE,
    TIF_SIGPENDING,
    clear_tsk_thread_flag,
    set_tsk_thread_flag,
)
from emu.view import list_for_each_entry


@pytest.fixture
def machine() -> Machine:
    """Two vCPUs that take turns."""
    machine = boot(cpus=2)
    machine.hub.schedule = RoundRobin()
    return machine


def nap_mutex(machine: Machine) -> Any:
    return machine.layouts.view("mutex", machine.space, machine.symbol("nap_mutex"))


def waiting(machine: Machine) -> list[int]:
    return [each.task for each in list_for_each_entry(nap_mutex(machine).wait_list, "mutex_waiter", "list")]


def contenders(machine: Machine, count: int, msecs: int = 40) -> list[Task]:
    """Tasks that nap with the mutex held; each comes when those before it wait already."""
    tasks = []
    for number in range(count):
        nap = call(machine, "nap_with_mutex", msecs)
        tasks.append(spawn(machine, f"t{number}", nap, cpu=number % 2))
        machine.run(lambda: False, 2)
    return tasks


def test_the_owner_is_the_task_and_nobody_afterwards(machine: Machine) -> None:
    (task,) = contenders(machine, 1)
    assert nap_mutex(machine).owner.counter == task.struct - (1 << 64)
    run_to_the_end(machine, task)
    assert nap_mutex(machine).owner.counter == 0


def test_contenders_get_it_in_the_order_they_came(machine: Machine) -> None:
    tasks = contenders(machine, 4)
    assert waiting(machine) == [task.struct for task in tasks[1:]]
    ends: list[Task] = []

    def all_ended() -> bool:
        ends.extend(task for task in tasks if results(task) and task not in ends)
        return len(ends) == len(tasks)

    assert machine.run(all_ended, 400)
    assert ends == tasks
    assert waiting(machine) == []


def test_a_waiter_is_on_its_own_stack_and_asleep(machine: Machine) -> None:
    _, task = contenders(machine, 2)
    at = nap_mutex(machine).wait_list.next
    assert struct_of(machine, task).thread.sp < at < task.stack_top
    assert struct_of(machine, task).__state == TASK_UNINTERRUPTIBLE


def test_a_waiter_that_is_woken_for_another_reason_waits_on(machine: Machine) -> None:
    _, task, behind = contenders(machine, 3)
    for _ in range(3):
        assert machine.sched.try_to_wake_up(task)
        machine.run(lambda: False, 1)
    assert waiting(machine) == [task.struct, behind.struct]
    assert results(task) == []


def test_trylock_takes_it_or_says_no_and_never_sleeps(machine: Machine) -> None:
    trylock, unlock, lock = (machine.symbol(name) for name in ("mutex_trylock", "mutex_unlock", "nap_mutex"))
    assert [machine.call(trylock, lock) for _ in range(2)] == [1, 0]
    machine.call(unlock, lock)
    assert machine.call(trylock, lock) == 1


def test_a_mutex_made_by_guest_code_works(machine: Machine) -> None:
    mine = machine.slab.kmalloc(machine.layouts.sizeof("mutex"), "mutex")
    struct = machine.layouts.view("mutex", machine.space, mine)
    struct.wait_lock.val = 0
    machine.call(machine.symbol("__mutex_init"), mine)
    machine.call(machine.symbol("mutex_lock"), mine)
    assert struct.owner.counter + (1 << 64) == machine.init_task.struct
    machine.call(machine.symbol("mutex_unlock"), mine)
    assert struct.owner.counter == 0


def test_an_error_with_the_mutex_held_releases_it(machine: Machine) -> None:
    def body() -> None:
        with mutex_held(machine, "nap_mutex"):
            raise ValueError("a bug of ours")

    with pytest.raises(ValueError, match="bug"):
        machine.service("fails", body)
    assert nap_mutex(machine).owner.counter == 0


def test_whoever_is_torn_out_of_the_queue_leaves_it(machine: Machine) -> None:
    owner, waiter, behind = contenders(machine, 3)
    machine.hub.abandon(waiter)
    assert waiting(machine) == [behind.struct]
    run_to_the_end(machine, owner, behind)


def holders(machine: Machine, tasks: list[Task], seen: list[int]) -> list[Any]:
    """A service for each of the tasks that says how many are inside with it."""
    inside: list[Task] = []

    def body() -> None:
        with mutex_held(machine, "nap_mutex"):
            inside.append(machine.hub.current)
            machine.hub.door("inside")
            seen.append(len(inside))
            inside.pop()

    return [machine.hub.serve(task, "holds", body) for task in tasks]


@pytest.mark.parametrize(("cpus", "bound"), [(2, 2), (3, 2)])
def test_nobody_is_inside_with_another_and_all_get_in(cpus: int, bound: int) -> None:
    """A deadlock, a lost wake-up, would be an error of finish()."""
    machine = boot(cpus=cpus)
    tasks = machine.tasks[:cpus]
    slept = 0
    for schedule in interleavings(bound):
        machine.hub.schedule = schedule
        events = machine.events.total
        seen: list[int] = []
        for task, service in zip(tasks, holders(machine, tasks, seen), strict=True):
            machine.hub.finish(task, service)
        assert seen == [1] * cpus
        assert waiting(machine) == []
        assert nap_mutex(machine).owner.counter == 0
        slept += any(each.kind is EventKind.SWITCH for each in machine.events.since(events))
    assert slept, "some had to wait"


@pytest.mark.parametrize("seed", range(6))
def test_many_contenders_at_random_all_get_it(seed: int) -> None:
    machine = boot(cpus=3)
    machine.hub.schedule = Checked(machine, seed)
    machine.sched.full_preemption = bool(seed % 2)
    tasks = [
        spawn(machine, f"t{number}", call(machine, "nap_with_mutex", number % 3), cpu=number % 3, repeat=3)
        for number in range(7)
    ]
    run_to_the_end(machine, *tasks)
    assert [results(task) for task in tasks] == [[1] * 3] * 7
    assert all(is_gone(machine, task) for task in tasks)
    assert waiting(machine) == []
    assert machine.slab.corruptions(machine.space) == []


def test_one_that_gives_up_for_a_signal_takes_nobodys_turn() -> None:
    """It may be the one that the owner wakes: then somebody else has to be woken in its place."""
    machine = boot(cpus=3)
    owner, quitter, waiter = machine.tasks[:3]
    answers = set()

    def begin(task: Task, export: str) -> Service:
        answer = machine.traps.exports[export]
        return machine.hub.serve(task, export, lambda: answer(machine, {"rdi": machine.symbol("nap_mutex")}))

    for schedule in interleavings(2):
        machine.hub.schedule = RoundRobin()
        machine.hub.finish(owner, begin(owner, "mutex_lock"))
        gives_up, waits = begin(quitter, "mutex_lock_interruptible"), begin(waiter, "mutex_lock")
        machine.run(lambda: len(waiting(machine)) == 2 and not quitter.running and not waiter.running)
        set_tsk_thread_flag(machine, quitter.struct, TIF_SIGPENDING)
        machine.sched.try_to_wake_up(quitter)
        machine.hub.schedule = schedule
        machine.hub.finish(owner, begin(owner, "mutex_unlock"))
        clear_tsk_thread_flag(machine, quitter.struct, TIF_SIGPENDING)
        answers.add(machine.hub.finish(quitter, gives_up))
        if not gives_up.result:
            machine.hub.finish(quitter, begin(quitter, "mutex_unlock"))
        machine.hub.finish(waiter, waits)
        machine.hub.finish(waiter, begin(waiter, "mutex_unlock"))
        assert waiting(machine) == []
    assert answers == {0, -errno.EINTR}
