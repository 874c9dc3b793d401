"""Where the sections of an object go in guest memory, and what its symbols are worth there.

Sections are grouped by what they may do (text, read-only data, data) and each group starts on a page, as
layout_sections() of kernel/module/main.c groups them.  What is only needed until a module's init function has
returned lies apart, so that it can be freed.  Per-CPU sections get offsets from the GS base, not addresses.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from elf.errors import ElfError, RelocationError
from elf.image import Image, Section
from elf.relocation import apply_relocations
from elf.symbols import SHN_ABS, SHN_COMMON, SHN_LIVEPATCH, SHN_UNDEF, STT_FUNC, SYMBOL_BYTES, Symbol
from emu.kallsyms import Ksym
from emu.memory import PAGE_SIZE
from emu.paging import Access

__all__ = ["Group", "KlpInfo", "Placement", "Resolver", "is_init_section", "lay_out"]

RO_AFTER_INIT = (".data..ro_after_init", "__jump_table")  # layout_and_allocate()
THIS_MODULE = ".gnu.linkonce.this_module"  # where modpost puts the struct module

# Gives the address of a symbol that the object does not define; raises for one that exists nowhere.
Resolver = Callable[[Symbol], int]


@dataclass(frozen=True, slots=True)
class Group:
    """Sections with the same access, at one run of pages: `start` and `size` in bytes.

    `init`: freed after init.  `ro_after_init`: writable until then.
    """

    access: Access
    start: int
    size: int
    init: bool = False
    ro_after_init: bool = False


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
    """An object laid out: `addresses` maps a section's index to its virtual address or per-CPU offset.

    `base` and `size` are those of the core, `init_base` and `init_size` of what is freed after init (0 if the
    object has nothing of the kind, or if that has happened).
    """

    image: Image
    base: int
    size: int
    addresses: dict[int, int]
    groups: list[Group]
    per_cpu: list[Section]
    contents: dict[int, bytearray] = field(default_factory=dict, repr=False)
    klp: KlpInfo = field(default_factory=KlpInfo, repr=False)
    init_base: int = 0
    init_size: int = 0

    @property
    def is_linked(self) -> bool:
        """The sections lie where the file says, and nothing of it is relocated."""
        return not self.image.is_relocatable

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

    def span(self, *, init: bool, accesses: Iterable[Access] = tuple(Access)) -> int:
        """Bytes from the start of one layout to the end of its last group with one of these accesses."""
        base = self.init_base if init else self.base
        ends = [
            each.start + each.size - base
            for each in self.groups
            if each.init == init and each.access in accesses and not each.ro_after_init
        ]
        return max(ends, default=0)

    def is_init(self, section: int) -> bool:
        """The section is freed after init, or was."""
        return is_init_section(self.image.sections[section].name)

    def forget_init(self) -> None:
        """What is only needed until init has returned is gone."""
        self.groups = [group for group in self.groups if not group.init]
        for index in [index for index in self.addresses if self.is_init(index)]:
            del self.addresses[index]
            self.contents.pop(index, None)
        self.init_base = self.init_size = 0

    def ksyms(self, module: str) -> list[Ksym]:
        """What kallsyms knows of this object: each named symbol in a loaded section, in symbol-table order.

        Assembler labels (`.L`) are left out, as scripts/kallsyms.c and is_mapping_symbol() leave them out.
        """
        found: list[tuple[int, Symbol]] = []
        for symbol in self.image.symbols:
            address = self.addresses.get(symbol.section)
            if address is None or symbol.type > STT_FUNC:
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


def lay_out(
    image: Image,
    base: Callable[[int], int],
    per_cpu: Callable[[int, int], int],
    init_base: Callable[[int], int] | None = None,
) -> Placement:
    """Decide the place of every allocated section.

    `base(size)` gives the page-aligned address of `size` bytes; `per_cpu(size, alignment)` an offset in every
    CPU's area.  With `init_base` the object is a module, and what is freed after init is laid out for itself.
    """
    if not image.is_relocatable:
        raise ElfError("a linked file", where=image.path, advice="load relocatable objects (.o, .ko)")
    is_module = init_base is not None
    core, init, per_cpu_sections = _Layout(), _Layout(is_init=True), []
    for section in image.sections:
        if not section.is_alloc:
            continue
        # Empty sections have a place, too: code may refer to one (`.bss + 0`).
        if section.name.startswith(".data..percpu"):
            if section.size:
                per_cpu_sections.append(section)
        elif is_module and is_init_section(section.name):
            init.add(section, ro_after_init=False)
        else:
            core.add(section, ro_after_init=is_module and section.name in RO_AFTER_INIT)
    for layout in (core, init):
        layout.close()
        if layout is core and is_module and image.section(THIS_MODULE) is not None:
            core.extend(_core_symtab_size(image))
        if layout.size > 1 << 28:
            what = f"sections of {layout.size:#x} bytes in all"
            raise ElfError(what, where=image.path, advice="256 MiB is the limit")
    at = base(core.size) if core.size else 0
    init_at = init_base(init.size) if init_base is not None and init.size else 0
    addresses = {index: at + offset for index, offset in core.offsets.items()}
    addresses |= {index: init_at + offset for index, offset in init.offsets.items()}
    # "..first" really comes first: the compiler finds the stack canary at a fixed place of the area.
    for section in sorted(per_cpu_sections, key=lambda each: not each.name.endswith("..first")):
        addresses[section.index] = per_cpu(section.size, section.alignment)
    groups = [*core.groups_at(at), *init.groups_at(init_at)]
    return Placement(
        image, at, core.size, addresses, groups, per_cpu_sections, init_base=init_at, init_size=init.size
    )


def _core_symtab_size(image: Image) -> int:
    """Bytes of the symbols, names and types that a module keeps: layout_symtab(), with CONFIG_KALLSYMS_ALL.

    A livepatch module keeps all symbols.  Nothing is written there: kallsyms is not in guest memory.
    """
    kept = [
        each
        for each in image.symbols
        if each.index == 0 or "livepatch" in image.modinfo or _is_core_symbol(image, each)
    ]
    return len(kept) * (SYMBOL_BYTES + 1) + sum(len(each.name.encode()) + 1 for each in kept)


def _is_core_symbol(image: Image, symbol: Symbol) -> bool:
    if not symbol.name or not symbol.is_in_section:
        return False
    section = image.sections[symbol.section]
    return section.is_alloc and not is_init_section(section.name)


def is_init_section(name: str) -> bool:
    """module_init_section()."""
    return name.startswith(".init")


class _Layout:
    """One run of sections: those that may be executed, read, read once init is done, written."""

    def __init__(self, *, is_init: bool = False) -> None:
        self._is_init = is_init
        self._kinds: dict[tuple[Access, bool], list[Section]] = {
            (Access.EXECUTE, False): [],
            (Access.READ, False): [],
            (Access.WRITE, True): [],
            (Access.WRITE, False): [],
        }
        self.offsets: dict[int, int] = {}
        self._groups: list[Group] = []
        self.size = 0

    def add(self, section: Section, *, ro_after_init: bool) -> None:
        """The section is part of this layout."""
        kind = (Access.WRITE, True) if ro_after_init else (_access(section), False)
        self._kinds[kind].append(section)

    def close(self) -> None:
        """All sections are there: decide their offsets."""
        for (access, ro_after_init), sections in self._kinds.items():
            start = end = self.size
            for section in sections:
                end = -(-end // max(section.alignment, 1)) * max(section.alignment, 1)
                self.offsets[section.index] = end
                end += section.size
            self.size = -(-end // PAGE_SIZE) * PAGE_SIZE
            if self.size > start:
                group = Group(access, start, self.size - start, self._is_init, ro_after_init)
                self._groups.append(group)

    def extend(self, size: int) -> None:
        """Append so many bytes to the data, which is complete."""
        more = -(-size // PAGE_SIZE) * PAGE_SIZE
        self.size += more
        self._groups[-1] = replace(self._groups[-1], size=self._groups[-1].size + more)

    def groups_at(self, base: int) -> list[Group]:
        """The groups, for a layout that begins at `base`."""
        return [replace(group, start=base + group.start) for group in self._groups]


def _access(section: Section) -> Access:
    if section.is_exec:
        return Access.EXECUTE
    return Access.WRITE if section.is_write else Access.READ
