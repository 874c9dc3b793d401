"""Scenarios: what a sequence of operations on one kernel is, as plain data.

`klpemu.scenario_file` reads them from TOML, `klpemu.step_runner` performs them.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from klpemu.call_expression import CallExpression
from patches.livepatch import Patch

__all__ = ["Action", "Scenario", "Step"]


class Action(enum.Enum):
    """What a step does; the value is its key in a scenario file."""

    BOOT = "boot"
    LOAD = "load"
    UNLOAD = "unload"
    ENABLE = "enable"
    DISABLE = "disable"
    CALL = "call"
    TRACE = "trace"


@dataclass(frozen=True, slots=True)
class Step:
    """One operation and what is expected of it; an expectation that is None or "" is not checked.

    `target` names a patch or a module, or is the file of a module to load.  `error` is an errno's name or a
    part of the error's text; `log` is every line that the step logs; `through` are the functions that a
    traced call passes, in order, and `executed` is its number of instructions.  A `stage` is a heading over
    this and the following steps, `note` a line for the reader; `line` is where the step stands in its file, 0
    if it comes from no file.
    """

    action: Action
    target: str = ""
    call: CallExpression | None = None
    returns: int | None = None
    error: str = ""
    log: tuple[str, ...] | None = None
    through: tuple[str, ...] | None = None
    executed: int | None = None
    stage: str = ""
    note: str = ""
    line: int = 0

    @property
    def name(self) -> str:
        """What the step is called in output and findings: `enable fix_area`."""
        return f"{self.action.value} {self.target}".rstrip()


@dataclass(frozen=True, slots=True)
class Scenario:
    """A kernel, modules loaded at the start, the patches that steps can name, and the steps.

    `budget` is the number of instructions after which a guest call counts as endless, 0 for the default;
    relative paths of modules that steps load begin at `base`.
    """

    path: str = ""
    title: str = ""
    kernel: Path | None = None
    modules: Sequence[Path] = ()
    patches: Mapping[str, Patch] = field(default_factory=dict)
    steps: Sequence[Step] = ()
    budget: int = 0
    base: Path | None = None
