"""The kernel image and the code beside it that is ours: placed first, everything else refers to it.

A fixture kernel is a relocatable object without entry code.  Its text goes where a kernel's text goes
(__START_KERNEL_map + 16 MiB), and behind it come `__fentry__`, the ftrace trampolines, the list function,
whatever machine code the rooms above add (livepatch its handler), and the stubs through which guest code
leaves for us.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from elf.errors import KlpemuError, SymbolError
from elf.image import Image
from elf.mcount import fentry_sites
from elf.symbols import Symbol
from emu.assembly import Code
from emu.ftrace_64 import append_entry_code, append_list_func
from emu.kallsyms import Ksym
from emu.memory import PAGE_SIZE
from emu.module import Text, convert_sites, refuse_bad_sites
from emu.paging import Access
from emu.placement import Group, Placement, lay_out
from emu.view import Layouts

__all__ = [
    "ENTRY_SECTION",
    "KERNEL_BASE",
    "EntryCode",
    "Vmlinux",
    "append_redirection",
    "append_stubs",
    "link",
    "place_vmlinux",
]

KERNEL_BASE = 0xFFFF_FFFF_8100_0000
ENTRY_SECTION = ".text..klpemu"
HLT = 0xF4

# Appends machine code; receives the code, the layouts, the per-CPU offsets, and the fixups to fill.
EntryCode = Callable[[Code, Layouts, dict[str, int], dict[int, str]], None]


@dataclass(eq=False)
class Vmlinux:
    """The placed kernel: its sections, and the entry code's bytes and labels.

    `exits` maps the address behind the first `hlt` of each exit stub to the stub's name, and behind the
    second one to "klpemu_return".  `exported` are the symbols that modules link against, once somebody has
    asked (emu/module_exports.py).  `sites` are the fentry sites, NOPs by now.  `table` are the symbols of an
    image that was linked, in address order; another image's are in its file.
    """

    placement: Placement
    entry: Group
    entry_code: bytes
    labels: dict[str, int]
    exits: dict[int, str]
    symbols: dict[str, int]
    warn_sites: dict[int, str]
    sites: list[int] = field(default_factory=list)
    table: list[Ksym] | None = None
    exported: dict[str, Any] | None = None

    @cached_property
    def answered(self) -> frozenset[int]:
        """Where functions begin that are answered in Python: stubs, and what an image has such a stub for."""
        stubs = {address - 1: name for address, name in self.exits.items() if name != "klpemu_return"}
        replaced = {self.symbols[name] for name in stubs.values() if f"__klpemu_{name}" in self.labels}
        return frozenset(stubs) | replaced

    def entry_text(self) -> Text:
        """The entry code as it was assembled, with the `int3` filling behind it."""
        return Text(
            f"vmlinux:{ENTRY_SECTION}", self.entry.start, self.entry_code.ljust(self.entry.size, b"\xcc")
        )

    def ksyms(self) -> list[Ksym]:
        """All symbols in address order, which is what sympos counts in for vmlinux."""
        table = self.placement.ksyms("") if self.table is None else list(self.table)
        starts = [*sorted(set(self.labels.values())), self.entry.start + len(self.entry_code)]
        sizes = dict(zip(starts, (end - start for start, end in pairwise(starts)), strict=False))
        shared = Counter(self.labels.values())
        # Where one routine begins at the end of another, the place is called after the one that begins.
        table += [
            Ksym(name, address, sizes[address], "", not (name.endswith("_end") and shared[address] > 1))
            for name, address in self.labels.items()
        ]
        return sorted(table, key=lambda symbol: symbol.address)


def place_vmlinux(
    image: Image,
    layouts: Layouts,
    per_cpu: Callable[[int, int], int],
    entry_code: Sequence[EntryCode],
    exports: Sequence[str],
) -> Vmlinux:
    """Lay out and relocate the kernel image; `exports` get a stub each that leaves the guest."""
    code = Code()
    fixups: dict[int, str] = {}
    room = _size_of_entry(layouts, entry_code, exports)
    placement = lay_out(image, lambda size: KERNEL_BASE, per_cpu)
    defined = {
        symbol.name: value
        for symbol in image.symbols
        if symbol.is_defined and symbol.name and (value := placement.value(symbol)) is not None
    }
    start = placement.base + placement.size
    offsets = {name: defined.get(name, 0) for name in ("current_task", "__preempt_count")}
    for name in offsets:
        if name not in defined:
            raise SymbolError(f"the kernel image has no per-CPU symbol {name}", where=image.path)
    exits = _append_all(code, layouts, offsets, fixups, entry_code, exports, start)
    if len(code.bytes) > room:
        raise KlpemuError("the entry code does not fit the pages kept for it")
    warn_sites = {start + offset: text for offset, text in code.warnings.items()}
    labels = {name: start + offset for name, offset in code.labels.items() if name not in defined}
    symbols = {**labels, **defined}
    link(code, fixups, symbols, start)

    def resolve(symbol: Symbol) -> int:
        if symbol.name in labels:
            return labels[symbol.name]
        raise SymbolError(
            f"undefined symbol '{symbol.name}'",
            where=image.path,
            advice="the kernel image must define it, or klpemu must export it",
        )

    placement.relocate(resolve)
    sites = fentry_sites(image)
    refuse_bad_sites(image, sites)
    converted = convert_sites(placement, sites, symbols["__fentry__"])
    group = Group(Access.EXECUTE, start, -(-len(code.bytes) // PAGE_SIZE) * PAGE_SIZE)
    return Vmlinux(placement, group, bytes(code.bytes), labels, exits, symbols, warn_sites, converted)


def _append_all(
    code: Code,
    layouts: Layouts,
    per_cpu: dict[str, int],
    fixups: dict[int, str],
    entry_code: Sequence[EntryCode],
    exports: Sequence[str],
    start: int,
) -> dict[int, str]:
    append_redirection(code, layouts, per_cpu, fixups, entry_code)
    return append_stubs(code, exports, start)


def append_redirection(
    code: Code,
    layouts: Layouts,
    per_cpu: dict[str, int],
    fixups: dict[int, str],
    entry_code: Sequence[EntryCode],
) -> None:
    """Append what a redirected call goes through: entry code, list function, and `entry_code`."""
    append_entry_code(code, layouts, fixups)
    append_list_func(code, layouts, per_cpu, fixups)
    for append in entry_code:
        append(code, layouts, per_cpu, fixups)


def link(code: Code, fixups: dict[int, str], symbols: dict[str, int], start: int) -> None:
    """Fill the 32-bit PC-relative fields of code that begins at `start`."""
    for offset, name in fixups.items():
        if name not in symbols:
            raise SymbolError(f"the kernel image has no symbol {name}")
        displacement = symbols[name] - (start + offset + 4)
        code.bytes[offset : offset + 4] = displacement.to_bytes(4, "little", signed=True)


def append_stubs(code: Code, exports: Sequence[str], start: int) -> dict[int, str]:
    """Append the stubs through which guest code leaves; returns the exits.  The code begins at `start`."""
    code.align(16)
    exits: dict[int, str] = {}
    for name in ("klpemu_return", *exports):
        # hlt: to the export.  ret: it is done.  nop, hlt: what it called returns here (emu/switch_to.py).
        code.label(name).raw(bytes([HLT]))
        exits[start + len(code.bytes)] = name
        code.raw("c3 90 f4")
        exits[start + len(code.bytes)] = "klpemu_return"
        code.raw("cc")  # or who stops at the next stub's first byte would seem to have come from here
    return exits


def _size_of_entry(layouts: Layouts, entry_code: Sequence[EntryCode], exports: Sequence[str]) -> int:
    code = Code()
    _append_all(code, layouts, {"current_task": 0, "__preempt_count": 0}, {}, entry_code, exports, 0)
    return -(-len(code.bytes) // PAGE_SIZE) * PAGE_SIZE
