"""The kernel's log: one line a message, the text letter for letter what a real kernel prints.

A message's level decides nothing here: all are kept, and only /dev/kmsg shows it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from emu.dynamic_debug import Callsite, DynamicDebug
from emu.exports import export
from emu.memory import read_string
from emu.vsprintf import va_list, variadic, vsprintf

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["Printk", "Stamp"]

KERN_SOH, CONT = "\x01", "c"  # include/linux/kern_levels.h
ERR, WARNING, NOTICE, INFO, DEBUG = 3, 4, 5, 6, 7
MESSAGE_LOGLEVEL_DEFAULT = WARNING


@dataclass(frozen=True, slots=True)
class Stamp:
    """What the log knows of a line beside its text: virtual nanoseconds since boot, and its priority.

    That is the level and eight times the facility.
    """

    nanoseconds: int
    priority: int


@dataclass(eq=False, slots=True)
class Printk:
    """The log of one machine; `dynamic_debug` says which debug lines are kept.

    `listeners` get each line as it comes.  `stamps` has one entry for each of `lines`, with the time that
    `clock` says.
    """

    lines: list[str] = field(default_factory=list)
    stamps: list[Stamp] = field(default_factory=list)
    clock: Callable[[], int] = lambda: 0
    dynamic_debug: DynamicDebug = field(default_factory=DynamicDebug)
    listeners: list[Callable[[str], None]] = field(default_factory=list)
    _open: bool = False  # the last line has not seen its newline: KERN_CONT goes on with it

    def __post_init__(self) -> None:
        self.dynamic_debug.complain = self.pr_err

    def pr_debug(self, text: str, callsite: Callsite | None = None) -> None:
        if callsite is None or self.dynamic_debug.prints(callsite):
            self._add(text, DEBUG)

    def pr_info(self, text: str) -> None:
        self._add(text, INFO)

    def pr_notice(self, text: str) -> None:
        self._add(text, NOTICE)

    def pr_warn(self, text: str) -> None:
        self._add(text, WARNING)

    def pr_err(self, text: str) -> None:
        self._add(text, ERR)

    def devkmsg_emit(self, priority: int, text: str) -> None:
        """A line that user space has written to /dev/kmsg."""
        self._add(text, priority)

    def vprintk_store(self, text: str) -> int:
        """Store what printk() was given: levels in front of it, a newline at its end or not.

        Returns the length without the levels.  A line that goes on is told to the listeners again, whole.
        """
        continues, level = False, MESSAGE_LOGLEVEL_DEFAULT
        while text.startswith(KERN_SOH) and len(text) > 1:
            continues = continues or text[1] == CONT
            level = int(text[1]) if text[1].isdigit() else level
            text = text[2:]
        first, newline, _ = text.partition("\n")
        if continues and self._open and self.lines:
            self.lines[-1] += first
            for listener in self.listeners:
                listener(self.lines[-1])
            self._add(text[len(first + newline) :], level)
        else:
            self._add(text, level)
        self._open = not text.endswith("\n")
        return len(text)

    def since(self, count: int) -> list[str]:
        """The lines after the first `count`."""
        return self.lines[count:]

    def _add(self, text: str, priority: int) -> None:
        self._open = False
        for line in text.splitlines():
            self.lines.append(line)
            self.stamps.append(Stamp(self.clock(), priority))
            for listener in self.listeners:
                listener(line)


def _vprintk(machine: "Machine", fmt: int, arguments: Iterator[int]) -> int:
    return machine.log.vprintk_store(vsprintf(machine, read_string(machine.space, fmt), arguments))


@export
def _printk(machine: "Machine", fmt: int) -> int:
    """Format and append to the log; KERN_CONT goes on with a line without newline.  Levels are dropped."""
    return _vprintk(machine, fmt, variadic(machine, 1))


@export
def vprintk(machine: "Machine", fmt: int, arguments: int) -> int:
    """As _printk(), with a va_list, which is left as it is."""
    return _vprintk(machine, fmt, va_list(machine, arguments))


@export
def __dynamic_pr_debug(machine: "Machine", _descriptor: int, fmt: int) -> None:
    """As _printk(); the descriptor's decorations (function, line, task) are not printed."""
    _vprintk(machine, fmt, variadic(machine, 2))


@export
def ___ratelimit(_machine: "Machine", _state: int, _function: int) -> int:
    """printk_ratelimited() may print (1): nothing is ever suppressed."""
    return 1
