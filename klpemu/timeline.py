"""What happens on a kernel with tasks, moment by moment in virtual time: its log, and what becomes of tasks.

It is told by what guest memory is told: a task switches when its patch_state is stored.  How it came to that
is the switch point that is recorded with the store; a store by another task without one has been forced.
"""

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from emu.events import Event, EventKind
from emu.machine import Machine
from emu.task import Task
from patches.handler import KLP_PATCHED, KLP_UNDEFINED

__all__ = ["Moment", "MomentKind", "Timeline"]

FORCED = "forced"


class MomentKind(enum.Enum):
    """What a moment is about."""

    LOG = "log"
    SWITCH = "switch"
    FORK = "fork"
    EXIT = "exit"


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened, `seconds` of virtual time after the boot; `text` says it in one line.

    `task` is `name:pid`, empty for a line of the log; a switch has the `version` that it was to, and `how`
    it came about.
    """

    seconds: float
    kind: MomentKind
    text: str
    task: str = ""
    version: str = ""
    how: str = ""


class Timeline:
    """Follows one machine from now on.

    `moments` only grows.  `tasks` are all that ever were, with the pids they have or had; `how` is how tasks
    have switched in the present transition, by `name:pid`.
    """

    def __init__(self, machine: Machine) -> None:
        self.moments: list[Moment] = []
        self.tasks: dict[Task, int] = {}
        self.how: dict[str, str] = {}
        self._machine = machine
        self._patch_state = machine.layouts.offsetof("task_struct", "patch_state")
        self._alive: dict[Task, str] = {}  # with their names
        self._last_pid = -1
        self._version: dict[int, str] = {}  # stored, and no switch point yet
        self._stored_by_another: int | None = None
        machine.events.listeners.append(self._event)
        machine.log.listeners.append(self._logged)
        self.look()

    def look(self) -> None:
        """Notice the tasks that have come and gone; not while a service runs."""
        machine = self._machine
        if self._stored_by_another is not None:
            self._was_forced()
        if machine.last_pid == self._last_pid and len(machine.tasks) == len(self._alive):
            return
        self._last_pid = machine.last_pid
        alive = set(machine.tasks)
        for task in [each for each in self._alive if each not in alive]:
            name = self._alive.pop(task)
            self._add(MomentKind.EXIT, f"{name} exits", name)
        for task in machine.tasks:
            if task not in self._alive:
                self.tasks[task] = machine.pid_of(task)
                self._alive[task] = name = f"{task.name}:{self.tasks[task]}"
                parent = machine.by_struct.get(self._view(task.struct).parent)
                if parent in self._alive:  # what a step spawns is the child of an idle task
                    self._add(MomentKind.FORK, f"{name} is forked by {self._alive[parent]}", name)

    def returned(self) -> Mapping[str, list[list[int]]]:
        """By name, for each task that ever was, what its calls have returned, oldest first."""
        found: dict[str, list[list[int]]] = {}
        for task in self.tasks:
            results = task.program.results if task.program is not None else ()
            found.setdefault(task.name, []).append([value for _, value in results])
        return found

    def since(self, count: int) -> Iterator[Moment]:
        """The moments after the first `count`."""
        yield from self.moments[count:]

    # Listeners.  They run in the middle of services, so they read memory where nobody can come between.

    def _logged(self, line: str) -> None:
        self._was_forced()
        self._add(MomentKind.LOG, line)

    def _event(self, event: Event) -> None:
        if event.kind is EventKind.SWITCH_POINT:
            version = self._version.pop(event.address, None)
            if version is not None:
                self._stored_by_another = None
                self._switched(event.address, version, event.note)
            return
        if self._stored_by_another is not None:
            self._was_forced()
        if event.kind is EventKind.STORE:
            struct = event.address - self._patch_state
            task = self._machine.by_struct.get(struct)
            if task is None or event.before == event.after:
                return
            if task.idle or task in self._alive:  # a child is not there yet
                self._patch_state_stored(struct, *map(_state, (event.before, event.after)))

    def _patch_state_stored(self, struct: int, before: int, after: int) -> None:
        if KLP_UNDEFINED in (before, after):  # a transition begins, or is over
            self.how.pop(self._name(struct), None)
            self._version.pop(struct, None)
            return
        self._version[struct] = "patched" if after == KLP_PATCHED else "unpatched"
        hub = self._machine.hub
        if not hub.in_service or hub.current.struct != struct:
            self._stored_by_another = struct

    def _was_forced(self) -> None:
        """What another task has stored without a switch point."""
        struct, self._stored_by_another = self._stored_by_another, None
        if struct is not None and struct in self._version:
            self._switched(struct, self._version.pop(struct), FORCED)

    def _switched(self, struct: int, version: str, how: str) -> None:
        name = self._name(struct)
        self.how[name] = how
        self._add(MomentKind.SWITCH, f"{name} is {version} now: {how}", name, version, how)

    def _add(self, kind: MomentKind, text: str, task: str = "", version: str = "", how: str = "") -> None:
        self.moments.append(Moment(self._machine.timers.seconds, kind, text, task, version, how))

    def _name(self, struct: int) -> str:
        return f"{self._machine.by_struct[struct].name}:{self._view(struct).pid}"

    def _view(self, struct: int) -> Any:
        return self._machine.layouts.view("task_struct", self._machine.space, struct)


def _state(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)
