"""How much one run may use: whoever uses more is a finding of its own kind."""

from dataclasses import dataclass
from typing import Final

from elf.errors import KlpemuError
from emu.machine import Machine

__all__ = ["BOUND", "Bounds", "Limit", "OutOfBounds"]

BOUND: Final = "the_run_stays_within_its_bounds"


NOT_EACH: Final = 64  # of so many turns one looks at time and memory, too


class OutOfBounds(KlpemuError):  # noqa: N818  (said of a run)
    """A run has used more than it may."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most that one run may use: turns that the schedule gives, virtual jiffies, bytes of guest memory.

    A turn is at most a jiffy's instructions, so the turns bound those, too.
    """

    turns: int = 400_000
    jiffies: int = 250 * 3600
    memory: int = 64 << 20


class Limit:
    """Watches one machine from now on; `check` is called at every turn and raises `OutOfBounds`."""

    def __init__(self, machine: Machine, bounds: Bounds) -> None:
        self._machine = machine
        self._bounds = bounds
        self._turns = 0
        self._used = self._in_use()

    def check(self) -> None:
        """One more turn."""
        self._turns += 1
        bounds = self._bounds
        if self._turns > bounds.turns:
            raise OutOfBounds(f"{BOUND}: more than {bounds.turns} turns")
        if self._turns % NOT_EACH:
            return
        if self._machine.timers.now > bounds.jiffies:
            raise OutOfBounds(f"{BOUND}: more than {bounds.jiffies} virtual jiffies")
        if self._in_use() - self._used > bounds.memory:
            raise OutOfBounds(f"{BOUND}: more than {bounds.memory >> 20} MiB of guest memory")

    def _in_use(self) -> int:
        return sum(len(each) for each in self._machine.space.arena.in_use())
