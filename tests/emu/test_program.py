"""What tasks do by themselves: each step of a program, and the same results whatever the schedule."""

from typing import Any

import pytest
from machines import (
    assert_consistent,
    boot,
    call,
    is_gone,
    results,
    run_to_the_end,
    spawn,
    step,
    struct_of,
)

from elf.errors import KlpemuError
from emu.machine import Machine
from emu.program import RESULTS_KEPT, Operation
from emu.schedules import RoundRobin, Seeded
from emu.task import Task
from emu.thread_info import (
    TASK_INTERRUPTIBLE,
    TIF_NOTIFY_SIGNAL,
    TIF_PATCH_PENDING,
    clear_tsk_thread_flag,
    set_tsk_thread_flag,
)
from emu.timer import HZ
from emu.traps import GuestFault


@pytest.fixture
def machine() -> Machine:
    """One vCPU, tasks in order of arrival."""
    machine = boot()
    machine.hub.schedule = RoundRobin()
    return machine


def signal(machine: Machine, task: Task) -> None:
    """set_notify_signal()."""
    set_tsk_thread_flag(machine, task.struct, TIF_NOTIFY_SIGNAL)
    machine.sched.try_to_wake_up(task, TASK_INTERRUPTIBLE)


def jiffies_of(machine: Machine, *operations: Operation, **options: Any) -> int:
    """How long a program takes."""
    start = machine.timers.now
    run_to_the_end(machine, spawn(machine, "timed", *operations, **options))
    return machine.timers.now - start


# Each step.


def test_calls_are_made_in_order_with_their_arguments(machine: Machine) -> None:
    task = spawn(machine, "t", call(machine, "area_of", 3, 4), call(machine, "nap_below", 6, 1))
    run_to_the_end(machine, task)
    assert list(task.program.results) == [("area_of(3, 4)", 7), ("nap_below(6, 1)", 7)]


def test_a_program_is_repeated_as_often_as_asked_and_then_the_task_exits(machine: Machine) -> None:
    task = spawn(machine, "t", call(machine, "area_of", 1, 2), repeat=3)
    run_to_the_end(machine, task)
    assert results(task) == [3, 3, 3]


def test_a_program_without_end_keeps_its_last_results(machine: Machine) -> None:
    task = spawn(machine, "t", call(machine, "both_steps"), repeat=None)
    machine.run(lambda: False, 20)
    assert results(task) == [0x11] * RESULTS_KEPT
    assert not is_gone(machine, task)


@pytest.mark.parametrize("repeat", [1, None])
def test_an_empty_program_exits_at_once(machine: Machine, repeat: int | None) -> None:
    run_to_the_end(machine, spawn(machine, "t", repeat=repeat), jiffies=5)


