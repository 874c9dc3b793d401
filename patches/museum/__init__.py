"""The museum: bugs of livepatch, ftrace and text poking that really happened, or could have, one a file.

An exhibit is a module with a story (its docstring) and a `BUG`, whose `bug` is a variant: a context manager
that puts the broken piece of code in the place of the right one.  `fixtures/scenarios/museum/` has a
scenario of the same name, which holds without the bug and is found out with it.  To add one, write both
files and put the name into `NAMES`.
"""

import difflib
import enum
import importlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Final

from elf.errors import KlpemuError

__all__ = ["NAMES", "Bug", "Kind", "broken_by", "bug", "source", "story"]

# In the order in which they are shown; the module has underscores for the dashes.
NAMES: Final = (
    "int3-as-nop",
    "return-not-rebased",
    "ops-freed-early",
    "site-at-start",
    "ops-per-func",
    "immediate-jump",
    "fork-between",
    "stale-obj-mod",
    "relocations-left",
    "force-pins-all",
    "sympos-zero-one",
    "replaced-freed-early",
    "transition-before-state",
    "stack-before-transition",
    "stale-target",
    "nops-first",
    "nops-for-ever",
    "empty-reliable-stack",
    "shadow-one-look",
    "plain-store",
    "missing-sync",
    "tail-first",
)


class Kind(enum.Enum):
    """How far a bug came."""

    SHIPPED = "shipped"  # it was merged
    CAUGHT = "caught"  # in review, before it was merged
    COUNTERFACTUAL = "counterfactual"  # nobody wrote it: what if


@dataclass(frozen=True, slots=True)
class Bug:
    """One bug.

    `commit` cites what fixed it, or says for a counterfactual what keeps it away; what could not be looked up
    is marked there.  `invariant` is the name of the check that finds it in its scenario.  `breaks` says in
    words which code is replaced by what.  `fixed` is how it is without the bug, if the reference still has
    it.
    """

    title: str
    kind: Kind
    commit: str
    invariant: str
    breaks: str
    bug: Callable[[], AbstractContextManager[None]]
    fixed: Callable[[], AbstractContextManager[None]] = nullcontext


def bug(name: str) -> Bug:
    """The bug of that name; raises KlpemuError that names a similar one."""
    found: Bug = _module(name).BUG
    return found


def story(name: str) -> str:
    """What happened: the docstring of the exhibit."""
    return inspect.cleandoc(_module(name).__doc__ or "")


def source(name: str) -> str:
    """The exhibit's Python, all of it."""
    return inspect.getsource(_module(name))


def broken_by(name: str) -> AbstractContextManager[None]:
    """The variant that has the bug."""
    return bug(name).bug()


def _module(name: str) -> ModuleType:
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, 1)
        advice = f"did you mean {close[0]}?" if close else f"there are {', '.join(NAMES)}"
        raise KlpemuError(f"the museum has no bug '{name}'", advice=advice)
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
