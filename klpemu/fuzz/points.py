"""The restore points that a search comes back to."""

import random

from klpemu.fuzz.sequence_runner import Prefix

__all__ = ["Points"]

TRUNK = 0.7  # how often one goes on where the last sequence has ended


class Points:
    """Restore points behind sequences that have reached something new, and one behind the last sequence.

    They use at most `memory` bytes of copied guest memory, but for one of them; the oldest ones go first.
    """

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._kept: list[Prefix] = []
        self._size = 0
        self._trunk: Prefix | None = None

    def add(self, point: Prefix, *, new: bool) -> None:
        """The last sequence has ended here; `new` if on the way there it has reached what none had."""
        self._trunk = point
        if not new:
            return
        self._kept.append(point)
        self._size += point.size
        while self._size > self._memory and len(self._kept) > 1:
            self._size -= self._kept.pop(0).size

    def choose(self, random_: random.Random) -> Prefix | None:
        """Where to go on; None if there is nothing."""
        trunk, self._trunk = self._trunk, None
        if trunk is not None and (not self._kept or random_.random() < TRUNK):
            return trunk
        if not self._kept:
            return None
        # The newest ones are chosen most: they are where nobody has been.
        return self._kept[-1 - int(len(self._kept) * random_.random() ** 2)]
