"""Writing a loaded object as a linked ELF file: symbols and debug information at the addresses they run at.

A fixture kernel and a module are relocatable objects, and where they are is known to their machine only.  The
file says it to debuggers: the kernel's is the vmlinux that goes with a saved core.  Its text and data are
those right after loading, every fentry site a NOP, so that a comparison with a core shows what livepatches
have changed.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final

from elf.errors import ElfError, KlpemuError
from elf.image import ET_EXEC
from elf.output import PF_R, PF_W, PF_X, PT_LOAD, Segment, file_header, note, write_file
from elf.relocation import apply_relocations
from elf.section import (
    SECTION_HEADER,
    SHF_ALLOC,
    SHF_EXECINSTR,
    SHF_WRITE,
    SHT_NOBITS,
    SHT_STRTAB,
    SHT_SYMTAB,
)
from elf.symbols import SHN_ABS, STB_GLOBAL, STB_LOCAL, STT_FUNC, STT_NOTYPE, SYMBOL_BYTES, Symbol
from emu.machine import Machine
from emu.memory import PAGE_SIZE
from emu.module import LoadedObject
from emu.paging import Access
from emu.placement import Group, Placement
from emu.vmlinux import ENTRY_SECTION

__all__ = ["build_id", "save_symbols"]

SHT_PROGBITS: Final = 1
SHT_NOTE: Final = 7
SHF_MERGE_STRINGS: Final = 0x30
NT_GNU_BUILD_ID: Final = 3

# Stands for the section of the entry code, which is in no object.
_ENTRY: Final = -1

_SYMBOL: Final = Struct("<IBBHQQ")
_SEGMENT_FLAGS: Final = {Access.READ: PF_R, Access.WRITE: PF_R | PF_W, Access.EXECUTE: PF_R | PF_X}
_SECTION_FLAGS: Final = SHF_ALLOC | SHF_WRITE | SHF_EXECINSTR | SHF_MERGE_STRINGS


@dataclass(slots=True)
class _Section:
    """A section to be written; `source` is what symbols of the object call it, None if there are none."""

    name: str
    data: bytes
    type: int = SHT_PROGBITS
    flags: int = 0
    address: int = 0
    size: int = 0
    link: int = 0
    info: int = 0
    alignment: int = 1
    entry_size: int = 0
    offset: int = 0
    source: int | None = None


def save_symbols(machine: Machine, path: str | os.PathLike[str], module: str = "") -> None:
    """Write an object of the machine, by default the kernel, as a file that debuggers read symbols from.

    gdb and drgn take the kernel's as the vmlinux of a core from `save_core` (they have the same build ID);
    gdb takes a module's by `add-symbol-file`, without any address.  Raises KlpemuError if there is no such
    module or the file cannot be written.
    """
    loaded = _loaded(machine, module)
    placement = loaded.placement
    groups = [*placement.groups] if module else [*placement.groups, machine.vmlinux.entry]
    sections = [
        _Section("", b"", type=0, alignment=0),
        *_allocated(placement),
        *([] if module else [_entry_code(machine)]),
        *_debug(machine, placement),
        _Section(
            ".note.gnu.build-id",
            note("GNU", NT_GNU_BUILD_ID, build_id(machine, module)),
            type=SHT_NOTE,
            alignment=4,
        ),
    ]
    sections += _symbol_table(sections, _symbols(machine, placement, module))
    sections.append(_Section(".shstrtab", b"", type=SHT_STRTAB))
    sections[-1].data, names = _strings(section.name for section in sections)
    segments, end = _assign_offsets(sections, groups)
    table_at = -(-end // 8) * 8
    header = file_header(
        ET_EXEC,
        segments,
        entry=groups[0].start if groups else 0,  # nothing starts there, but gdb wants it in a section
        section_table=table_at,
        sections=len(sections),
        names=len(sections) - 1,
    )
    table = b"".join(_header(section, name) for section, name in zip(sections, names, strict=True))
    pieces = [(section.offset, section.data) for section in sections if section.data]
    write_file(path, table_at + len(table), [(0, header), *pieces, (table_at, table)])


def build_id(machine: Machine, module: str = "") -> bytes:
    """20 bytes that name an object together with where it was placed."""
    placement = _loaded(machine, module).placement
    digest = hashlib.sha1(usedforsecurity=False)
    for section in placement.image.sections:
        digest.update(section.name.encode())
        digest.update(placement.image.contents(section))
    digest.update(repr(sorted(placement.addresses.items())).encode())
    if not module:
        digest.update(machine.vmlinux.entry_code)
    return digest.digest()


def _loaded(machine: Machine, module: str) -> LoadedObject:
    loaded = machine.modules.objects.get(module)
    if loaded is None:
        there = ", ".join(sorted(filter(None, machine.modules.objects))) or "none"
        raise KlpemuError(f"module '{module}' is not loaded", advice=f"loaded modules: {there}")
    return loaded


def _allocated(placement: Placement) -> Iterator[_Section]:
    """The sections in memory.  Per-CPU ones are without contents: each vCPU has its own copy, in the core."""
    for section in placement.image.sections:
        if section.index not in placement.addresses:
            continue
        without = section.is_nobits or section in placement.per_cpu
        yield _Section(
            section.name,
            b"" if without else bytes(placement.contents[section.index]),
            type=SHT_NOBITS if without else section.type,
            flags=section.flags & _SECTION_FLAGS,
            address=placement.addresses[section.index],
            size=section.size,
            alignment=section.alignment,
            entry_size=section.entry_size,
            source=section.index,
        )


def _entry_code(machine: Machine) -> _Section:
    text = machine.vmlinux.entry_text()
    return _Section(
        ENTRY_SECTION,
        text.contents,
        flags=SHF_ALLOC | SHF_EXECINSTR,
        address=text.address,
        size=len(text.contents),
        alignment=16,
        source=_ENTRY,
    )


def _debug(machine: Machine, placement: Placement) -> Iterator[_Section]:
    """The `.debug_*` sections, relocated: what is in memory by address, each other by offset."""
    image = placement.image
    values = [_value(machine, placement, symbol) for symbol in image.symbols]
    for section in image.sections:
        if section.is_alloc or not section.name.startswith(".debug_"):
            continue
        if section.is_compressed:
            raise ElfError("compressed", where=image.place(section.name), advice="build with -gz=none")
        data = bytearray(image.contents(section))
        for rela in image.relocation_sections(section):
            apply_relocations(image, rela, target=data, target_address=0, symbol_values=values)
        yield _Section(
            section.name,
            bytes(data),
            flags=section.flags & _SECTION_FLAGS,
            alignment=section.alignment,
            entry_size=section.entry_size,
            source=section.index,
        )


def _value(machine: Machine, placement: Placement, symbol: Symbol) -> int | None:
    """The symbol's address; for one in a section that is not in memory its offset there."""
    if not symbol.is_defined:
        if symbol.name in machine.vmlinux.symbols:
            return machine.vmlinux.symbols[symbol.name]
        exports = (each.exports for each in machine.modules.objects.values())
        return next((found[symbol.name].value for found in exports if symbol.name in found), 0)
    value = placement.value(symbol)
    return symbol.value if value is None and symbol.is_in_section else value


