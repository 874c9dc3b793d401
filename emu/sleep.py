"""Kernel functions that give the CPU up for a time: kernel/time/timer.c, kernel/sched/core.c."""

from functools import partial
from typing import TYPE_CHECKING

from emu.entry import signal_pending
from emu.exports import export
from emu.thread_info import TASK_INTERRUPTIBLE, TASK_RUNNING, TASK_UNINTERRUPTIBLE
from emu.timer import HZ, MAX_SCHEDULE_TIMEOUT, msecs_to_jiffies

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["schedule_timeout_in", "set_current_state", "sleep_msecs"]

USEC_PER_JIFFY = 1_000_000 // HZ


def set_current_state(machine: "Machine", state: int) -> None:
    """Store the current task's __state."""
    machine.view("task_struct", machine.hub.current.struct).__state = state


def schedule_timeout_in(machine: "Machine", timeout: int, what: str) -> int:
    """schedule_timeout(): sleep in the state that the task has set; returns the jiffies that are left.

    A `timeout` that is negative as long is a bug of the caller: the kernel's complaint, and no sleep.
    """
    task = machine.hub.current
    if timeout >> 63:
        machine.log.pr_err(f"schedule_timeout: wrong timeout value {timeout:x}")
        set_current_state(machine, TASK_RUNNING)
        return 0
    if timeout == MAX_SCHEDULE_TIMEOUT:
        machine.sched.schedule(what)
        return MAX_SCHEDULE_TIMEOUT
    expires = machine.timers.now + timeout
    timer = machine.timers.add_timer(timeout, partial(machine.sched.try_to_wake_up, task), what)
    try:
        machine.sched.schedule(what)
    finally:
        machine.timers.del_timer(timer)
    return max(0, expires - machine.timers.now)


def sleep_msecs(machine: "Machine", msecs: int, state: int, what: str) -> int:
    """Sleep for at least so long; in TASK_INTERRUPTIBLE a signal ends it.  Returns the jiffies left."""
    timeout = min(msecs_to_jiffies(msecs) + 1, MAX_SCHEDULE_TIMEOUT)
    while timeout and not (state == TASK_INTERRUPTIBLE and signal_pending(machine, machine.hub.current)):
        set_current_state(machine, state)
        timeout = schedule_timeout_in(machine, timeout, what)
    return timeout


@export
def schedule(machine: "Machine") -> None:
    """Give the vCPU up: sleep in the state that the task has set, or stay in the queue."""
    machine.sched.schedule()


@export
def schedule_timeout(machine: "Machine", timeout: int) -> int:
    """Sleep in the state that the task has set, for at most so many jiffies."""
    return schedule_timeout_in(machine, timeout, "schedule_timeout")


def _schedule_timeout(machine: "Machine", timeout: int, state: int, what: str) -> int:
    set_current_state(machine, state)
    return schedule_timeout_in(machine, timeout, what)


@export
def schedule_timeout_interruptible(machine: "Machine", timeout: int) -> int:
    """As schedule_timeout(), in TASK_INTERRUPTIBLE."""
    return _schedule_timeout(machine, timeout, TASK_INTERRUPTIBLE, "schedule_timeout_interruptible")


@export
def schedule_timeout_uninterruptible(machine: "Machine", timeout: int) -> int:
    """As schedule_timeout(), in TASK_UNINTERRUPTIBLE."""
    return _schedule_timeout(machine, timeout, TASK_UNINTERRUPTIBLE, "schedule_timeout_uninterruptible")


@export
def msleep(machine: "Machine", msecs: int) -> None:
    """Sleep at least so long; no signal ends it."""
    sleep_msecs(machine, msecs & 0xFFFF_FFFF, TASK_UNINTERRUPTIBLE, "msleep")


@export
def msleep_interruptible(machine: "Machine", msecs: int) -> int:
    """Sleep at least so long, or until a signal; returns the milliseconds that were left."""
    left = sleep_msecs(machine, msecs & 0xFFFF_FFFF, TASK_INTERRUPTIBLE, "msleep_interruptible")
    return left * 1000 // HZ & 0xFFFF_FFFF


@export
def usleep_range_state(machine: "Machine", least: int, _most: int, state: int) -> None:
    """Sleep at least so many microseconds; the clock here counts in jiffies."""
    timeout = -(-least // USEC_PER_JIFFY)
    while timeout:
        set_current_state(machine, state & 0xFFFF_FFFF)
        timeout = schedule_timeout_in(machine, timeout, "usleep_range_state")


def _cond_resched(machine: "Machine") -> int:
    rq = machine.sched.rq_of(machine.hub.current)
    if not rq.queue and not rq.need_resched:
        return 0
    machine.sched.preempt_schedule("__cond_resched")
    return 1


@export
def __cond_resched(machine: "Machine") -> int:
    """Let others run that wait for this vCPU; 1 if there were any."""
    return _cond_resched(machine)


@export
def __SCT__cond_resched(machine: "Machine") -> int:  # noqa: N802  (the name of a static call)
    """cond_resched() in a module: __cond_resched(), and nothing with full preemption (sched_dynamic)."""
    return 0 if machine.sched.full_preemption else _cond_resched(machine)


@export
def __SCT__might_resched(machine: "Machine") -> int:  # noqa: N802  (the name of a static call)
    """might_sleep() in a module, likewise."""
    return 0 if machine.sched.full_preemption else _cond_resched(machine)


@export
def __msecs_to_jiffies(_machine: "Machine", msecs: int) -> int:
    """At least so many milliseconds, in jiffies."""
    return msecs_to_jiffies(msecs & 0xFFFF_FFFF)


@export
def jiffies_to_msecs(_machine: "Machine", jiffies: int) -> int:
    """So many jiffies, in milliseconds."""
    return jiffies * 1000 // HZ & 0xFFFF_FFFF


@export
def wake_up_process(machine: "Machine", task_struct: int) -> int:
    """Wake a task from a normal sleep; 1 if it slept."""
    return int(machine.sched.try_to_wake_up(machine.sched.task_of(task_struct)))


@export
def kthread_should_stop(_machine: "Machine") -> int:
    """Nobody stops kernel threads here."""
    return 0
