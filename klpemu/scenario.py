"""Scenarios: what a sequence of operations on one kernel is, as plain data.

`klpemu.scenario_file` reads them from TOML, `klpemu.step_runner` performs them.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import fspath
from pathlib import Path
from typing import Final

from klpemu.boot_machine import DEFAULT_CPU
from klpemu.call_expression import CallExpression
from klpemu.fixtures import BUILTIN, STOCK
from patches.livepatch import Patch

__all__ = ["REGISTRATION", "Action", "DeclaredTask", "Scenario", "Step"]

REGISTRATION: Final = "patches_registered"  # the variant under which patches can be registered


class Action(enum.Enum):
    """What a step does; the value is its key in a scenario file."""

    BOOT = "boot"
    LOAD = "load"
    UNLOAD = "unload"
    MODPROBE = "modprobe"
    RMMOD = "rmmod"
    ENABLE = "enable"
    DISABLE = "disable"
    REVERSE = "reverse"
    FORCE = "force"
    CALL = "call"
    TRACE = "trace"
    SPAWN = "spawn"
    RUN = "run"
    WAIT = "wait"
    READ = "read"
    LIST = "list"
    WRITE = "write"
    DMESG = "dmesg"
    REGISTER = "register"
    UNREGISTER = "unregister"
    FTRACE = "ftrace"
    UNFTRACE = "unftrace"


@dataclass(frozen=True, slots=True)
class DeclaredTask:
    """A task, or `count` alike: what it does by itself, `repeat` times (None: for ever), and then it exits.

    Without a `cpu` the vCPUs take turns.  It is there when the first step begins, unless `start` is False:
    then a step spawns it.  `line` is where its program stands in its file, 0 if it comes from no file.
    """

    name: str
    program: tuple[str, ...]
    kthread: bool = False
    cpu: int | None = None
    repeat: int | None = 1
    count: int = 1
    start: bool = True
    line: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One operation and what is expected of it; an expectation that is None, "" or empty is not checked.

    `target` names a patch, a module or a task, is the file of a module to load, or says how long to run or
    what to wait for.  `msecs` of virtual time go by in a run; a wait gives up after so many, if it has any.

    `error` is an errno's name or a part of the error's text; `log` is every line that the step logs;
    `through` are the functions that a traced call passes, in order, and `executed` is its number of
    instructions.  `transition` is the patch in transition after the step, "" for none.  `tasks` says how all
    tasks of a name stand then (`klpemu.expectations`), `returned` what their last calls have returned.
    `findings` are invariants that do not hold.  There is no memory for what has `fail_alloc` in its tag.

    A `write` writes `value`; a `modprobe` gives the module `parameters`.  What reads or lists a file, or
    looks into the log, may expect `contents`: lines, without their newlines.

    `ftrace` registers another user of ftrace, by a name of its own, on `functions`.  A `schedule` is followed
    until the operation is over or the schedule ends; who cannot go on is passed over.

    A `stage` is a heading over this and the following steps, `note` a line for the reader; `line` is where
    the step stands in its file, 0 if it comes from no file.
    """

    action: Action
    target: str = ""
    call: CallExpression | None = None
    msecs: int | None = None
    returns: int | None = None
    error: str = ""
    log: tuple[str, ...] | None = None
    through: tuple[str, ...] | None = None
    executed: int | None = None
    transition: str | None = None
    tasks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    returned: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    findings: tuple[str, ...] = ()
    value: str = ""
    parameters: str = ""
    contents: tuple[str, ...] | None = None
    functions: tuple[str, ...] = ()
    schedule: tuple[tuple[str, int], ...] = ()
    fail_alloc: str = ""
    stage: str = ""
    note: str = ""
    line: int = 0

    @property
    def name(self) -> str:
        """What the step is called in output and findings: `enable fix_area`."""
        value = f" = {self.value}" if self.value else ""
        return f"{self.action.value} {self.target}{value}".rstrip()


@dataclass(frozen=True, slots=True)
class Scenario:
    """A kernel, modules loaded at the start, the patches and tasks that steps can name, and the steps.

    `handler` is one of `klpemu.boot_machine.HANDLERS`, None for the kernel's own if it has one; `cpu` names a
    kind of CPU (`emu.cpu_features`).
    `budget` is the number of instructions after which a guest call counts as endless, 0 for the default;
    relative paths of modules that steps load begin at `base`.  From the first step on `seed` or `schedule`
    (task names, each with a number of instructions) decides who goes on; without them the vCPUs take turns.
    `variants` are what `patches.variants.variant` understands; they hold from before the kernel boots.
    """

    path: str = ""
    title: str = ""
    kernel: Path | None = None
    handler: str | None = None
    cpu: str = DEFAULT_CPU
    system_map: Path | None = None
    modules: Sequence[Path] = ()
    cpus: int = 1
    full_preemption: bool = False
    seed: int | None = None
    schedule: Sequence[tuple[str, int]] = ()
    patches: Mapping[str, Patch] = field(default_factory=dict)
    tasks: Mapping[str, DeclaredTask] = field(default_factory=dict)
    steps: Sequence[Step] = ()
    budget: int = 0
    base: Path | None = None
    variants: Sequence[str] = ()

    def anchored(self) -> "Scenario":
        """The same with absolute paths: wherever it is written to, it means these files."""
        base = (self.base or Path()).absolute()
        patches = {
            name: each if each.code is None else replace(each, code=_absolute(fspath(each.code), Path.cwd()))
            for name, each in self.patches.items()
        }
        loads = (Action.LOAD, Action.MODPROBE)
        return replace(
            self,
            kernel=self.kernel and self.kernel.absolute(),
            system_map=self.system_map and self.system_map.absolute(),
            modules=[each.absolute() for each in self.modules],
            patches=patches,
            steps=[
                replace(each, target=_absolute(each.target, base)) if each.action in loads else each
                for each in self.steps
            ],
            base=None,
        )


def _absolute(name: str, base: Path) -> str:
    return name if name.startswith((BUILTIN, STOCK)) else fspath(base / name)
