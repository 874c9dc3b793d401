"""Fentry sites: where `__mcount_loc` says that ftrace may rewrite five bytes, and what stands there.

The table is the one that ftrace_process_locs() (kernel/trace/ftrace.c) reads: one 8-byte address a site.
gcc's -mrecord-mcount writes it.  `__patchable_function_entries` has the same form; on x86 it is padding only.
"""

import enum
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final

from elf.errors import ElfError
from elf.image import ET_DYN, Image, Section
from elf.kernel_symbols import KernelSymbols
from elf.relocation import (
    R_X86_64_64,
    R_X86_64_PC32,
    R_X86_64_PLT32,
    R_X86_64_RELATIVE,
    RELA,
    relocations,
    type_name,
)
from elf.section import SHT_RELA
from elf.symbols import Symbol

__all__ = ["Site", "SiteKind", "fentry_sites", "function_names", "functions_at", "patchable_sites"]

SITE_BYTES: Final = 5
NOP5: Final = bytes.fromhex("0f1f440000")
CALL_OPCODE: Final = 0xE8
SINGLE_NOPS: Final = b"\x90" * SITE_BYTES

_ADDRESS: Final = Struct("<Q")
_FENTRY: Final = "__fentry__"
_BOUNDS: Final = ("__start_mcount_loc", "__stop_mcount_loc")


class SiteKind(enum.Enum):
    """What the bytes of a site are; the value is what people are shown."""

    CALL = "call __fentry__"
    NOP5 = "nop5"
    OTHER = "other"
    PADDING = "padding"


@dataclass(frozen=True, slots=True)
class Site:
    """One entry of a site table.

    `section` is the index of the section that holds the code and `offset` the place in it; `address` is the
    same section offset in ET_REL, a virtual address otherwise.  `code` is the five bytes at the site as the
    file has them (fewer only for padding at the end of a section).  `reason` says why ftrace must refuse a
    site of kind OTHER, and is empty for every other kind.
    """

    section: int
    offset: int
    address: int
    code: bytes
    kind: SiteKind
    reason: str = ""


def fentry_sites(image: Image, symbols: KernelSymbols | None = None) -> list[Site]:
    """The sites of `__mcount_loc` in table order; an image without that table has none.

    `symbols` are those of a stripped kernel image, which cannot say itself where the table and `__fentry__`
    are.
    """
    known = _known_addresses(image, symbols)
    places = list(_places(image, _tables(image, "__mcount_loc", known)))
    classify = _Classifier(image, {section.index for section, _ in places}, known[_FENTRY])
    sites = []
    for section, offset in places:
        code = image.contents(section)[offset : offset + SITE_BYTES].tobytes()
        if offset + SITE_BYTES > section.size or len(code) < SITE_BYTES:
            raise ElfError(
                f"fentry site at +{offset:#x} of a section of {section.size:#x} bytes",
                where=image.place(f"__mcount_loc -> {section.name}"),
            )
        kind, reason = classify.kind_of(section, offset, code)
        sites.append(Site(section.index, offset, section.address + offset, code, kind, reason))
    return sites


def patchable_sites(image: Image) -> list[Site]:
    """The entries of all `__patchable_function_entries` sections in file order, each of kind PADDING."""
    sites = []
    for section, offset in _places(image, _tables(image, "__patchable_function_entries")):
        code = image.contents(section)[offset : offset + SITE_BYTES].tobytes()
        if not code:
            raise ElfError(
                f"patchable entry at +{offset:#x} of a section of {section.size:#x} bytes",
                where=image.place(f"__patchable_function_entries -> {section.name}"),
            )
        sites.append(Site(section.index, offset, section.address + offset, code, SiteKind.PADDING))
    return sites


def functions_at(image: Image, sites: Iterable[Site]) -> list[tuple[Symbol, ...]]:
    """For each site the STT_FUNC symbols whose bytes cover it, by address; aliases give several, or none.

    `site.address - symbol.value` is the site's offset in that function.  A function of size 0 reaches to the
    next function of its section, as in kallsyms, which knows no sizes.
    """
    sites = list(sites)
    functions: dict[int, list[Symbol]] = {}
    addresses: dict[int, set[int]] = {}
    for symbol in image.symbols:
        if symbol.is_function and symbol.is_in_section:
            functions.setdefault(symbol.section, []).append(symbol)
    for site in sites:
        addresses.setdefault(site.section, set()).add(site.address)
    covering = {
        section: dict(_sweep(sorted(wanted), functions.get(section, [])))
        for section, wanted in addresses.items()
    }
    return [covering[site.section][site.address] for site in sites]


