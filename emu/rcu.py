"""Grace periods and syncs, as predicates that a service waits for (kernel/rcu/tasks.h, alternative.c).

What a vCPU or a task has to have done since the wait began:

- `text_poke_sync`, `ftrace_sync_ipi`: every other vCPU is at a boundary where it takes interrupts.  One
  that is in the middle of guest code is at such a boundary whenever a service runs, and its view of memory
  is never stale; but one that has executed an `int3` takes none until that is dealt with.
- `synchronize_rcu_tasks_rude`, `klp_synchronize_transition` (schedule_on_each_cpu()), `synchronize_rcu`:
  every other vCPU has switched tasks, is idle or in user space, or could be switched right now.
- `synchronize_rcu_tasks`: every task that was on a run queue has given its vCPU up of its own accord, or has
  reached user space.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from emu.events import EventKind
from emu.memory import read_u64
from emu.task import Task

if TYPE_CHECKING:
    from emu.machine import Machine
    from emu.sched import RunQueue

__all__ = ["start_poll_synchronize_rcu", "synchronize"]

Holdout = TypeVar("Holdout")
INTERRUPTS = ("text_poke_sync", "ftrace_sync_ipi")


def synchronize(machine: "Machine", what: str) -> None:
    """Wait until the predicate of that name holds, and record that it does."""
    if what in INTERRUPTS:
        machine.hub.wait(_all_interruptible(machine), what, spins=True)
    elif what == "synchronize_rcu_tasks":
        machine.hub.wait(_all_tasks_have_slept(machine), what)
    else:
        machine.hub.wait(_all_cpus_have_scheduled(machine), what)
    machine.events.record(EventKind.SYNC, note=what)


def start_poll_synchronize_rcu(machine: "Machine") -> Callable[[], bool]:
    """A predicate for those who cannot wait: an RCU grace period has passed since this call."""
    return _all_cpus_have_scheduled(machine)


def _me(machine: "Machine") -> Task | None:
    return machine.hub.current if machine.hub.in_service else None


def _all_interruptible(machine: "Machine") -> Callable[[], bool]:
    me = _me(machine)
    return lambda: all(
        rq.curr is me or not rq.curr.running or rq.curr.interruptible for rq in machine.sched.runqueues
    )


def _all_cpus_have_scheduled(machine: "Machine") -> Callable[[], bool]:
    sched, me = machine.sched, _me(machine)
    left = [(rq, rq.nr_switches) for rq in sched.runqueues if rq.curr is not me]
    for rq, _ in left:
        rq.need_resched = True

    def passed(rq: "RunQueue", before: int) -> bool:
        return rq.nr_switches != before or rq.is_idle or rq.curr.quiescent or sched.preemptible(rq.curr)

    return _each_once(left, passed)


def _all_tasks_have_slept(machine: "Machine") -> Callable[[], bool]:
    me = _me(machine)
    nvcsw = machine.layouts.offsetof("task_struct", "nvcsw")

    def switches(task: Task) -> int:
        return read_u64(machine.space, task.struct + nvcsw)

    holdouts = [
        (task, switches(task))
        for task in machine.tasks
        if task is not me and (task.running or task.queued) and not task.quiescent
    ]

    def passed(task: Task, before: int) -> bool:
        return (
            not (task.running or task.queued)
            or task.quiescent
            or task.struct not in machine.by_struct
            or switches(task) != before
        )

    return _each_once(holdouts, passed)


def _each_once(left: list[tuple[Holdout, int]], passed: Callable[[Holdout, int], bool]) -> Callable[[], bool]:
    """Each of them has passed since, not all at one moment: who has is not waited for any more."""

    def holds() -> bool:
        left[:] = [each for each in left if not passed(*each)]
        return not left

    return holds