@pytest.mark.parametrize("msecs", [0, 1, 3, 4, 5, 1000, 15_001])
def test_a_sleep_takes_as_long_as_it_says(machine: Machine, msecs: int) -> None:
    shortest = -(-msecs * HZ // 1000)
    assert shortest <= jiffies_of(machine, step("sleep", msecs)) <= shortest + 2


@pytest.mark.parametrize("msecs", [0, 1, 4, 1000])
def test_time_in_user_space_takes_as_long_as_it_says(machine: Machine, msecs: int) -> None:
    shortest = -(-msecs * HZ // 1000)
    assert shortest <= jiffies_of(machine, step("user", msecs)) <= shortest + 2


def test_exit_ends_the_program_where_it_stands(machine: Machine) -> None:
    task = spawn(
        machine, "t", call(machine, "both_steps"), step("exit"), call(machine, "nap", 4), repeat=None
    )
    run_to_the_end(machine, task)
    assert results(task) == [0x11]


def test_a_file_is_read_by_the_task_itself(machine: Machine) -> None:
    readers = []
    machine.kernfs.create_file(
        "/proc/who", 0o444, show=lambda: readers.append(machine.hub.current.name) or ""
    )
    for name in ("one", "two"):
        run_to_the_end(machine, spawn(machine, name, Operation("read(/proc/who)", "read", path="/proc/who")))
    assert readers == ["one", "two"]


def test_yield_lets_the_others_go_first(machine: Machine) -> None:
    first = spawn(machine, "first", step("yield"), call(machine, "area_of", 1, 1), kthread=True)
    second = spawn(machine, "second", call(machine, "area_of", 2, 2), kthread=True)
    machine.run(lambda: bool(results(second)), 10)
    assert results(first) == []


def test_a_kernel_thread_whose_calls_return_at_once_lets_time_go_by(machine: Machine) -> None:
    spawn(machine, "busy", call(machine, "both_steps"), kthread=True, repeat=None)
    machine.run(lambda: False, 5)
    assert machine.timers.now == 5


# Signals.


def test_an_interrupted_sleep_goes_on_for_the_rest_of_its_time(machine: Machine) -> None:
    task = spawn(machine, "t", step("sleep", 1000))
    start = machine.timers.now
    for _ in range(3):
        machine.run(lambda: False, 50)
        signal(machine, task)
    run_to_the_end(machine, task)
    assert HZ <= machine.timers.now - start <= HZ + 2


@pytest.mark.parametrize("operation", ["pause", "sys_pause"])
def test_a_pause_begins_again_after_a_signal(machine: Machine, operation: str) -> None:
    pause = step("pause") if operation == "pause" else call(machine, "sys_pause")
    task = spawn(machine, "t", pause, call(machine, "both_steps"))
    for _ in range(3):
        machine.run(lambda: False, 10)
        signal(machine, task)
        machine.run(lambda: False, 10)
        assert not struct_of(machine, task).thread_info.flags & TIF_NOTIFY_SIGNAL
    assert results(task) == []
    assert not task.running
    assert struct_of(machine, task).__state == TASK_INTERRUPTIBLE


def test_a_signal_that_comes_before_the_pause_is_not_slept_over(machine: Machine) -> None:
    task = spawn(machine, "t", step("pause"))
    set_tsk_thread_flag(machine, task.struct, TIF_NOTIFY_SIGNAL)
    machine.run(lambda: False, 10)
    assert not struct_of(machine, task).thread_info.flags & TIF_NOTIFY_SIGNAL


def test_a_kernel_threads_sleep_is_not_ended_by_a_wake_up(machine: Machine) -> None:
    task = spawn(machine, "t", step("sleep", 400), kthread=True)
    machine.run(lambda: False, 10)
    machine.sched.try_to_wake_up(task, TASK_INTERRUPTIBLE)
    start = machine.timers.now
    run_to_the_end(machine, task)
    assert machine.timers.now - start >= 89


# User space.


def test_in_user_space_a_task_is_current_and_quiescent(machine: Machine) -> None:
    task = spawn(machine, "t", step("user", 1000))
    machine.run(lambda: False, 10)
    assert task.running
    assert task.quiescent
    assert machine.sched.task_curr(task)


def test_what_is_pending_is_dealt_with_at_once_in_user_space(machine: Machine) -> None:
    def update(struct: int) -> None:
        clear_tsk_thread_flag(machine, struct, TIF_PATCH_PENDING)
        when.append(machine.timers.now)

    when: list[int] = []
    machine.klp_update_patch_state = update
    task = spawn(machine, "t", step("user", 1000))
    machine.run(lambda: False, 20)
    set_tsk_thread_flag(machine, task.struct, TIF_PATCH_PENDING)
    machine.run(lambda: False, 20)
    assert when == [20]
    assert task.quiescent, "and it is in user space again"


def test_who_computes_in_user_space_gives_the_vcpu_to_whoever_has_kernel_code_to_run(
    machine: Machine,
) -> None:
    spawn(machine, "computes", step("user", 4000))
    machine.run(lambda: False, 5)
    other = spawn(machine, "other", call(machine, "nap", 40), call(machine, "both_steps"))
    assert machine.call(machine.symbol("area_of"), 3, 4) == 7
    run_to_the_end(machine, other, jiffies=20)
    assert_consistent(machine)


def test_those_who_compute_in_user_space_on_one_vcpu_all_come_to_their_end(machine: Machine) -> None:
    start = machine.timers.now
    tasks = [spawn(machine, f"t{msecs}", step("user", msecs)) for msecs in (4000, 40, 400)]
    ends = []
    for task in sorted(tasks, key=lambda task: int(task.name[1:])):
        run_to_the_end(machine, task)
        ends.append(machine.timers.now - start)
    assert ends == sorted(ends)
    assert ends[0] < 20
    assert ends[1] < 110


def test_a_user_task_without_a_pause_lets_others_run_when_it_returns_to_user_space(machine: Machine) -> None:
    spawn(machine, "busy", call(machine, "both_steps"), repeat=None)
    napper = spawn(machine, "napper", call(machine, "nap", 4), repeat=3)
    machine.run(lambda: False, 2)
    assert machine.call(machine.symbol("area_of"), 3, 4) == 7, "the host's own requests, too"
    run_to_the_end(machine, napper, jiffies=50)


def test_a_kernel_thread_without_a_pause_keeps_its_vcpu(machine: Machine) -> None:
    spawn(machine, "busy", call(machine, "both_steps"), kthread=True, repeat=None)
    napper = spawn(machine, "napper", call(machine, "nap", 4))
    machine.run(lambda: False, 100)
    assert results(napper) == []


# Fork.


def test_a_child_goes_on_behind_the_fork_and_does_the_rest_once(machine: Machine) -> None:
    parent = spawn(
        machine, "p", call(machine, "current_pid"), step("fork"), call(machine, "current_pid"), repeat=2
    )
    seen = {parent: machine.pid_of(parent)}
    machine.run(lambda: seen.update({each: machine.pid_of(each) for each in machine.tasks}) is not None, 100)
    pid = seen.pop(parent)
    assert results(parent) == [pid] * 4
    children = [task for task in seen if task.name == "p"]
    assert sorted(results(child) for child in children) == [[seen[child]] for child in children]
    assert len(children) == 2


def test_a_fork_at_the_end_of_a_program_makes_a_child_that_exits(machine: Machine) -> None:
    before = len(machine.tasks)
    spawn(machine, "p", step("fork"), step("fork"))
    machine.run(lambda: False, 50)
    assert len(machine.tasks) == before
    assert machine.last_pid == before + 1 + 3


# Faults.


def test_a_task_that_faults_is_reported_and_the_machine_goes_on(machine: Machine) -> None:
    bad = spawn(machine, "bad", call(machine, "jump_nowhere"), call(machine, "both_steps"))
    good = spawn(machine, "good", call(machine, "nap", 40))
    with pytest.raises(GuestFault, match="jump to unmapped address"):
        machine.run(lambda: False, 100)
    run_to_the_end(machine, good)
    assert machine.call(machine.symbol("area_of"), 3, 4) == 7
    assert bad.activities == []
    assert results(bad) == []
    assert_consistent(machine)


def test_a_fault_while_the_host_waits_for_something_else_is_told_when_that_is_done() -> None:
    machine = boot(cpus=2)
    machine.hub.schedule = Seeded(1)
    spawn(machine, "bad", call(machine, "jump_nowhere"), cpu=1)
    done = []

    def body() -> None:
        for _ in range(500):
            machine.hub.door("here")
        done.append(True)

    with pytest.raises(GuestFault):
        machine.service("long", body)
    assert done == [True]
    machine.run(lambda: False, 10)


def test_of_two_that_fault_both_are_told(machine: Machine) -> None:
    for name in ("one", "two"):
        spawn(machine, name, call(machine, "jump_nowhere"))
    for _ in range(2):
        with pytest.raises(GuestFault):
            machine.run(lambda: False, 100)
    machine.run(lambda: False, 100)


def test_a_stack_that_overflows_hits_its_guard_page(machine: Machine) -> None:
    bad = spawn(machine, "deep", call(machine, "nap_below", 4000, 4))
    neighbour = spawn(machine, "next", call(machine, "nap", 400))
    with pytest.raises(GuestFault, match="access to unmapped address") as caught:
        machine.run(lambda: False, 100)
    assert f"{bad.stack_top - 0x4000 - 8:#x}" in str(caught.value)
    run_to_the_end(machine, neighbour)


def test_a_task_that_waits_for_what_never_comes_is_named(machine: Machine) -> None:
    spawn(machine, "waiter", call(machine, "await_delivery"))
    with pytest.raises(KlpemuError, match="deadlock: waiter waits for wait_for_completion"):
        machine.run(lambda: False)