def function_names(image: Image, sites: Sequence[Site]) -> list[tuple[str, ...]]:
    """For each site the names of the functions that cover it, in the order of `functions_at`."""
    return [tuple(symbol.name for symbol in covering) for covering in functions_at(image, sites)]


def _sweep(addresses: list[int], symbols: list[Symbol]) -> Iterator[tuple[int, tuple[Symbol, ...]]]:
    """For each of the sorted `addresses` those `symbols`, all of one section, that cover it."""
    symbols = sorted(symbols, key=lambda symbol: symbol.value)
    starts = [symbol.value for symbol in symbols]
    begun, entered = 0, list[tuple[int, Symbol]]()
    for address in addresses:
        while begun < len(symbols) and starts[begun] <= address:
            symbol = symbols[begun]
            begun += 1
            size = (
                symbol.size or starts[min(bisect_right(starts, symbol.value), len(starts) - 1)] - symbol.value
            )
            entered.append((symbol.value + size, symbol))
        entered = [(end, symbol) for end, symbol in entered if end > address]
        yield address, tuple(symbol for _, symbol in entered)


class _Classifier:
    """Decides the kind of a site; knows what the relocations and `__fentry__` of its image say."""

    def __init__(self, image: Image, code_sections: set[int], fentry_addresses: set[int]) -> None:
        self.image = image
        self.fentry_addresses = fentry_addresses
        self.calls: dict[int, set[int]] = {}
        if image.is_relocatable:
            fentry = [symbol for symbol in image.symbols if symbol.name == _FENTRY]
            infos = {
                symbol.index << 32 | kind for symbol in fentry for kind in (R_X86_64_PC32, R_X86_64_PLT32)
            }
            for index in code_sections:
                self.calls[index] = set(_offsets_of(image, image.sections[index], infos, -4))
        self.relocated: dict[int, dict[int, tuple[int, int, int]]] = {}

    def kind_of(self, section: Section, offset: int, code: bytes) -> tuple[SiteKind, str]:
        if code == NOP5:
            reason = self.relocation_inside(section, offset)
            return (SiteKind.OTHER, reason) if reason else (SiteKind.NOP5, "")
        if code == SINGLE_NOPS:
            return (
                SiteKind.OTHER,
                "five single-byte NOPs: a task can be preempted between them, so replacing them as one "
                "instruction is not safe",
            )
        if code[0] != CALL_OPCODE:
            return SiteKind.OTHER, f"{code.hex(' ')} is neither call __fentry__ nor a five-byte NOP"
        if self.image.is_relocatable:
            if offset + 1 in self.calls[section.index]:
                return SiteKind.CALL, ""
            return SiteKind.OTHER, self.relocation_inside(section, offset) or "the call has no relocation"
        if not self.fentry_addresses:
            return SiteKind.OTHER, "a call, but the file has no symbol __fentry__ to compare with"
        address = section.address + offset
        callee = (address + SITE_BYTES + int.from_bytes(code[1:], "little", signed=True)) % 2**64
        if callee in self.fentry_addresses:
            return SiteKind.CALL, ""
        return SiteKind.OTHER, f"calls {callee:#x}, which is not __fentry__"

    def relocation_inside(self, section: Section, offset: int) -> str:
        """Say what is relocated within the five bytes, or the empty string."""
        if not self.image.is_relocatable:
            return ""
        if section.index not in self.relocated:
            self.relocated[section.index] = {
                entry[0]: entry[1:]
                for rela in self.image.relocation_sections(section)
                for entry in relocations(self.image, rela)
            }
        for place in range(offset, offset + SITE_BYTES):
            if place in self.relocated[section.index]:
                kind, index, addend = self.relocated[section.index][place]
                symbols = self.image.symbols
                name = symbols[index].name if index < len(symbols) else f"symbol {index}"
                return f"relocated by {type_name(kind)} against '{name}' {addend:+d}"
        return ""


def _offsets_of(image: Image, section: Section, infos: set[int], wanted: int) -> Iterator[int]:
    for rela in image.relocation_sections(section):
        for offset, info, addend in RELA.iter_unpack(image.contents(rela)):
            if info in infos and addend == wanted:
                yield offset


