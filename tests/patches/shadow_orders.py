"""Every order in which two calls can go on, each on its own vCPU, and with them the kworker.

A schedule is told by its switches: at which decision somebody else goes on than whoever did last, and who.
Without one a task goes on until it is done or cannot.
"""

from collections.abc import Callable, Sequence

from emu.hub import RunToCompletion
from emu.task import Task
from klpemu import Kernel

__all__ = ["Interleaved", "Switches", "explore"]

Switches = tuple[tuple[int, int], ...]


class Interleaved:
    """The schedule with these switches; `widths` says of each decision among how many tasks it was.

    Nothing is decided where `matters` says that whoever ran last touches nothing that others see.
    """

    interleaves = True

    def __init__(self, switches: Switches, matters: Callable[[], bool] = lambda: True) -> None:
        self.widths: list[int] = []
        self._switches = dict(switches)
        self._matters = matters
        self._last: Task | None = None

    def pick(self, tasks: Sequence[Task], finishing: Task) -> tuple[Task, int | None]:
        at = tasks.index(self._last) if self._last in tasks else 0
        if len(tasks) > 1 and (self._last not in tasks or self._matters()):
            at += self._switches.get(len(self.widths), 0)
            self.widths.append(len(tasks))
        self._last = tasks[at % len(tasks)]
        return self._last, None


def explore(
    kernel: Kernel,
    first: tuple[str, Sequence[int]],
    second: tuple[str, Sequence[int]],
    check: Callable[[int, int], None],
    *,
    switches: int,
    matters: Callable[[], bool] = lambda: True,
) -> int:
    """Call both, in every order with at most so many switches, and `check` what they return each time.

    Returns how many orders there were; an AssertionError gets a note that says in which it failed.
    """
    todo: list[Switches] = [()]
    tried = 0
    while todo:
        made = todo.pop()
        schedule = Interleaved(made, matters)
        try:
            check(*_both(kernel, first, second, schedule))
        except Exception as error:
            error.add_note(f"with the switches {made}")
            raise
        tried += 1
        if len(made) < switches:
            start = made[-1][0] + 1 if made else 0
            todo += [
                (*made, (at, step))
                for at in range(start, len(schedule.widths))
                for step in range(1, schedule.widths[at])
            ]
    return tried


def _both(
    kernel: Kernel, first: tuple[str, Sequence[int]], second: tuple[str, Sequence[int]], schedule: Interleaved
) -> tuple[int, int]:
    machine = kernel.machine
    machine.hub.schedule = schedule
    calls = [
        machine.hub.call(task, kernel.address_of(function), arguments)
        for task, (function, arguments) in zip(machine.tasks[:2], (first, second), strict=True)
    ]
    try:
        machine.run(lambda: all(call.finished for call in calls) and machine.workqueue.is_empty)
        machine.run(lambda: False, 2)  # jiffies, for what waits for a grace period
    finally:
        machine.hub.schedule = RunToCompletion()
    for call in calls:
        if call.error is not None:
            raise call.error
    return calls[0].result, calls[1].result
