"""Schedules: who goes on next.

Each is a function of the candidates and of its own past, so a run is determined by images, scenario and
schedule.
"""

import bisect
import random
from collections.abc import Sequence
from typing import Protocol

from elf.errors import KlpemuError
from emu.task import Task
from emu.timer import JIFFY_INSTRUCTIONS

__all__ = ["Directed", "Explicit", "RoundRobin", "RunToCompletion", "Schedule", "Seeded"]

MAX_STRIDE = 200  # instructions: a redirected call takes about a third of it


class Schedule(Protocol):
    """Decides which task goes on, and for how many instructions if it is in the guest."""

    interleaves: bool  # if not, services need not stop at the doors where nobody else could go on

    def pick(self, tasks: Sequence[Task], finishing: Task) -> tuple[Task, int | None]:
        """One of the runnable `tasks` (never empty), and how many instructions it gets (None: all)."""
        ...


class RunToCompletion:
    """The schedule without surprises: whatever was started last runs until it is done or waits."""

    interleaves = False

    def pick(self, tasks: Sequence[Task], finishing: Task) -> tuple[Task, int | None]:
        return (finishing if finishing in tasks else tasks[0]), None


class RoundRobin:
    """The vCPUs take turns of one jiffy; tasks on one vCPU in order of arrival; services go through.

    Where a task can be preempted, whoever comes next on its vCPU takes turns with it, too.
    """

    interleaves = False

    def __init__(self) -> None:
        self._cpu = -1
        self._last: dict[int, Task] = {}  # by vCPU

    def pick(self, tasks: Sequence[Task], finishing: Task) -> tuple[Task, int | None]:
        if len(tasks) == 1:
            picked = tasks[0]
            self._cpu = number = picked.cpu.number
            self._last[number] = picked
            return picked, JIFFY_INSTRUCTIONS
        # They come in order of their vCPUs; of thousands in the queues not each is looked at.
        first = bisect.bisect_right(tasks, self._cpu, key=_number) % len(tasks)
        picked = tasks[first]
        self._cpu = _number(picked)
        if picked.running and picked is self._last.get(self._cpu):
            picked = [each for each in tasks[first : first + 2] if each.cpu is picked.cpu][-1]
        self._last[self._cpu] = picked
        return picked, JIFFY_INSTRUCTIONS


def _number(task: Task) -> int:
    return task.cpu.number


class Seeded:
    """Anybody may be next, at any door and after any number of instructions; `seed` says who."""

    interleaves = True

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def pick(self, tasks: Sequence[Task], finishing: Task) -> tuple[Task, int | None]:
        return self._random.choice(tasks), self._random.randint(1, MAX_STRIDE)


class Explicit:
    """A list of (task name, instructions): each pick takes the next one; behind its end the vCPUs take turns.

    An entry of a service lets it go on to its next door, whatever its number.  "NAME#2" is the second task of
    that name among those that can go on, in order of their vCPUs.  Raises KlpemuError where the named task
    cannot go on.
    """

    interleaves = True

    def __init__(self, steps: Sequence[tuple[str, int]]) -> None:
        self._steps = list(steps)
        self._at = 0
        self._then = RoundRobin()

    def pick(self, tasks: Sequence[Task], finishing: Task) -> tuple[Task, int | None]:
        if self._at == len(self._steps):
            return self._then.pick(tasks, finishing)
        name, instructions = self._steps[self._at]
        self._at += 1
        same = [task for task in tasks if task.name == name]
        if not same:
            name, _, number = name.rpartition("#")
            same = [task for task in tasks if task.name == name][int(number or 1) - 1 :] if name else []
        if same:
            return same[0], instructions
        name = self._steps[self._at - 1][0]
        able = ", ".join(task.name for task in tasks)
        raise KlpemuError(
            f"'{name}' cannot go on", where=f"schedule, entry {self._at}", advice=f"these can: {able}"
        )


class Directed:
    """As `Explicit`, for one operation: an entry whose task cannot go on is passed over."""

    interleaves = True

    def __init__(self, steps: Sequence[tuple[str, int]]) -> None:
        self._steps = list(steps)
        self._at = 0
        self._then = RoundRobin()

    def pick(self, tasks: Sequence[Task], finishing: Task) -> tuple[Task, int | None]:
        if self._at == len(self._steps):
            return self._then.pick(tasks, finishing)
        able = {task.name: task for task in tasks}
        while self._at < len(self._steps):
            name, instructions = self._steps[self._at]
            self._at += 1
            if name in able:
                return able[name], instructions
        return self._then.pick(tasks, finishing)
