"""Bits of task_struct that more than one part of the kernel reads: thread_info.flags, flags, __state.

Sources: arch/x86/include/asm/thread_info.h, include/linux/sched.h.
"""

from typing import TYPE_CHECKING

from emu.memory import read_u64

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = [
    "PF_EXITING",
    "PF_IDLE",
    "PF_KTHREAD",
    "PF_WQ_WORKER",
    "TASK_DEAD",
    "TASK_INTERRUPTIBLE",
    "TASK_NEW",
    "TASK_NORMAL",
    "TASK_RUNNING",
    "TASK_UNINTERRUPTIBLE",
    "TIF_NOTIFY_SIGNAL",
    "TIF_PATCH_PENDING",
    "TIF_SIGPENDING",
    "clear_tsk_thread_flag",
    "set_tsk_thread_flag",
    "test_and_clear_tsk_thread_flag",
    "test_and_set_tsk_thread_flag",
    "test_tsk_thread_flag",
]

TIF_SIGPENDING = 1 << 2
TIF_PATCH_PENDING = 1 << 13
TIF_NOTIFY_SIGNAL = 1 << 17

PF_IDLE = 0x2
PF_EXITING = 0x4
PF_WQ_WORKER = 0x20
PF_KTHREAD = 0x20_0000

TASK_RUNNING = 0
TASK_INTERRUPTIBLE = 1
TASK_UNINTERRUPTIBLE = 2
TASK_DEAD = 0x80
TASK_NEW = 0x800
TASK_NORMAL = TASK_INTERRUPTIBLE | TASK_UNINTERRUPTIBLE


def test_tsk_thread_flag(machine: "Machine", task: int, flag: int) -> bool:
    """Whether a flag of the task_struct at `task` is set."""
    return bool(read_u64(machine.shared, _flags(machine, task)) & flag)


def set_tsk_thread_flag(machine: "Machine", task: int, flag: int) -> None:
    """Set a flag, as one locked instruction."""
    test_and_set_tsk_thread_flag(machine, task, flag)


def clear_tsk_thread_flag(machine: "Machine", task: int, flag: int) -> None:
    """Clear a flag, as one locked instruction."""
    test_and_clear_tsk_thread_flag(machine, task, flag)


def test_and_set_tsk_thread_flag(machine: "Machine", task: int, flag: int) -> bool:
    """Set a flag and say whether it was set, as one locked instruction."""
    return bool(machine.shared.fetch_or(_flags(machine, task), flag) & flag)


def test_and_clear_tsk_thread_flag(machine: "Machine", task: int, flag: int) -> bool:
    """Clear a flag and say whether it was set, as one locked instruction."""
    return bool(machine.shared.fetch_andnot(_flags(machine, task), flag) & flag)


def _flags(machine: "Machine", task: int) -> int:
    return task + machine.layouts.offsetof("task_struct", "thread_info.flags")
