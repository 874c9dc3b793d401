"""States that were explored already, in memory that all processes of one exploration share.

For each state the table has how many preemptions were left when it was explored, and how many schedules go on
from it with at most 0, 1, ... of them.  A table that is full forgets what comes later: that costs time, and
changes no result.
"""

import mmap
import struct
from collections.abc import Sequence
from typing import Final

__all__ = ["Counters", "ExploredStates"]

CAPACITY: Final = 1 << 20  # states; the host gives out a page only when it is first touched
FULL: Final = CAPACITY * 3 // 4


class Counters:
    """Numbers by name that all processes share; each is changed by one process at a time."""

    def __init__(self, *names: str) -> None:
        self._at = {name: 8 * index for index, name in enumerate(names)}
        self._memory = mmap.mmap(-1, max(mmap.PAGESIZE, 8 * len(names)))

    def __getitem__(self, name: str) -> int:
        (value,) = struct.unpack_from("<q", self._memory, self._at[name])
        return int(value)

    def __setitem__(self, name: str, value: int) -> None:
        struct.pack_into("<q", self._memory, self._at[name], value)


class ExploredStates:
    """The table: an open hash from the number of a state to what is known of it."""

    def __init__(self, preemptions: int) -> None:
        self._entry = struct.Struct(f"<QQ{preemptions + 1}d")
        self._table = mmap.mmap(-1, CAPACITY * self._entry.size)
        self._count = Counters("states")

    def __len__(self) -> int:
        return self._count["states"]

    def find(self, state: int, left: int) -> list[float] | None:
        """How many schedules go on from the state with at most 0 ... `left` preemptions; None if unknown."""
        _, _, known, counts = self._slot(state)
        return counts[: left + 1] if known > left else None

    def store(self, state: int, counts: Sequence[float]) -> None:
        """The state was explored with at most len(counts) - 1 preemptions."""
        at, occupied, known, _ = self._slot(state)
        if known >= len(counts) or (not occupied and len(self) >= FULL):
            return
        padding = [0.0] * ((self._entry.size - 16) // 8 - len(counts))
        self._entry.pack_into(self._table, at, state or 1, len(counts), *counts, *padding)
        if not occupied:
            self._count["states"] += 1

    def _slot(self, state: int) -> tuple[int, bool, int, list[float]]:
        """Where the state is or would be: offset, whether it is there, budgets known, counts."""
        state = state or 1
        index = state % CAPACITY
        while True:
            at = index * self._entry.size
            found, known, *counts = self._entry.unpack_from(self._table, at)
            if found == state:
                return at, True, known, counts
            if not found:
                return at, False, 0, []
            index = (index + 1) % CAPACITY
