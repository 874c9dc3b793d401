"""Which steps came before which, as far as that matters: a run up to the order of steps that commute.

A number stands for each step: it is made from the task, the number of the task's step before, and those of
the steps of others that this one depends on (the last one that wrote what it touches, and for what it writes
those that have read it since).  Tasks are deterministic, so two runs in which every task's last number is the
same have gone through the same steps on the same values: they are in the same state (M. Musuvathi, S.
Qadeer, "Partial-order reduction for context-bounded state exploration", 2007).
"""

from collections.abc import Hashable
from typing import Final

from emu.footprint import Footprint

__all__ = ["HappensBefore"]

_MASK: Final = (1 << 64) - 1


class HappensBefore:
    """The steps of one run so far."""

    def __init__(self) -> None:
        self._last: dict[Hashable, int] = {}  # by task
        self._written: dict[Hashable, int] = {}
        self._read: dict[Hashable, int] = {}
        self._everything = 0  # the last step that depends on all before it, and all behind it on it

    def step(self, task: Hashable, footprint: Footprint, now: int) -> int:
        """The task has made a step, in jiffy `now`; returns its number."""
        if footprint.everything:
            return self.barrier(task)
        written, read = self._written, self._read
        found = self._everything + (hash((5, now)) if footprint.time else 0)
        for each in footprint.reads:
            found += hash((1, written.get(each, 0)))
        for each in footprint.writes:
            found += hash((2, written.get(each, 0), read.pop(each, 0)))
        number = hash((task, self._last.get(task, 0), found & _MASK))
        self._last[task] = number
        for each in footprint.reads - footprint.writes:
            read[each] = read.get(each, 0) + hash((3, number)) & _MASK
        for each in footprint.writes:
            written[each] = number
        return number

    def barrier(self, task: Hashable) -> int:
        """The task has made a step that may touch everything; returns its number."""
        number = hash((4, task, self.state()))
        self._last = {task: number}
        self._written.clear()
        self._read.clear()
        self._everything = number
        return number

    def state(self) -> int:
        """A number for the state that the run is in."""
        return hash((self._everything, frozenset(self._last.items()))) & _MASK
