"""Section headers (gABI chapter 4, "Sections"): read, and checked once against the file and each other."""

from dataclasses import dataclass
from struct import Struct
from typing import Final

from elf.errors import ElfError
from elf.symbols import SYMBOL_BYTES, string_at

__all__ = ["Section", "read_sections"]

SHT_NULL: Final = 0
SHT_SYMTAB: Final = 2
SHT_STRTAB: Final = 3
SHT_RELA: Final = 4
SHT_NOBITS: Final = 8
SHT_REL: Final = 9
SHT_DYNSYM: Final = 11
SHT_SYMTAB_SHNDX: Final = 18

SHF_WRITE: Final = 0x1
SHF_ALLOC: Final = 0x2
SHF_EXECINSTR: Final = 0x4
SHF_COMPRESSED: Final = 0x800
SHF_RELA_LIVEPATCH: Final = 0x00100000  # include/uapi/linux/elf.h

SECTION_HEADER: Final = Struct("<IIQQQQIIQQ")
_ENTRY_BYTES: Final = {SHT_SYMTAB: SYMBOL_BYTES, SHT_DYNSYM: SYMBOL_BYTES, SHT_RELA: 24, SHT_SYMTAB_SHNDX: 4}


@dataclass(frozen=True, slots=True)
class Section:
    """One section header, as `Elf64_Shdr` has it.

    `address` is a virtual address (0 in ET_REL), `offset` a file offset, `size` and `alignment` are bytes;
    `size` of a NOBITS section is only a number and may be larger than the file.
    """

    index: int
    name: str
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int

    @property
    def is_alloc(self) -> bool:
        """Occupies memory while the program runs (SHF_ALLOC)."""
        return bool(self.flags & SHF_ALLOC)

    @property
    def is_exec(self) -> bool:
        """Holds machine instructions (SHF_EXECINSTR)."""
        return bool(self.flags & SHF_EXECINSTR)

    @property
    def is_write(self) -> bool:
        """Is writable while the program runs (SHF_WRITE)."""
        return bool(self.flags & SHF_WRITE)

    @property
    def is_nobits(self) -> bool:
        """Has a size but no bytes in the file (SHT_NOBITS)."""
        return self.type == SHT_NOBITS

    @property
    def is_compressed(self) -> bool:
        """Its bytes in the file are an `Elf64_Chdr` and a compressed stream (SHF_COMPRESSED)."""
        return bool(self.flags & SHF_COMPRESSED)

    @property
    def is_klp_relocation(self) -> bool:
        """Its relocations are applied by livepatch, not by the module loader (SHF_RELA_LIVEPATCH)."""
        return bool(self.flags & SHF_RELA_LIVEPATCH)


def read_sections(
    data: bytes, path: str, *, table_offset: int, count: int, names_index: int, relocatable: bool
) -> tuple[Section, ...]:
    """The `count` section headers at file offset `table_offset`, named from string table `names_index`."""
    end = table_offset + count * SECTION_HEADER.size
    rows = list(SECTION_HEADER.iter_unpack(memoryview(data)[table_offset:end]))
    names = _names(data, path, rows, names_index)
    sections = tuple(Section(i, names[i], *row[1:]) for i, row in enumerate(rows))
    symbol_tables = [section.index for section in sections if section.type == SHT_SYMTAB]
    if len(symbol_tables) > 1:
        raise ElfError(f"sections {symbol_tables} are symbol tables; the gABI allows one", where=path)
    check = _Check(path, len(data), sections, relocatable)
    for section in sections:
        check.bounds(section)
        check.references(section)
    return sections


def _names(data: bytes, path: str, rows: list[tuple[int, ...]], names_index: int) -> list[str]:
    if names_index == 0:
        return [""] * len(rows)
    if names_index >= len(rows) or rows[names_index][1] != SHT_STRTAB:
        raise ElfError(f"e_shstrndx {names_index} is no string table", where=f"{path}: ELF header")
    offset, size = rows[names_index][4:6]
    table = data[offset : offset + size]
    names = []
    for index, row in enumerate(rows):
        name = string_at(table, row[0])
        if name is None:
            raise ElfError(
                f"name at {row[0]:#x} does not end in the string table of {len(table):#x} bytes",
                where=f"{path}: section {index}",
            )
        names.append(name)
    return names


@dataclass(frozen=True, slots=True)
class _Check:
    path: str
    file_size: int
    sections: tuple[Section, ...]
    relocatable: bool

    def bounds(self, section: Section) -> None:
        """Contents inside the file, tables made of whole entries, alignment a power of two."""
        if section.alignment & (section.alignment - 1):
            raise self.error(section, f"alignment {section.alignment:#x} is no power of two")
        if section.type in (SHT_NULL, SHT_NOBITS):
            return
        if section.offset + section.size > self.file_size:
            raise self.error(
                section,
                f"{section.size:#x} bytes at file offset {section.offset:#x}; "
                f"the file ends at {self.file_size:#x}",
            )
        expected = _ENTRY_BYTES.get(section.type)
        if expected and (section.entry_size != expected or section.size % expected):
            raise self.error(
                section,
                f"{section.size:#x} bytes in entries of {section.entry_size}; expected entries of {expected}",
            )

    def references(self, section: Section) -> None:
        """sh_link and sh_info as the gABI's table "sh_link and sh_info Interpretation" has them."""
        if section.type in (SHT_SYMTAB, SHT_DYNSYM):
            self.link(section, SHT_STRTAB)
            if section.info > section.size // SYMBOL_BYTES:
                raise self.error(section, f"sh_info {section.info} is beyond the last symbol")
        elif section.type == SHT_SYMTAB_SHNDX:
            table = self.link(section, SHT_SYMTAB)
            if section.size // 4 != table.size // SYMBOL_BYTES:
                raise self.error(section, f"{section.size // 4} indices do not match '{table.name}'")
        elif section.type == SHT_RELA:
            self.target(section)
            if self.relocatable:
                self.link(section, SHT_SYMTAB)
            elif section.link:  # a table without symbols has none
                self.link(section, SHT_DYNSYM, SHT_SYMTAB)
        elif section.type == SHT_REL and self.target(section).is_alloc:
            raise self.error(section, "REL relocations; x86-64 has RELA only (psABI 4.4)")

    def link(self, section: Section, *types: int) -> Section:
        if section.link >= len(self.sections) or self.sections[section.link].type not in types:
            raise self.error(section, f"sh_link {section.link} is no section of type {types[0]}")
        return self.sections[section.link]

    def target(self, section: Section) -> Section:
        if section.info >= len(self.sections):
            raise self.error(section, f"sh_info {section.info}, but there are {len(self.sections)} sections")
        return self.sections[section.info]

    def error(self, section: Section, what: str) -> ElfError:
        return ElfError(what, where=f"{self.path}: section {section.index} '{section.name}'")
