"""Where output goes: text for people on a terminal or in a file, or one JSON object, never both.

Text goes line by line; on a terminal a long line is wrapped with its continuation indented, elsewhere it
stays one line.  Progress of long work goes to standard error.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from elf.errors import KlpemuError
from emu.traps import GuestFault
from klpemu.fixtures import shown

__all__ = ["COLORS", "SCHEMA", "Output", "print_error"]

SCHEMA: Final = 1
COLORS: Final = ("auto", "always", "never")
NARROW: Final = 80
LABEL: Final = 18
PIECE: Final = 1 << 14  # characters
QUIET_SECONDS: Final = 5.0

Item = TypeVar("Item")


class _Console(Console):
    """A console that leaves a closed pipe to the caller, instead of exiting with status 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Output:
    """The output of one verb: `line`, `fact` and their like for people, `finish` for programs."""

    def __init__(self, verb: str, *, as_json: bool, color: str) -> None:
        self._verb = verb
        self._as_json = as_json
        self._console = _console(sys.stdout, color)
        self._progress = _console(sys.stderr, color)

    @property
    def narrow(self) -> bool:
        """A terminal on which bytes and disassembly do not fit side by side."""
        return self._console.is_terminal and self._console.width < NARROW

    def line(self, *pieces: str | tuple[str, str], label: str = "", indent: int = 0, hang: int = 2) -> None:
        """Print a line of pieces, each a text or (text, style), behind a dim label.

        What does not fit a terminal goes on below, indented by `hang`, or by the length of a label.
        """
        if self._as_json:
            return
        text = Text.assemble(*pieces)
        first = Text.assemble(" " * indent, (label, "dim"))
        if not self._console.is_terminal:
            self._console.print(first + text, soft_wrap=True)
            return
        below = Text(" " * (indent + (len(label) or hang)))
        text.expand_tabs(2)
        width = max(20, self._console.width - len(below))
        for number, part in enumerate(text.wrap(self._console, width)):
            part.rstrip()
            self._console.print((below if number else first) + part, soft_wrap=True)

    def fact(self, label: str, *pieces: str | tuple[str, str]) -> None:
        """Print a labelled value; labels stand in a column."""
        self.line(*pieces, label=f"{label:<{LABEL}}", indent=2)

    def heading(self, text: str) -> None:
        """Print a heading, with an empty line above it."""
        self.line()
        self.line((text, "bold cyan"))

    def fault(self, fault: KlpemuError) -> None:
        """Print what stopped the guest to standard error: one line, its registers and last instructions."""
        print_error(fault)

    def finish(self, payload: dict[str, Any]) -> None:
        """Print the JSON object of the verb, if that is what was asked for."""
        if not self._as_json:
            return
        text = json.dumps({"schema": SCHEMA, "verb": self._verb, **payload}, indent=2) + "\n"
        # In pieces: with PYTHONUNBUFFERED a big write that a closed pipe cuts short counts as done.
        for start in range(0, len(text), PIECE):
            sys.stdout.write(text[start : start + PIECE])

    def track(self, items: Sequence[Item], what: str) -> Iterator[Item]:
        """The items, with their progress shown: a bar on a terminal, elsewhere a line every few seconds.

        Text that appears on the same terminal line by line is progress enough.
        """
        if self._progress.is_terminal and (self._as_json or not self._console.is_terminal):
            yield from _with_bar(items, what, self._progress)
        else:
            yield from _with_lines(items, what, len(items), self._progress)


def print_error(error: KlpemuError) -> None:
    """Print the one line of an error to standard error; a guest's failure goes on with its report."""
    sys.stdout.flush()
    text = shown(error.report() if isinstance(error, GuestFault) else str(error))
    sys.stderr.write(f"klpemu: {text}\n")


def _console(file: Any, color: str) -> Console:
    """NO_COLOR (no-color.org) counts unless colour is asked for by name."""
    wanted = color == "always" or (color == "auto" and not os.environ.get("NO_COLOR") and file.isatty())
    return _Console(
        file=file,
        color_system=("standard" if color == "always" else "auto") if wanted else None,
        force_terminal=file.isatty(),
        no_color=not wanted,
        highlight=False,
        markup=False,
        emoji=False,
    )


def _with_bar(items: Sequence[Item], what: str, console: Console) -> Iterator[Item]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(items, description=what)


def _with_lines(items: Iterable[Item], what: str, count: int, console: Console) -> Iterator[Item]:
    said = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - said > QUIET_SECONDS:
            said = time.monotonic()
            console.print(f"{what}: {number} of {count}")
        yield item
