"""All ways in which a few tasks can be interleaved, up to so many switches that nothing forces.

Bugs of ordering show with very few switches (M. Musuvathi, S. Qadeer, "Iterative context bounding for
systematic testing of multithreaded programs", PLDI 2007), so a small bound finds them.
"""

from collections.abc import Iterator, Sequence

from emu.task import Task

__all__ = ["Interleaving", "interleavings"]


class Interleaving:
    """A schedule that goes on with the task it picked last, else with the first; not so at the `switches`.

    There it takes the next one.  `switches` are numbers of picks, `picks` counts them; `instructions` is what
    a task gets when it is in the guest.
    """

    interleaves = True

    def __init__(self, switches: Sequence[int], instructions: int | None = None) -> None:
        self.switches = frozenset(switches)
        self.picks = 0
        self._instructions = instructions
        self._last: Task | None = None

    def pick(self, tasks: Sequence[Task], finishing: Task) -> tuple[Task, int | None]:
        at = tasks.index(self._last) if self._last in tasks else 0
        if self.picks in self.switches:
            at = (at + 1) % len(tasks)
        self.picks += 1
        self._last = tasks[at]
        return self._last, self._instructions


def interleavings(bound: int, instructions: int | None = None) -> Iterator[Interleaving]:
    """Every schedule with at most `bound` switches, for a run that begins anew with each.

    The run must be over when the next one is asked for: how many picks it took says where a further switch
    could be.
    """
    waiting: list[tuple[int, ...]] = [()]
    while waiting:
        switches = waiting.pop()
        schedule = Interleaving(switches, instructions)
        yield schedule
        if len(switches) < bound:
            first = switches[-1] + 1 if switches else 0
            waiting += [(*switches, at) for at in range(first, schedule.picks)]
