"""Where the sections of an object go in guest memory, and what its symbols are worth there.

Sections are grouped by what they may do (text, read-only data, data) and each group starts on a page, as
layout_sections() of kernel/module/main.c groups them.  Per-CPU sections get offsets from the GS base, not
addresses.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from elf.errors import ElfError, RelocationError
from elf.image import Image, Section
from elf.relocation import apply_relocations
from elf.symbols import SHN_ABS, SHN_COMMON, SHN_LIVEPATCH, SHN_UNDEF, STT_FUNC, Symbol
from emu.kallsyms import Ksym
from emu.memory import PAGE_SIZE
from emu.paging import Access

__all__ = ["Group", "KlpInfo", "Placement", "Resolver", "lay_out"]

# Gives the address of a symbol that the object does not define; raises for one that exists nowhere.
Resolver = Callable[[Symbol], int]


@dataclass(frozen=True, slots=True)
class Group:
    """Sections with the same access, at one run of pages: `start` and `size` in bytes."""

    access: Access
    start: int
    size: int


@dataclass(eq=False, slots=True)
class KlpInfo:
    """What livepatch keeps of a module's ELF tables, its symbol table above all (kernel/module/livepatch.c).

    `symbol_values` has, by symbol index, the st_value of SHN_LIVEPATCH symbols: guest virtual addresses, as
    they were resolved last.  `written` has, by klp relocation section and entry, the symbol's value with
    which the field was written.
    """

    symbol_values: dict[int, int] = field(default_factory=dict)
    written: dict[tuple[int, int], int] = field(default_factory=dict)


@dataclass(eq=False)
class Placement:
    """An object laid out: `addresses` maps a section's index to its virtual address or per-CPU offset."""

    image: Image
    base: int
    size: int
    addresses: dict[int, int]
    groups: list[Group]
    per_cpu: list[Section]
    contents: dict[int, bytearray] = field(default_factory=dict, repr=False)
    klp: KlpInfo = field(default_factory=KlpInfo, repr=False)

    def value(self, symbol: Symbol) -> int | None:
        """Guest virtual address of a symbol this object defines; None if its section is not loaded."""
        if symbol.section == SHN_ABS:
            return symbol.value
        address = self.addresses.get(symbol.section)
        return None if address is None else address + symbol.value

    def symbol_values(self, resolve: Resolver) -> list[int | None]:
        """The value of every entry of the symbol table, undefined ones resolved."""
        values: list[int | None] = []
        for symbol in self.image.symbols:
            if symbol.section == SHN_UNDEF:
                values.append(resolve(symbol) if symbol.index else 0)
            elif symbol.section == SHN_COMMON:
                raise ElfError(
                    f"common symbol '{symbol.name}'",
                    where=self.image.path,
                    advice="compile with -fno-common, as the kernel's loader asks",
                )
            elif symbol.section == SHN_LIVEPATCH:
                # Resolved by the livepatch core when its object is there, not by the loader.
                values.append(None)
            else:
                values.append(self.value(symbol))
        return values

    def relocate(self, resolve: Resolver) -> None:
        """Fill `contents` with the relocated bytes of every section that is loaded."""
        values = self.symbol_values(resolve)
        for index, address in self.addresses.items():
            section = self.image.sections[index]
            data = bytearray(section.size) if section.is_nobits else bytearray(self.image.contents(section))
            self.contents[index] = data
            for rela in self.image.relocation_sections(section):
                if rela.is_klp_relocation:
                    continue
                if section.is_nobits:
                    raise RelocationError(
                        "relocation of a section without contents", where=self.image.place(rela.name)
                    )
                apply_relocations(self.image, rela, target=data, target_address=address, symbol_values=values)

    def ksyms(self, module: str) -> list[Ksym]:
        """What kallsyms knows of this object: each named symbol in a loaded section, in symbol-table order.

        Assembler labels (`.L`) are left out, as scripts/kallsyms.c and is_mapping_symbol() leave them out.
        """
        found: list[tuple[int, Symbol]] = []
        for symbol in self.image.symbols:
            address = self.addresses.get(symbol.section)
            if address is None or symbol.type > STT_FUNC or self._is_per_cpu(symbol.section):
                continue
            if not symbol.name or symbol.name.startswith(".L"):
                continue
            found.append((address + symbol.value, symbol))
        ends = self._next_symbols(found)
        return [
            Ksym(symbol.name, address, ends[address] - address, module, symbol.is_function)
            for address, symbol in found
        ]

    def _next_symbols(self, found: list[tuple[int, Symbol]]) -> dict[int, int]:
        """For each symbol's address the next higher one, or the end of its section."""
        ends: dict[int, int] = {}
        starts = sorted({(symbol.section, address) for address, symbol in found})
        for (section, address), (next_section, next_address) in zip(
            starts, [*starts[1:], (-1, 0)], strict=True
        ):
            end = self.addresses[section] + self.image.sections[section].size
            ends[address] = next_address if next_section == section else end
        return ends

    def _is_per_cpu(self, index: int) -> bool:
        return self.image.sections[index].name.startswith(".data..percpu")


def lay_out(image: Image, base: Callable[[int], int], per_cpu: Callable[[int, int], int]) -> Placement:
    """Decide the place of every allocated section.

    `base(size)` gives the page-aligned address of `size` bytes; `per_cpu(size, alignment)` an offset in every
    CPU's area.
    """
    if not image.is_relocatable:
        raise ElfError("a linked file", where=image.path, advice="load relocatable objects (.o, .ko)")
    order = (Access.EXECUTE, Access.READ, Access.WRITE)
    kinds: dict[Access, list[Section]] = {access: [] for access in order}
    per_cpu_sections = []
    for section in image.sections:
        if not section.is_alloc:
            continue
        # Empty sections have a place, too: code may refer to one (`.bss + 0`).
        if section.name.startswith(".data..percpu"):
            if section.size:
                per_cpu_sections.append(section)
        else:
            kinds[_access(section)].append(section)
    offsets: dict[int, int] = {}
    runs: list[tuple[Access, int, int]] = []
    end = 0
    for access in order:
        start = end
        for section in kinds[access]:
            end = -(-end // max(section.alignment, 1)) * max(section.alignment, 1)
            offsets[section.index] = end
            end += section.size
        end = -(-end // PAGE_SIZE) * PAGE_SIZE
        if end > start:
            runs.append((access, start, end - start))
    if end > 1 << 28:
        raise ElfError(f"sections of {end:#x} bytes in all", where=image.path, advice="256 MiB is the limit")
    at = base(end) if end else 0
    addresses = {index: at + offset for index, offset in offsets.items()}
    # "..first" really comes first: the compiler finds the stack canary at a fixed place of the area.
    for section in sorted(per_cpu_sections, key=lambda each: not each.name.endswith("..first")):
        addresses[section.index] = per_cpu(section.size, section.alignment)
    groups = [Group(access, at + start, size) for access, start, size in runs]
    return Placement(image, at, end, addresses, groups, per_cpu_sections)


def _access(section: Section) -> Access:
    if section.is_exec:
        return Access.EXECUTE
    return Access.WRITE if section.is_write else Access.READ
