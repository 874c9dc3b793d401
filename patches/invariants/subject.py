"""What the invariants judge: memory to be read, the files' text, and the patches as declared."""

import bisect
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from emu.kallsyms import Kallsyms
from emu.memory import Memory, read_u64
from emu.module import LoadedObject, Text
from emu.slab import Slab
from emu.stream import Stream
from emu.view import Layouts
from patches.invariants.registered import FtraceState, read_ftrace

__all__ = ["ExpectedFunc", "Subject"]


@dataclass(frozen=True, slots=True)
class ExpectedFunc:
    """A patched function: where it is, and where each patch on its func_stack sends a call, newest first.

    An entry of `stack` is the address of a replacement, or None for a nop func.  `moving`: the newest one is
    in transition, so that a task which has not switched gets what is below it.
    """

    address: int
    name: str
    stack: tuple[int | None, ...]
    moving: bool = False


@dataclass(frozen=True)
class Subject:
    """One state of one machine.

    `texts` are the executable sections as their files and relocations give them, `sites` the fentry sites the
    files name; `functions` the patched functions; `patches` the names of the enabled patches, oldest first.
    `execute` runs a stream on a machine in this state, for a task with the given patch_state (None: as it
    is); without it (a dump, say) streams are not checked.
    `remaining` are the allocations, address and tag, that exist beyond those of the kernel, its modules and
    its enabled patches.
    `shadow_users` are the livepatch modules that have allocated or freed shadow variables, by these' id.
    `livepatches` are the modules of the enabled patches.
    `directories` are those below /sys/kernel/livepatch, with the address of the kobject that each shows, 0
    for none; None if nothing is known of them (a dump, say).  `log` are the lines of the kernel's log.
    `return_thunk_at` gives the address of the thunk through which the return at an address has to go.
    """

    memory: Memory
    layouts: Layouts
    kallsyms: Kallsyms
    symbols: Mapping[str, int]
    texts: Sequence[Text]
    sites: frozenset[int]
    functions: Sequence[ExpectedFunc]
    patches: Sequence[str]
    execute: Callable[..., Stream] | None = None
    slab: Slab | None = None
    remaining: Sequence[tuple[int, str]] = ()
    shadow_users: Mapping[int, Set[str]] = field(default_factory=dict)
    livepatches: Sequence[LoadedObject] = ()
    directories: Mapping[str, int] | None = None
    log: Sequence[str] = ()
    return_thunk_at: Callable[[int], int | None] = lambda address: None

    @cached_property
    def ftrace(self) -> FtraceState:
        """The records and the registered ops."""
        end = self.symbols["ftrace_list_end"]
        return read_ftrace(self.memory, self.layouts, self.kallsyms, self.pointer, end, len(self.sites))

    def sites_in(self, start: int, end: int) -> list[int]:
        """The files' sites in [start, end)."""
        return self._sorted_sites[
            bisect.bisect_left(self._sorted_sites, start) : bisect.bisect_left(self._sorted_sites, end)
        ]

    def place(self, address: int) -> str:
        """What lies at an address: the symbol, or the heap object, with the offset in it."""
        if self.kallsyms.at(address) is None:
            index = bisect.bisect_right(self._objects, (address, 1 << 64, "")) - 1
            if index >= 0:
                start, size, tag = self._objects[index]
                if address < start + size:
                    return f"{tag}+{address - start:#x}/{size:#x}"
        return self.kallsyms.describe(address)

    @cached_property
    def _objects(self) -> list[tuple[int, int, str]]:
        live = self.slab.live if self.slab is not None else {}
        return sorted((start, size, tag) for start, (size, tag) in live.items())

    @cached_property
    def _sorted_sites(self) -> list[int]:
        return sorted(self.sites)

    def view(self, name: str, address: int) -> Any:
        """A typed view that can only read."""
        return self.layouts.view(name, self.memory, address)

    def pointer(self, symbol: str) -> int:
        """The value of a global pointer."""
        return read_u64(self.memory, self.symbols[symbol])
