"""What a run has reached, as numbers that are the same in every process.

Counted are states of the patch core, taken abstractly (what is on which func_stack, the transition, how the
tasks stand, the modules, the tracers), the edges between two of them with the operation and its answer, the
kinds of lines in the log, what happened on the way (traps, syncs and switches, in which state), the edges
between basic blocks of guest code, and how near a state is to what invariants forbid.
"""

import hashlib
import re
from collections.abc import Hashable, Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from emu.block_edges import BlockEdges
from emu.events import Event, EventKind
from emu.view import list_for_each_entry

if TYPE_CHECKING:
    from klpemu.kernel import Kernel
    from klpemu.scenario import Step

__all__ = ["EDGE", "OPERATION", "STATE", "Coverage", "counted"]

STATE: Final = "state"
EDGE: Final = "edge of guest code"
OPERATION: Final = "operation between two states"

_HAPPENING: Final = (EventKind.TRAP, EventKind.EMULATE, EventKind.SYNC, EventKind.SWITCH_POINT)
_KINDS: Final = (
    *(STATE, EDGE, OPERATION, "line of the log", "distance"),
    *(each.value for each in _HAPPENING),
)
_KIND_BITS: Final = 4
_NAMES: Final = re.compile(r"'[^']*'|\b0x[0-9a-f]+\b|\d+")


class _State(NamedTuple):
    """A state of the patch core."""

    stacks: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]  # a function; nop, transition of each func
    transition: tuple[bool, int]  # whether there is one, and klp_target_state
    # Name, patch_state, whether it can run, and whether it is in the guest.
    tasks: tuple[tuple[str, int, bool, bool], ...]
    modules: tuple[str, ...]
    tracers: int

    @property
    def patching(self) -> Hashable:
        """The part that edges are made of: with how the tasks stand too many would be new for nothing."""
        return self.stacks, self.transition


class Coverage:
    """Follows one kernel; `reached` are the numbers so far, in order."""

    def __init__(self, kernel: "Kernel") -> None:
        self.reached: dict[int, None] = {}
        self._kernel = kernel
        self._logged = len(kernel.log)
        self._happened: dict[tuple[EventKind, str], None] = {}
        self._before = self._state()
        self._blocks = BlockEdges(kernel.machine)
        self._passed: set[tuple[int, int]] = set()
        kernel.machine.events.listen(self._event, *_HAPPENING)

    def note(self, step: "Step") -> None:
        """Take in what a step has done; its `error` is how it was answered."""
        before, state = self._before, self._state()
        self._add(STATE, state)
        self._add(OPERATION, (before.patching, step.action.value, step.error, state.patching))
        for kind, note in self._happened:
            self._add(kind.value, (note, step.action.value, before.transition))
        for line in self._kernel.log[self._logged :]:
            self._add("line of the log", _NAMES.sub("?", line))
        for distance in self._distances(state):
            self._add("distance", distance)
        self._note_blocks()
        self._before = state
        self._happened.clear()
        self._logged = len(self._kernel.log)

    def _note_blocks(self) -> None:
        """Edges that this run has not passed before, by symbols: where a module lies says nothing."""
        entered = self._blocks.entered
        for source, target in sorted(entered - self._passed):
            self._add(EDGE, (self._place(source), self._place(target)))
        self._passed |= entered
        entered.clear()

    def _place(self, address: int) -> tuple[str, int]:
        symbol = self._kernel.machine.kallsyms.at(address)
        return ("", 0) if symbol is None else (symbol.name, address - symbol.address)

    def _distances(self, state: _State) -> Iterator[tuple[str, int]]:
        """Of what has to be gone some time: how much of it there is now, in powers of two."""
        if state.transition[0]:
            left = sum(each[1] != state.transition[1] for each in state.tasks)
            yield "kinds of tasks to be switched", left
        yield "funcs on a stack", max((len(funcs) for _, funcs in state.stacks), default=0)
        yield "nop funcs", sum(nop for _, funcs in state.stacks for nop, _ in funcs).bit_length()
        yield "allocations", len(self._kernel.machine.slab.live).bit_length()
        yield "tasks", len(self._kernel.machine.tasks).bit_length()

    def _add(self, kind: str, what: Hashable) -> None:
        self.reached[_number(kind, what)] = None

    def _event(self, event: Event) -> None:
        self._happened[event.kind, event.note if event.kind is not EventKind.TRAP else ""] = None

    def _state(self) -> _State:
        kernel = self._kernel
        machine, klp = kernel.machine, kernel.klp
        stacks = []
        for ops in klp.ops():
            funcs = list(list_for_each_entry(ops.func_stack, "klp_func", "stack_node"))
            where = machine.kallsyms.at(funcs[0].old_func) if funcs else None
            stacks.append(
                ("" if where is None else where.name, tuple((each.nop, each.transition) for each in funcs))
            )
        tasks = {
            (
                task.name,
                machine.layouts.view("task_struct", machine.space, task.struct).patch_state,
                task.running or task.queued,
                task.in_guest,
            )
            for task in machine.tasks
        }
        return _State(
            tuple(sorted(stacks)),
            (kernel.in_transition != "", klp.klp_target_state.get()),
            tuple(sorted(tasks)),
            tuple(sorted(machine.modules.objects)),
            sum(1 for _ in machine.ftrace.ops_list),
        )


@lru_cache(maxsize=1 << 16)
def _number(kind: str, what: Hashable) -> int:
    digest = hashlib.blake2b(repr((kind, what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> _KIND_BITS << _KIND_BITS | _KINDS.index(kind)


def counted(numbers: Iterable[int], kind: str) -> int:
    """How many of the numbers are of a kind, such as STATE."""
    bits = _KINDS.index(kind)
    return sum(each % (1 << _KIND_BITS) == bits for each in numbers)
