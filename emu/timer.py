"""Virtual time: jiffies in guest memory, and timers (kernel/time/timer.c).

Nothing here looks at a clock.  A jiffy passes when guest code has executed `JIFFY_INSTRUCTIONS`, and when
every vCPU is idle time goes straight to the next timer.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from elf.errors import KlpemuError
from emu.view import GuestVariable

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["HZ", "JIFFY_INSTRUCTIONS", "MAX_SCHEDULE_TIMEOUT", "Timer", "Timers", "msecs_to_jiffies"]

HZ = 250  # CONFIG_HZ of Debian's amd64 kernels
MAX_SCHEDULE_TIMEOUT = (1 << 63) - 1
# A real CPU executes millions in the 4 ms of a jiffy; so many fewer let a task that spins for 15 virtual
# seconds do so in a real one.
JIFFY_INSTRUCTIONS = 10_000


def msecs_to_jiffies(msecs: int) -> int:
    """Jiffies that are at least `msecs` milliseconds long; a number that is negative as int means no end."""
    if msecs & 0x8000_0000:
        return MAX_SCHEDULE_TIMEOUT
    return (msecs * HZ + 999) // 1000


@dataclass(order=True, slots=True)
class Timer:
    """One armed timer: `expires` in jiffies since boot; the first armed goes first among equals."""

    expires: int
    number: int
    function: Callable[[], object] = field(compare=False)
    what: str = field(compare=False, default="")
    pending: bool = field(compare=False, default=True)


class Timers:
    """The timers of one machine.  `now` counts jiffies since boot, `jiffies` is the kernel's own variable."""

    def __init__(self, machine: "Machine") -> None:
        self._jiffies = GuestVariable(machine.space, machine.symbol("jiffies"))
        self._initial = self._jiffies.get()
        self.now = 0
        self._spent = 0
        self._heap: list[Timer] = []
        self._armed = 0

    @property
    def jiffies(self) -> int:
        """The kernel's variable."""
        return self._jiffies.get()

    @property
    def seconds(self) -> float:
        """Virtual seconds since boot."""
        return self.now / HZ

    @property
    def executed(self) -> int:
        """Virtual time since boot in instructions, executed or slept through."""
        return self.now * JIFFY_INSTRUCTIONS + self._spent

    def local_clock(self) -> int:
        """Virtual nanoseconds since boot, as the log stamps its lines."""
        executed = min(self._spent, JIFFY_INSTRUCTIONS - 1)
        return (self.now * JIFFY_INSTRUCTIONS + executed) * (10**9 // HZ) // JIFFY_INSTRUCTIONS

    def add_timer(self, delay: int, function: Callable[[], object], what: str) -> Timer:
        """Call `function` in `delay` jiffies; it runs as an interrupt does and must not wait."""
        self._armed += 1
        timer = Timer(self.now + max(1, delay), self._armed, function, what)
        heapq.heappush(self._heap, timer)
        return timer

    def del_timer(self, timer: Timer) -> None:
        """Disarm; harmless if it has fired."""
        timer.pending = False

    @property
    def next_expiry(self) -> int | None:
        """When the next timer fires, in jiffies since boot; None without timers."""
        while self._heap and not self._heap[0].pending:
            heapq.heappop(self._heap)
        return self._heap[0].expires if self._heap else None

    def round_jiffies_relative(self, delay: int) -> int:
        """The delay to the whole second that is nearest, for CPU 0: rounded down in its first quarter."""
        at = self.jiffies + delay
        rest = at % HZ
        rounded = at - rest if rest < HZ // 4 else at - rest + HZ
        return (rounded if rounded > self.jiffies else at) - self.jiffies

    def spend(self, instructions: int) -> None:
        """So many instructions were executed."""
        self._spent += instructions
        if self._spent >= JIFFY_INSTRUCTIONS:
            passed, self._spent = divmod(self._spent, JIFFY_INSTRUCTIONS)
            self.advance_to(self.now + passed)

    def advance_to(self, now: int) -> None:
        """Let time pass up to `now`, firing what is due on the way, in order."""
        if now < self.now:
            raise KlpemuError("time does not go backwards")
        while (expires := self.next_expiry) is not None and expires <= now:
            self._set(max(self.now, expires))
            timer = heapq.heappop(self._heap)
            timer.pending = False
            timer.function()
        self._set(now)

    def _set(self, now: int) -> None:
        if now != self.now:
            self.now = now
            self._jiffies.set(self._initial + now & 0xFFFF_FFFF_FFFF_FFFF)