def _symbols(machine: Machine, placement: Placement, module: str) -> Iterator[tuple[Symbol, int]]:
    """The defined symbols with their final values, and for the kernel the labels of the entry code."""
    for symbol in placement.image.symbols:
        value = _value(machine, placement, symbol)
        if symbol.is_defined and value is not None:
            yield symbol, value
    if module:
        return
    for label in machine.vmlinux.ksyms():
        if machine.vmlinux.labels.get(label.name) == label.address:
            kind = STT_FUNC if label.is_function else STT_NOTYPE
            yield Symbol(-1, label.name, label.address, label.size, kind, STB_GLOBAL, _ENTRY), label.address


def _symbol_table(sections: Sequence[_Section], symbols: Iterator[tuple[Symbol, int]]) -> list[_Section]:
    """`.symtab` and `.strtab`, which come behind `sections`: the symbols of these sections."""
    index_of = {section.source: index for index, section in enumerate(sections) if section.source is not None}
    index_of[SHN_ABS] = SHN_ABS
    # gABI: the local ones come first, and sh_info says where they end.
    kept = sorted(
        (each for each in symbols if each[0].section in index_of),
        key=lambda each: each[0].binding != STB_LOCAL,
    )
    strings, names = _strings(symbol.name for symbol, _ in kept)
    rows = [bytes(SYMBOL_BYTES)]
    for (symbol, value), name in zip(kept, names, strict=True):
        info = symbol.binding << 4 | symbol.type
        rows.append(_SYMBOL.pack(name, info, 0, index_of[symbol.section], value, symbol.size))
    first_global = 1 + sum(symbol.binding == STB_LOCAL for symbol, _ in kept)
    table = _Section(
        ".symtab",
        b"".join(rows),
        type=SHT_SYMTAB,
        link=len(sections) + 1,
        info=first_global,
        alignment=8,
        entry_size=SYMBOL_BYTES,
    )
    return [table, _Section(".strtab", strings, type=SHT_STRTAB)]


def _strings(texts: Iterable[str]) -> tuple[bytes, list[int]]:
    """A string table, and the offset of each of `texts` in it."""
    table = bytearray(b"\0")
    known = {"": 0}
    offsets = []
    for text in texts:
        if text not in known:
            known[text] = len(table)
            table += text.encode() + b"\0"
        offsets.append(known[text])
    return bytes(table), offsets


def _assign_offsets(sections: Sequence[_Section], groups: Sequence[Group]) -> tuple[list[Segment], int]:
    """Give every section its file offset; returns the segments, one a group, and the last section's end."""
    segments: list[Segment] = []
    end = len(file_header(ET_EXEC, [Segment(PT_LOAD, 0, 0, 0)] * len(groups)))
    for group in groups:
        start = -(-end // PAGE_SIZE) * PAGE_SIZE
        flags = _SEGMENT_FLAGS[group.access]
        segments.append(Segment(PT_LOAD, flags, start, group.size, group.start, 0, PAGE_SIZE))
        for section in sections:
            if section.flags & SHF_ALLOC and group.start <= section.address < group.start + group.size:
                section.offset = start + section.address - group.start
        end = start + group.size
    for section in sections[1:]:
        if not section.offset:
            alignment = max(section.alignment, 1)
            section.offset = -(-end // alignment) * alignment
            end = section.offset + len(section.data)
    return segments, end


def _header(section: _Section, name: int) -> bytes:
    return SECTION_HEADER.pack(
        name,
        section.type,
        section.flags,
        section.address,
        section.offset,
        section.size or len(section.data),
        section.link,
        section.info,
        section.alignment,
        section.entry_size,
    )
