"""DWARF debugging information entries, one after the other in file order.

pyelftools decodes one entry at a time; the way to it is our own.  Its ELFFile knows too few x86-64 relocation
types and allocates whatever size a damaged header claims, and its tree walk follows DW_AT_sibling wherever
that points, so that a damaged file can make it go in circles.  The walk here only moves forward.
Source of the rules: DWARF 5, sections 2.3 and 7.5; gABI, "Section Compression".
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from inspect import signature
from io import BytesIO
from struct import Struct
from typing import Any, Final

from elftools.dwarf.die import DIE
from elftools.dwarf.dwarfinfo import DebugSectionDescriptor, DwarfConfig, DWARFInfo

from elf.errors import ElfError
from elf.image import Image, Section
from elf.relocation import R_X86_64_32, R_X86_64_64, relocations

__all__ = ["DwarfError", "Entry", "entries"]

ELFCOMPRESS_ZLIB: Final = 1
_COMPRESSION_HEADER: Final = Struct("<IIQQ")
# The most that deflate can do is 258 bytes for 2 bits; more is a damaged header.
_MAX_RATIO: Final = 1032

# The sections that the entries of .debug_info point into; a missing one is only missed when it is needed.
_WANTED: Final = ("info", "abbrev", "str", "line_str", "str_offsets", "addr", "loclists", "rnglists")
# No compiler spends more than a handful of attributes on one byte of .debug_info.
_ATTRIBUTES_PER_BYTE: Final = 16
_UNIT_REFERENCES: Final = {f"DW_FORM_ref{size}" for size in ("1", "2", "4", "8", "_udata")}


class DwarfError(Exception):
    """Readable DWARF that says something impossible; never leaves this room."""


@dataclass(slots=True)
class Entry:
    """One debugging information entry; `offset`, and `unit`, where its unit starts, are in .debug_info."""

    offset: int
    tag: Any
    attributes: dict[str, Any]
    unit: int
    children: list["Entry"] = field(default_factory=list)

    @property
    def name(self) -> str:
        """DW_AT_name, empty if there is none."""
        attribute = self.attributes.get("DW_AT_name")
        return attribute.value.decode("utf-8", "backslashreplace") if attribute else ""

    def number(self, attribute: str, default: int = 0) -> int:
        """The constant value of `attribute`; an expression is refused."""
        if attribute not in self.attributes:
            return default
        value = self.attributes[attribute].value
        if not isinstance(value, int):
            raise DwarfError(f"{attribute} of the entry at {self.offset:#x} is no constant")
        return int(value)

    @property
    def type_offset(self) -> int | None:
        """Where DW_AT_type points, as an offset in .debug_info; None stands for void."""
        attribute = self.attributes.get("DW_AT_type")
        if attribute is None:
            return None
        if attribute.form in _UNIT_REFERENCES:
            return int(attribute.raw_value) + self.unit
        if attribute.form == "DW_FORM_ref_addr":
            return int(attribute.raw_value)
        raise DwarfError(f"type reference of form {attribute.form}; build without -fdebug-types-section")


def entries(image: Image) -> Iterator[Entry]:
    """All entries of `.debug_info`, each once, in file order.

    An entry's `children` come after it, so its list of them is complete when the walk has ended.
    """
    info = _dwarf_info(image)
    section = info.debug_info_sec
    budget = _ATTRIBUTES_PER_BYTE * section.size
    for unit in info.iter_CUs():
        position = unit.cu_die_offset
        end = unit.cu_offset + unit.size
        if end > section.size:
            raise DwarfError(f"unit at {unit.cu_offset:#x} ends at {end:#x} of {section.size:#x}")
        unit.get_top_DIE()  # indexed strings need it to be there
        abbreviations = unit.get_abbrev_table()
        parents: list[Entry] = []
        while position < end:
            die = DIE(unit, section.stream, position)
            position += die.size
            if die.tag is None:
                if parents:
                    parents.pop()
                continue
            budget -= len(abbreviations.get_abbrev(die.abbrev_code)["attr_spec"])
            if budget < 0:
                raise DwarfError("more attributes than .debug_info can hold")
            entry = Entry(die.offset, die.tag, die.attributes, unit.cu_offset)
            if parents:
                parents[-1].children.append(entry)
            yield entry
            if die.has_children:
                parents.append(entry)


def _dwarf_info(image: Image) -> Any:
    """The pyelftools DWARFInfo of `image`; `ElfError` if it has no `.debug_info` and `.debug_abbrev`."""
    sections: dict[str, Any] = dict.fromkeys(
        name for name in signature(DWARFInfo).parameters if name.endswith("_sec")
    )
    for name in _WANTED:
        section = image.section(f".debug_{name}")
        if section is not None and len(image.contents(section)):
            data = _prepared(image, section)
            sections[f"debug_{name}_sec"] = DebugSectionDescriptor(
                BytesIO(data), section.name, section.offset, len(data), section.address
            )
    if not sections["debug_info_sec"] or not sections["debug_abbrev_sec"]:
        raise ElfError("no DWARF", where=image.path, advice="build with -g and do not strip")
    config = DwarfConfig(little_endian=True, machine_arch="x64", default_address_size=8)
    return DWARFInfo(config=config, **sections)


def _prepared(image: Image, section: Section) -> bytes:
    data = bytearray(_decompressed(image, section))
    for rela in image.relocation_sections(section) if image.is_relocatable else ():
        symbols = image.symbols_of(image.section_by_index(rela.link, rela.name))
        for offset, kind, index, addend in relocations(image, rela):
            # The others (of thread-local variables) stand in expressions, which no layout needs.
            size = {R_X86_64_32: 4, R_X86_64_64: 8}.get(kind)
            if size is None:
                continue
            if index >= len(symbols) or offset + size > len(data):
                raise ElfError(
                    "relocation outside the section", where=image.place(f"{section.name}+{offset:#x}")
                )
            value = (symbols[index].value + addend) % 2 ** (8 * size)
            data[offset : offset + size] = value.to_bytes(size, "little")
    return bytes(data)


def _decompressed(image: Image, section: Section) -> bytes:
    contents = image.contents(section)
    if not section.is_compressed:
        return contents.tobytes()
    where = image.place(section.name)
    if len(contents) < _COMPRESSION_HEADER.size:
        raise ElfError(f"{len(contents)} bytes are no compressed section", where=where)
    kind, _reserved, size, _alignment = _COMPRESSION_HEADER.unpack_from(contents)
    stream = contents[_COMPRESSION_HEADER.size :]
    if kind != ELFCOMPRESS_ZLIB:
        raise ElfError(f"compression type {kind}; expected ELFCOMPRESS_ZLIB (1)", where=where)
    if not 0 < size <= _MAX_RATIO * len(stream):
        raise ElfError(f"{size:#x} bytes from {len(stream):#x} compressed ones", where=where)
    try:
        data = zlib.decompressobj().decompress(stream, size)
    except zlib.error as error:
        raise ElfError(f"cannot be decompressed: {error}", where=where) from error
    if len(data) != size:
        raise ElfError(f"{len(data):#x} bytes after decompression, {size:#x} announced", where=where)
    return data
