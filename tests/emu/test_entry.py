"""The way back to user space: what the thread flags ask for is done before a task is there again."""

import pytest
from machines import boot, call, results, spawn, step, struct_of

from emu.entry import exit_to_user_mode_loop, exit_work, signal_pending
from emu.events import EventKind
from emu.machine import Machine
from emu.schedules import RoundRobin
from emu.task import Task
from emu.thread_info import (
    TIF_NOTIFY_SIGNAL,
    TIF_PATCH_PENDING,
    TIF_SIGPENDING,
    clear_tsk_thread_flag,
    set_tsk_thread_flag,
)

NEED_RESCHED = 1 << 3


@pytest.fixture
def machine() -> Machine:
    """One vCPU, tasks in order of arrival."""
    machine = boot()
    machine.hub.schedule = RoundRobin()
    return machine


def switch_points(machine: Machine, task: Task) -> list[str]:
    return [
        event.note
        for event in machine.events
        if event.kind is EventKind.SWITCH_POINT and event.address == task.struct
    ]


def flags_of(machine: Machine, task: Task) -> int:
    return int(struct_of(machine, task).thread_info.flags)


def updates(machine: Machine) -> list[int]:
    """The task_structs that livepatch was asked to update, which clears the flag as it does."""
    asked: list[int] = []

    def update(struct: int) -> None:
        asked.append(struct)
        clear_tsk_thread_flag(machine, struct, TIF_PATCH_PENDING)

    machine.klp_update_patch_state = update
    return asked


@pytest.mark.parametrize(
    ("flag", "work", "signal"),
    [
        (TIF_PATCH_PENDING, True, False),
        (TIF_SIGPENDING, True, True),
        (TIF_NOTIFY_SIGNAL, True, True),
        (NEED_RESCHED, False, False),
    ],
)
def test_which_flags_are_work_and_which_are_signals(
    machine: Machine, flag: int, work: bool, signal: bool
) -> None:
    task = machine.init_task
    assert not exit_work(machine, task)
    set_tsk_thread_flag(machine, task.struct, flag)
    assert (exit_work(machine, task), signal_pending(machine, task)) == (work, signal)


def test_all_work_is_done_and_other_flags_are_left_alone(machine: Machine) -> None:
    asked, task = updates(machine), machine.init_task
    set_tsk_thread_flag(
        machine, task.struct, TIF_PATCH_PENDING | TIF_SIGPENDING | TIF_NOTIFY_SIGNAL | NEED_RESCHED
    )
    machine.call(machine.symbol("both_steps"))
    assert flags_of(machine, task) == NEED_RESCHED
    assert asked == [task.struct]


def test_work_that_comes_while_work_is_done_is_done_too(machine: Machine) -> None:
    asked, task = updates(machine), machine.init_task
    update = machine.klp_update_patch_state

    def update_and_signal(struct: int) -> None:
        update(struct)
        if len(asked) < 3:
            set_tsk_thread_flag(machine, struct, TIF_PATCH_PENDING | TIF_SIGPENDING)

    machine.klp_update_patch_state = update_and_signal
    set_tsk_thread_flag(machine, task.struct, TIF_PATCH_PENDING)
    machine.service("exit", lambda: exit_to_user_mode_loop(machine, task))
    assert asked == [task.struct] * 3
    assert flags_of(machine, task) == 0


def test_every_return_to_user_space_is_a_switch_point(machine: Machine) -> None:
    task = spawn(machine, "t", call(machine, "both_steps"), call(machine, "nap", 4), step("sleep", 4000))
    machine.run(lambda: False, 20)
    assert switch_points(machine, task) == ["return to user space"] * 2


def test_the_hosts_own_requests_return_to_user_space_too(machine: Machine) -> None:
    for _ in range(3):
        machine.call(machine.symbol("both_steps"))
    machine.service("nothing", lambda: None)
    assert switch_points(machine, machine.init_task) == ["return to user space"] * 4


def test_a_kernel_thread_never_returns_to_user_space(machine: Machine) -> None:
    asked = updates(machine)
    task = spawn(machine, "t", call(machine, "both_steps"), step("sleep", 4), kthread=True, repeat=None)
    set_tsk_thread_flag(machine, task.struct, TIF_PATCH_PENDING)
    machine.run(lambda: False, 50)
    assert results(task)
    assert switch_points(machine, task) == []
    assert asked == []
    assert flags_of(machine, task) == TIF_PATCH_PENDING


def test_whoever_waits_for_the_vcpu_gets_it_before_a_task_is_in_user_space_again(machine: Machine) -> None:
    task = spawn(machine, "t", call(machine, "both_steps"), repeat=None)
    others = [spawn(machine, f"o{number}", call(machine, "both_steps"), kthread=True) for number in range(3)]
    machine.run(lambda: bool(switch_points(machine, task)), 100)
    assert [results(other) for other in others] == [[0x11]] * 3


def test_a_task_that_is_alone_keeps_its_vcpu_on_the_way(machine: Machine) -> None:
    task = spawn(machine, "t", call(machine, "both_steps"), repeat=None)
    machine.run(lambda: len(switch_points(machine, task)) == 5, 100)
    assert struct_of(machine, task).nvcsw == struct_of(machine, task).nivcsw == 0


def test_two_that_only_return_to_user_space_take_turns_and_get_there(machine: Machine) -> None:
    tasks = [spawn(machine, name, call(machine, "both_steps"), repeat=None) for name in "ab"]
    machine.run(lambda: False, 10)
    counts = [len(switch_points(machine, task)) for task in tasks]
    assert min(counts) > 5
    assert abs(counts[0] - counts[1]) <= 1
