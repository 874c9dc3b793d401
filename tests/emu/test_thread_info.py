"""Flags of a task: their places are the kernel's, and each change is one locked instruction."""

import pytest
from interleavings import interleavings
from machines import boot, struct_of

from emu import thread_info
from emu.events import EventKind
from emu.machine import Machine
from emu.thread_info import (
    TIF_NOTIFY_SIGNAL,
    TIF_PATCH_PENDING,
    TIF_SIGPENDING,
    clear_tsk_thread_flag,
    set_tsk_thread_flag,
)

# arch/x86/include/asm/thread_info.h and include/linux/sched.h of 6.1.
KERNEL = {
    "TIF_SIGPENDING": 1 << 2,
    "TIF_PATCH_PENDING": 1 << 13,
    "TIF_NOTIFY_SIGNAL": 1 << 17,
    "PF_IDLE": 0x2,
    "PF_EXITING": 0x4,
    "PF_WQ_WORKER": 0x20,
    "PF_KTHREAD": 0x200000,
    "TASK_RUNNING": 0,
    "TASK_INTERRUPTIBLE": 1,
    "TASK_UNINTERRUPTIBLE": 2,
    "TASK_DEAD": 0x80,
    "TASK_NEW": 0x800,
    "TASK_NORMAL": 3,
}


def flags(machine: Machine) -> int:
    return int(struct_of(machine, machine.init_task).thread_info.flags)


@pytest.mark.parametrize("name", KERNEL)
def test_a_bit_is_where_the_kernel_has_it(name: str) -> None:
    assert getattr(thread_info, name) == KERNEL[name]


def test_every_bit_that_is_exported_is_checked_here() -> None:
    assert {name for name in thread_info.__all__ if name.isupper()} == set(KERNEL)


def test_setting_and_clearing_touch_no_other_flag(machine: Machine) -> None:
    task = machine.init_task.struct
    for flag in (TIF_SIGPENDING, TIF_NOTIFY_SIGNAL):
        set_tsk_thread_flag(machine, task, flag)
    assert flags(machine) == TIF_SIGPENDING | TIF_NOTIFY_SIGNAL
    clear_tsk_thread_flag(machine, task, TIF_SIGPENDING)
    assert flags(machine) == TIF_NOTIFY_SIGNAL
    assert thread_info.test_tsk_thread_flag(machine, task, TIF_NOTIFY_SIGNAL)
    assert not thread_info.test_tsk_thread_flag(machine, task, TIF_SIGPENDING)


def test_test_and_set_says_what_was_there(machine: Machine) -> None:
    task = machine.init_task.struct
    assert [thread_info.test_and_set_tsk_thread_flag(machine, task, TIF_PATCH_PENDING) for _ in range(3)] == [
        False,
        True,
        True,
    ]
    assert [
        thread_info.test_and_clear_tsk_thread_flag(machine, task, TIF_PATCH_PENDING) for _ in range(3)
    ] == [
        True,
        False,
        False,
    ]
    assert flags(machine) == 0


def test_a_change_is_one_store_and_no_change_is_none(machine: Machine) -> None:
    task = machine.init_task.struct
    before = machine.events.total
    set_tsk_thread_flag(machine, task, TIF_PATCH_PENDING)
    set_tsk_thread_flag(machine, task, TIF_PATCH_PENDING)
    (event,) = machine.events.since(before)
    assert event.kind is EventKind.STORE
    assert event.address == task + machine.layouts.offsetof("task_struct", "thread_info.flags")
    assert int.from_bytes(event.after, "little") == TIF_PATCH_PENDING


def test_of_two_who_clear_a_flag_one_found_it_set() -> None:
    """What makes a task be switched once, by itself or by klp_try_switch_task()."""
    machine = boot(cpus=2)
    first, second = machine.tasks[:2]
    for schedule in interleavings(4):
        machine.hub.schedule = schedule
        set_tsk_thread_flag(machine, first.struct, TIF_PATCH_PENDING | TIF_SIGPENDING)
        clears = [
            machine.hub.serve(
                task,
                "clears",
                lambda: (
                    set_tsk_thread_flag(machine, first.struct, TIF_NOTIFY_SIGNAL),
                    thread_info.test_and_clear_tsk_thread_flag(machine, first.struct, TIF_PATCH_PENDING),
                ),
            )
            for task in (first, second)
        ]
        for task, service in zip((first, second), clears, strict=True):
            machine.hub.finish(task, service)
        assert sorted(service.result[1] for service in clears) == [False, True]
        assert flags(machine) == TIF_SIGPENDING | TIF_NOTIFY_SIGNAL
