"""What the invariants judge: memory to be read, the files' text, and the patches as declared."""

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from emu.dyn_ftrace import records_of
from emu.kallsyms import Kallsyms
from emu.memory import Memory, MemoryFault
from emu.module import Text
from emu.slab import Slab
from emu.stream import Stream
from emu.view import Layouts

__all__ = ["ExpectedFunc", "Subject"]


@dataclass(frozen=True, slots=True)
class ExpectedFunc:
    """A patched function: where it is, and where each patch on its func_stack sends a call, newest first.

    An entry of `stack` is the address of a replacement, or None for a nop func.
    """

    address: int
    name: str
    stack: tuple[int | None, ...]


@dataclass(frozen=True)
class Subject:
    """One state of one machine.

    `texts` are the executable sections as their files and relocations give them, `sites` the fentry sites the files
    name; `functions` the patched functions; `patches` the names of the enabled patches, oldest first.  `execute`
    runs a stream on a machine in this state; without it (a dump, say) streams are not checked.  `remaining` are the
    allocations, address and tag, that exist beyond those of the kernel, its modules and its enabled patches.
    """

    memory: Memory
    layouts: Layouts
    kallsyms: Kallsyms
    symbols: Mapping[str, int]
    texts: Sequence[Text]
    sites: frozenset[int]
    functions: Sequence[ExpectedFunc]
    patches: Sequence[str]
    execute: Callable[[int, int], Stream] | None = None
    slab: Slab | None = None
    remaining: Sequence[tuple[int, str]] = ()

    @cached_property
    def records(self) -> dict[int, int]:
        """The flags of every ftrace record by its ip."""
        return records_of(self.memory, self.layouts, self.pointer("ftrace_pages_start"))

    @cached_property
    def registered(self) -> list[tuple[Any, frozenset[int]]]:
        """The ops on ftrace_ops_list, newest first, each with the addresses in its filter; up to what is no ops."""
        found: list[tuple[Any, frozenset[int]]] = []
        at, end, seen = self.pointer("ftrace_ops_list"), self.symbols["ftrace_list_end"], set[int]()
        while at and at != end and at not in seen:
            seen.add(at)
            ops = self.view("ftrace_ops", at)
            try:
                at = ops.next
                found.append((ops, self._filter(ops)))
            except MemoryFault:
                break
        return found

    def sites_in(self, start: int, end: int) -> list[int]:
        """The files' sites in [start, end)."""
        return self._sorted_sites[
            bisect.bisect_left(self._sorted_sites, start) : bisect.bisect_left(self._sorted_sites, end)
        ]

    def site_at(self, address: int) -> int:
        """The site whose five bytes hold `address`; the address itself if there is none."""
        index = bisect.bisect_right(self._sorted_sites, address) - 1
        site = self._sorted_sites[index] if index >= 0 else -5
        return site if site <= address < site + 5 else address

    @cached_property
    def _sorted_sites(self) -> list[int]:
        return sorted(self.sites)

    def _filter(self, ops: Any) -> frozenset[int]:
        """The addresses in the filter hash of an ops, found by walking every bucket."""
        found = self.view("ftrace_hash", self.view("ftrace_ops_hash", ops.func_hash).filter_hash)
        addresses: set[int] = set()
        for index in range(1 << min(found.size_bits, 12)):
            at = self.view("hlist_head", found.buckets + 8 * index).first
            while at and len(addresses) <= found.count:
                entry = self.view("ftrace_func_entry", at)
                addresses.add(entry.ip)
                at = entry.hlist.next
        return frozenset(addresses)

    def view(self, name: str, address: int) -> Any:
        """A typed view that can only read."""
        return self.layouts.view(name, self.memory, address)

    def pointer(self, symbol: str) -> int:
        """The value of a global pointer."""
        return int.from_bytes(self.memory.read(self.symbols[symbol], 8), "little")
