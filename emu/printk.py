"""The kernel's log: one line a message, the text letter for letter what a real kernel prints."""

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Printk"]


@dataclass(eq=False, slots=True)
class Printk:
    """The log of one machine.  Debug lines are kept, as on a kernel with its dynamic debug switched on.

    `listeners` get each line as it comes.
    """

    lines: list[str] = field(default_factory=list)
    listeners: list[Callable[[str], None]] = field(default_factory=list)

    def pr_debug(self, text: str) -> None:
        self._add(text)

    def pr_info(self, text: str) -> None:
        self._add(text)

    def pr_notice(self, text: str) -> None:
        self._add(text)

    def pr_warn(self, text: str) -> None:
        self._add(text)

    def pr_err(self, text: str) -> None:
        self._add(text)

    def since(self, count: int) -> list[str]:
        """The lines after the first `count`."""
        return self.lines[count:]

    def _add(self, text: str) -> None:
        for line in text.splitlines():
            self.lines.append(line)
            for listener in self.listeners:
                listener(line)
