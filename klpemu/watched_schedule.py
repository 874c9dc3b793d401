"""Looking at a kernel while it runs, where nobody is in the middle of anything."""

from collections.abc import Callable, Sequence

from emu.hub import Schedule
from emu.machine import Machine
from emu.task import Service, Task

__all__ = ["WatchedSchedule", "is_settled"]


class WatchedSchedule:
    """A schedule that calls `look` before each pick: services stand at their doors then, so that memory can
    be read.
    """

    def __init__(self, schedule: Schedule, look: Callable[[], None]) -> None:
        self.interleaves = schedule.interleaves
        self._schedule = schedule
        self._look = look

    def pick(self, tasks: Sequence[Task], finishing: Task) -> tuple[Task, int | None]:
        """What the schedule picks."""
        self._look()
        return self._schedule.pick(tasks, finishing)


def is_settled(machine: Machine) -> bool:
    """No vCPU is in the middle of a service, and no work is left for a kworker: what services change together
    can be judged.
    """
    return machine.workqueue.is_empty and not any(
        rq.idle.activities or _serves(rq.curr) for rq in machine.sched.runqueues
    )


def _serves(task: Task) -> bool:
    """The task runs and is in a service, or in guest code that a service has called."""
    return task.running and any(
        isinstance(each, Service) and not each.in_user_space for each in task.activities
    )
