"""The way back to user space: kernel/entry/common.c, and the system calls that tasks' programs make.

User space itself is not executed.  A user task's program is a sequence of system calls, each a guest function
or a service; between two of them it returns to user space, which is where signals are dealt with and where
livepatch switches it.
"""

from typing import TYPE_CHECKING

from emu.events import EventKind
from emu.task import Task
from emu.thread_info import TIF_NOTIFY_SIGNAL, TIF_PATCH_PENDING, TIF_SIGPENDING, clear_tsk_thread_flag

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["exit_to_user_mode_loop", "exit_work", "signal_pending"]

EXIT_TO_USER_MODE_WORK = TIF_SIGPENDING | TIF_PATCH_PENDING | TIF_NOTIFY_SIGNAL


def exit_to_user_mode_loop(machine: "Machine", task: Task) -> None:
    """Do the work that the thread flags ask for, until none is left; the current task only.

    Whoever waits for the vCPU gets it first: this is where every preemption model sees TIF_NEED_RESCHED.
    """
    rq = machine.sched.rq_of(task)
    if rq.queue or rq.need_resched:
        machine.sched.schedule("exit_to_user_mode")
    info = machine.view("task_struct", task.struct).thread_info

    while work := info.flags & EXIT_TO_USER_MODE_WORK:
        if work & TIF_PATCH_PENDING:
            machine.klp_update_patch_state(task.struct)
        if work & (TIF_SIGPENDING | TIF_NOTIFY_SIGNAL):
            # arch_do_signal_or_restart(): a fake signal has no handler, the system call starts again.
            clear_tsk_thread_flag(machine, task.struct, TIF_SIGPENDING | TIF_NOTIFY_SIGNAL)
    machine.events.record(EventKind.SWITCH_POINT, task.struct, note="return to user space")


def exit_work(machine: "Machine", task: Task) -> bool:
    """There is work to do before the task is in user space again."""
    flags: int = machine.view("task_struct", task.struct).thread_info.flags
    return bool(flags & EXIT_TO_USER_MODE_WORK)


def signal_pending(machine: "Machine", task: Task) -> bool:
    """There is a reason to end an interruptible sleep early."""
    flags: int = machine.view("task_struct", task.struct).thread_info.flags
    return bool(flags & (TIF_SIGPENDING | TIF_NOTIFY_SIGNAL))
