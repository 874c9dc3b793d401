"""The small commands that talk to a booted kernel: how they are run, and how their options are read.

A command is a function that gets a `Session` and its arguments, prints to the session, and returns its exit
status.
"""

import getopt
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from klpemu.module_tree import ModuleTree
from klpemu.user_space import UserSpace

__all__ = ["Command", "Options", "Session", "UsageError", "read_options"]


@dataclass(eq=False, slots=True)
class Session:
    """One run of a command: its name, the directory it runs in, what it prints."""

    name: str
    user_space: UserSpace
    modules: ModuleTree
    directory: str = "/"
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)

    def print(self, line: str) -> None:
        """A line to standard output."""
        self.out.append(f"{line}\n")

    def error(self, line: str) -> None:
        """A line to standard error, as kmod's commands begin theirs."""
        self.err.append(f"{self.name}: ERROR: {line}\n")

    def fatal(self, line: str) -> None:
        """As `error`, for what a command cannot go on from."""
        self.err.append(f"{self.name}: FATAL: {line}\n")


Command = Callable[[Session, Sequence[str]], int]


class UsageError(Exception):
    """Options that a command does not have; the text is what getopt_long() says of them."""


@dataclass(frozen=True, slots=True)
class Options:
    """What was given: letters of options with their (last) values, and the other arguments."""

    given: dict[str, str]
    arguments: list[str]

    def __contains__(self, letter: str) -> bool:
        return letter in self.given


def read_options(arguments: Sequence[str], letters: str, long: dict[str, str]) -> Options:
    """Read options as getopt_long() does; `long` maps long names, `=` at the end for a value, to letters."""
    try:
        pairs, rest = getopt.gnu_getopt(list(arguments), letters, list(long))
    except getopt.GetoptError as error:
        raise UsageError(_complaint(error)) from None
    given = {}
    for option, value in pairs:
        name = option.lstrip("-")
        given[long.get(name) or long.get(f"{name}=") or name] = value
    return Options(given, rest)


def _complaint(error: getopt.GetoptError) -> str:
    if "requires argument" in error.msg:
        if len(error.opt) == 1:
            return f"option requires an argument -- '{error.opt}'"
        return f"option '--{error.opt}' requires an argument"
    return (
        f"invalid option -- '{error.opt}'" if len(error.opt) == 1 else f"unrecognized option '--{error.opt}'"
    )
