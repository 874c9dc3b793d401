"""What a run has reached, as numbers that are the same in every process.

Counted are states of the patch core, taken abstractly (what is on which func_stack, the transition, how the
tasks stand, the modules, the tracers), the edges between two of them with the operation and its answer, the
kinds of lines in the log, and what happened on the way: traps, syncs and switches, in which state.
"""

import hashlib
import re
from collections.abc import Hashable
from typing import TYPE_CHECKING, Final

from emu.events import Event, EventKind
from emu.view import list_for_each_entry

if TYPE_CHECKING:
    from klpemu.kernel import Kernel
    from klpemu.scenario import Step

__all__ = ["Coverage"]

_HAPPENING: Final = (EventKind.TRAP, EventKind.EMULATE, EventKind.SYNC, EventKind.SWITCH_POINT)
_NAMES: Final = re.compile(r"'[^']*'|\b0x[0-9a-f]+\b|\d+")


class Coverage:
    """Follows one kernel; `reached` are the numbers so far, in order, `states` those of states."""

    def __init__(self, kernel: "Kernel") -> None:
        self.reached: dict[int, None] = {}
        self.states: dict[int, None] = {}
        self._kernel = kernel
        self._logged = len(kernel.log)
        self._happened: dict[tuple[EventKind, str], None] = {}
        self._before = self._state()
        kernel.machine.events.listeners.append(self._event)

    def note(self, step: "Step") -> None:
        """Take in what a step has done; its `error` is how it was answered."""
        state = self._state()
        self.states[self._add("state", state)] = None
        # How the tasks stand is part of a state, but not of an edge: too many would be new for nothing.
        self._add("edge", (self._before[:2], step.action.value, step.error, state[:2]))
        for kind, note in self._happened:
            self._add(kind.value, (note, step.action.value, self._before[1]))
        for line in self._kernel.log[self._logged :]:
            self._add("log", _NAMES.sub("?", line))
        self._before = state
        self._happened.clear()
        self._logged = len(self._kernel.log)

    def _add(self, kind: str, what: Hashable) -> int:
        digest = hashlib.blake2b(repr((kind, what)).encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "little")
        self.reached[number] = None
        return number

    def _event(self, event: Event) -> None:
        if event.kind in _HAPPENING:
            self._happened[event.kind, event.note if event.kind is not EventKind.TRAP else ""] = None

    def _state(self) -> tuple[Hashable, ...]:
        kernel = self._kernel
        machine, klp = kernel.machine, kernel.klp
        stacks = []
        for ops in klp.ops():
            funcs = list(list_for_each_entry(ops.func_stack, "klp_func", "stack_node"))
            where = machine.kallsyms.at(funcs[0].old_func) if funcs else None
            stacks.append(
                ("" if where is None else where.name, tuple((each.nop, each.transition) for each in funcs))
            )
        tasks = sorted(
            {
                (
                    task.name,
                    machine.layouts.view("task_struct", machine.space, task.struct).patch_state,
                    task.running or task.queued,
                    task.in_guest,
                )
                for task in machine.tasks
            }
        )
        return (
            tuple(sorted(stacks)),
            (kernel.in_transition != "", klp.klp_target_state.get()),
            tuple(tasks),
            tuple(sorted(machine.modules.objects)),
            sum(1 for _ in machine.ftrace.ops_list),
        )