def _known_addresses(image: Image, symbols: KernelSymbols | None) -> dict[str, set[int]]:
    """The addresses of `__fentry__` and of the bounds of vmlinux's table; empty for what is not there."""
    names = (_FENTRY, *_BOUNDS)
    if symbols is not None:
        return {name: set(symbols.addresses_of(name)) for name in names}
    known: dict[str, set[int]] = {name: set() for name in names}
    for symbol in image.symbols:
        if symbol.name in known and symbol.is_defined:
            known[symbol.name].add(symbol.value)
    return known


def _tables(
    image: Image, name: str, known: Mapping[str, set[int]] | None = None
) -> list[tuple[Section, int, int]]:
    """The pieces of a site table: a section and the range of it, in bytes from its start."""
    sections = [section for section in image.sections_named(name) if len(image.contents(section))]
    if sections or known is None:
        return [(section, 0, section.size) for section in sections]
    # vmlinux keeps the table inside .init.data, between two symbols of its linker script.
    start, stop = (max(known[bound], default=0) for bound in _BOUNDS)
    if image.is_relocatable or not 0 < start < stop:
        return []
    holder = image.section_at(start)
    if holder is None or stop - holder.address > len(image.contents(holder)):
        raise ElfError(f"{start:#x} to {stop:#x} is in no section", where=image.place(" to ".join(_BOUNDS)))
    return [(holder, start - holder.address, stop - holder.address)]


def _places(image: Image, tables: list[tuple[Section, int, int]]) -> Iterator[tuple[Section, int]]:
    """The section and section offset that each entry of the site tables names, in table order.

    As in ftrace_process_locs(), NULL entries are skipped: linkers pad tables with them.
    """
    for table, start, stop in tables:
        where = image.place(table.name)
        if (stop - start) % _ADDRESS.size:
            raise ElfError(f"{stop - start:#x} bytes are no table of addresses", where=where)
        written = _relocated_entries(image, table) if image.is_relocatable else _dynamic_entries(image, table)
        words = _ADDRESS.iter_unpack(image.contents(table)[start:stop])
        for offset, (address,) in zip(range(start, stop, _ADDRESS.size), words, strict=True):
            if offset in written:
                yield written[offset]
            elif address:
                yield _entry_at(image, f"entry +{offset:#x}", address, where)


def _entry_at(image: Image, entry: str, address: int, where: str) -> tuple[Section, int]:
    section = image.section_at(address)
    if section is None:
        hint = "has no relocation" if image.is_relocatable else "is in no section"
        raise ElfError(f"{entry} is {address:#x}, which {hint}", where=where)
    return section, address - section.address


def _relocated_entries(image: Image, table: Section) -> dict[int, tuple[Section, int]]:
    """What the relocations of an ET_REL `table` put into its entries, by offset in the table."""
    found: dict[int, tuple[Section, int]] = {}
    for rela in image.relocation_sections(table):
        for offset, kind, index, addend in relocations(image, rela):
            where = image.place(f"{table.name}+{offset:#x}")
            if kind != R_X86_64_64 or offset % _ADDRESS.size or offset >= table.size:
                raise ElfError(f"{type_name(kind)} here; expected R_X86_64_64, one an entry", where=where)
            if index >= len(image.symbols):
                raise ElfError(f"symbol {index} does not exist, there are {len(image.symbols)}", where=where)
            symbol = image.symbols[index]
            place = symbol.value + addend
            if not symbol.is_in_section or place < 0:
                raise ElfError(f"'{symbol.name}' {addend:+#x} is in no section", where=where)
            found[offset] = image.sections[symbol.section], place
    return found


def _dynamic_entries(image: Image, table: Section) -> dict[int, tuple[Section, int]]:
    """What the dynamic relocations of an ET_DYN `table` put into its entries, by offset in the table.

    With RELR relocations the addresses already stand in the table, and nothing is returned for them.
    """
    found: dict[int, tuple[Section, int]] = {}
    if image.type != ET_DYN:
        return found
    for rela in image.sections:
        if rela.type != SHT_RELA or not rela.is_alloc:
            continue
        for address, kind, index, addend in relocations(image, rela):
            offset = address - table.address
            if not 0 <= offset < table.size or kind not in (R_X86_64_RELATIVE, R_X86_64_64):
                continue
            value = addend
            if kind == R_X86_64_64 and rela.link:
                symbols = image.symbols_of(image.sections[rela.link])
                value += symbols[index].value if index < len(symbols) else 0
            where = image.place(table.name)
            found[offset] = _entry_at(image, f"entry +{offset:#x}", value % 2**64, where)
    return found
