"""Where output goes: text for people on a terminal or in a file, or one JSON object, never both.

Text goes line by line; on a terminal a long line is wrapped with its continuation indented, elsewhere it
stays one line.  Progress of long work goes to standard error.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

from rich.console import Console, RenderableType
from rich.live import Live
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
# How often a picture is renewed: so many seconds between two, and so many times what drawing it takes.
PICTURE_SECONDS: Final = 0.1
PICTURE_SHARE: Final = 10

Item = TypeVar("Item")


class _Console(Console):
    """A console that leaves a closed pipe to the caller, instead of exiting with status 1.

    It never hides the cursor: whatever ends the process in the middle of a picture, the terminal is as it
    was.
    """

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

    def show_cursor(self, show: bool = True) -> bool:
        return False


class Output:
    """The output of one verb: `line`, `fact` and their like for people, `finish` for programs."""

    def __init__(self, verb: str, *, as_json: bool, color: str) -> None:
        self._verb = verb
        self._as_json = as_json
        self._console = _console(sys.stdout, color)
        self._progress = _console(sys.stderr, color)
        self._held: list[Text] | None = None

    @property
    def draws(self) -> bool:
        """There is a terminal, on which a picture can be kept up to date."""
        return self._console.is_terminal and not self._as_json

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
            self._print([first + text])
            return
        below = Text(" " * (indent + (len(label) or hang)))
        text.expand_tabs(2)
        width = max(20, self._console.width - len(below))
        parts = text.wrap(self._console, width)
        for part in parts:
            part.rstrip()
        self._print([(below if number else first) + part for number, part in enumerate(parts)])

    @contextmanager
    def together(self) -> Iterator[None]:
        """The lines of the block appear at once, so that a picture below them is drawn but once."""
        self._held = held = list[Text]()
        try:
            yield
        finally:
            self._held = None
        if held:
            self._print(held)

    def fact(self, label: str, *pieces: str | tuple[str, str]) -> None:
        """Print a labelled value; labels stand in a column."""
        self.line(*pieces, label=f"{label:<{LABEL}}", indent=2)

    def heading(self, text: str) -> None:
        """Print a heading, with an empty line above it."""
        self.line()
        self.line((text, "bold cyan"))

    @contextmanager
    def picture(self, draw: Callable[[], RenderableType]) -> Iterator[Callable[[Callable[[], None]], None]]:
        """Keep what `draw` returns below all lines while the block runs; the last picture stays.

        Yields a function to be called often: now and then it calls its argument, which prints what is new,
        and renews the picture.  Where nothing is drawn it calls its argument each time.
        """
        if not self.draws:
            yield lambda print_: print_()
            return
        due = 0.0

        def renew(print_: Callable[[], None]) -> None:
            nonlocal due
            began = time.monotonic()
            if began < due:
                return
            print_()
            with suppress(KlpemuError):  # lists are being changed: the next picture will do
                live.update(draw(), refresh=True)
            took = time.monotonic() - began
            due = began + max(PICTURE_SECONDS, PICTURE_SHARE * took)

        with Live(
            console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        ) as live:
            yield renew
            live.update(draw())

    def fault(self, fault: KlpemuError) -> None:
        """Print what stopped the guest to standard error: one line, its registers and last instructions."""
        print_error(fault)

    def _print(self, texts: list[Text]) -> None:
        if self._held is not None:
            self._held += texts
        else:
            self._console.print(*texts, sep="\n", soft_wrap=True)

    def finish(self, payload: dict[str, Any]) -> None:
        """Print the JSON object of the verb, if that is what was asked for."""
        if not self._as_json:
            return
        text = json.dumps({"schema": SCHEMA, "verb": self._verb, **payload}, indent=2) + "\n"
        # In pieces: with PYTHONUNBUFFERED a big write that a closed pipe cuts short counts as done.
        for start in range(0, len(text), PIECE):
            sys.stdout.write(text[start : start + PIECE])

    @contextmanager
    def gauge(self) -> Iterator[Callable[[str, float], None]]:
        """Show how far long work has come while the block runs.

        Yields a function of what is being done and the share of it, 0 to 1, that is behind: a bar on a
        terminal, elsewhere a line every few seconds.  No thread draws it, so that processes can be forked.
        """
        console, said = self._progress, time.monotonic()
        if not console.is_terminal:

            def say(what: str, share: float) -> None:
                nonlocal said
                if time.monotonic() - said > QUIET_SECONDS:
                    said = time.monotonic()
                    console.print(f"{what}, {share:.0%}")

            yield say
            return
        columns = (TextColumn("{task.description}"), BarColumn())
        with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
            bar = progress.add_task("", total=1.0)
            yield lambda what, share: progress.update(bar, description=what, completed=share, refresh=True)

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
