"""An ELF64 little-endian x86-64 file as its headers describe it: sections, contents, symbols, modinfo.

Headers are checked when the file is parsed, so that the rest of the project can index without fear; tables
are read when first asked for.  Source of the rules: System V gABI, chapter 4, and the x86-64 psABI, 4.1.
"""

import os
import stat
from functools import cached_property, lru_cache
from struct import Struct
from typing import Final, Self, cast

from elf.errors import ElfError
from elf.section import (
    SECTION_HEADER,
    SHT_DYNSYM,
    SHT_NOBITS,
    SHT_NULL,
    SHT_RELA,
    SHT_SYMTAB,
    SHT_SYMTAB_SHNDX,
    Section,
    read_sections,
)
from elf.symbols import SHN_XINDEX, Symbol, read_symbols

__all__ = ["ET_DYN", "ET_EXEC", "ET_REL", "Image", "Section", "file_bytes"]

ET_REL: Final = 1
ET_EXEC: Final = 2
ET_DYN: Final = 3

EM_X86_64: Final = 62

_HEADER: Final = Struct("<4sBBBxxxxxxxxxHHIQQQIHHHHHH")


# Files up to this many bytes are parsed once, however often they are opened: modules that come and go.
_REMEMBERED: Final = 1 << 20


def file_bytes(path: str | os.PathLike[str], advice: str) -> tuple[bytes, str]:
    """The bytes of the regular file `path`, and the name messages have for it.

    Raises `ElfError` if it cannot be read or is no regular file; `advice` says what to give instead.
    """
    name = os.fspath(path)
    try:
        # A FIFO would block, and a device may never end.
        if not stat.S_ISREG(os.stat(name).st_mode):
            raise ElfError("not a regular file", where=name, advice=advice)
        with open(name, "rb") as file:
            return file.read(), name
    except OSError as error:
        raise ElfError(f"cannot be read: {error.strerror or error}", where=name) from error
    except (MemoryError, OverflowError, ValueError) as error:
        raise ElfError(f"cannot be read: {error or 'too large'}", where=repr(name)) from error


class Image:
    """One ELF file: `type` is ET_REL, ET_EXEC or ET_DYN, `entry` a virtual address."""

    def __init__(self, data: bytes, path: str) -> None:
        self.path = path
        self._data = data
        self.type, self.entry, table_offset, count, names_index = self._read_header()
        self.sections: tuple[Section, ...] = read_sections(
            data,
            path,
            table_offset=table_offset,
            count=count,
            names_index=names_index,
            relocatable=self.is_relocatable,
        )
        self._symbol_tables: dict[int, tuple[Symbol, ...]] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Read and parse the regular file `path`; `ElfError` if it cannot be read or is no such file."""
        data, name = file_bytes(path, "give the path of an ELF file")
        if cls is Image and len(data) <= _REMEMBERED:
            return cast(Self, _parsed(data, name))
        return cls(data, name)

    @classmethod
    def parse(cls, data: bytes, path: str = "<bytes>") -> Self:
        """Parse `data`, the bytes of a whole file; `path` is the name used in messages."""
        return cls(bytes(data), path)

    @property
    def is_relocatable(self) -> bool:
        """ET_REL: an object or a module, whose sections have no addresses yet."""
        return self.type == ET_REL

    @property
    def is_signed(self) -> bool:
        """A signature is appended to it (MODULE_SIG_STRING of include/linux/module_signature.h)."""
        return self._data.endswith(b"~Module signature appended~\n")

    def section(self, name: str) -> Section | None:
        """The first section called `name`, as the kernel's find_sec() chooses (kernel/module/main.c)."""
        return self._first_by_name.get(name)

    def sections_named(self, name: str) -> list[Section]:
        """All sections called `name`, in file order: objects with section groups repeat names."""
        return [section for section in self.sections if section.name == name]

    def section_by_index(self, index: int, user: str) -> Section:
        """Section number `index`; `user` says in the error who asked for one that does not exist."""
        if not 0 <= index < len(self.sections):
            raise ElfError(
                f"section {index} does not exist, there are {len(self.sections)}", where=self.place(user)
            )
        return self.sections[index]

    def section_at(self, address: int) -> Section | None:
        """The allocated section that covers virtual `address`; None in ET_REL, which has no addresses."""
        for section in self._allocated:
            if section.address <= address < section.address + section.size:
                return section
        return None

    def contents(self, section: Section) -> memoryview:
        """The read-only bytes of `section` in the file: empty for NOBITS, still compressed if compressed."""
        if section.type in (SHT_NULL, SHT_NOBITS):
            return memoryview(b"")
        return memoryview(self._data)[section.offset : section.offset + section.size]

    @cached_property
    def symbols(self) -> tuple[Symbol, ...]:
        """The entries of `.symtab`, or of `.dynsym` if there is none, by symbol index; empty without both."""
        for wanted in (SHT_SYMTAB, SHT_DYNSYM):
            for section in self.sections:
                if section.type == wanted:
                    return self.symbols_of(section)
        return ()

    def symbols_of(self, table: Section) -> tuple[Symbol, ...]:
        """The entries of the symbol table `table`, by symbol index, read once."""
        if table.index not in self._symbol_tables:
            self._symbol_tables[table.index] = tuple(read_symbols(self, table))
        return self._symbol_tables[table.index]

    def extended_indices(self, table: Section) -> memoryview:
        """The SHT_SYMTAB_SHNDX words that belong to `table`, one per symbol; empty if it has none."""
        for section in self.sections:
            if section.type == SHT_SYMTAB_SHNDX and section.link == table.index:
                return self.contents(section).cast("I")
        return memoryview(b"").cast("I")

    def relocation_sections(self, target: Section) -> list[Section]:
        """The SHT_RELA sections that apply to `target`, klp relocation sections included, in file order."""
        return self._relocations_by_target.get(target.index, [])

    @cached_property
    def modinfo(self) -> dict[str, list[str]]:
        """The `key=value` strings of `.modinfo`: the values of each key in file order."""
        values: dict[str, list[str]] = {}
        section = self.section(".modinfo")
        if section is not None:
            for entry in self.contents(section).tobytes().split(b"\0"):
                key, equals, value = entry.decode("utf-8", "backslashreplace").partition("=")
                if equals:
                    values.setdefault(key, []).append(value)
        return values

    def place(self, inside: str) -> str:
        """`path: inside`, the form in which every error names a place in this file."""
        return f"{self.path}: {inside}"

    @cached_property
    def _first_by_name(self) -> dict[str, Section]:
        return {section.name: section for section in reversed(self.sections)}

    @cached_property
    def _allocated(self) -> tuple[Section, ...]:
        return () if self.is_relocatable else tuple(section for section in self.sections if section.is_alloc)

    @cached_property
    def _relocations_by_target(self) -> dict[int, list[Section]]:
        found: dict[int, list[Section]] = {}
        for section in self.sections:
            if section.type == SHT_RELA:
                found.setdefault(section.info, []).append(section)
        return found

    def _read_header(self) -> tuple[int, int, int, int, int]:
        """e_type, e_entry, and the section header table: its file offset, count, index of the names."""
        data = self._data
        where = self.place("ELF header")
        if data[:4] != b"\x7fELF":
            raise ElfError("no ELF magic", where=where, advice="give an x86-64 ELF object, module or kernel")
        if len(data) < _HEADER.size:
            raise ElfError(f"the file ends after {len(data)} of {_HEADER.size} bytes", where=where)
        (_magic, class_, encoding, ident_version, type_, machine, version, entry, _phoff, shoff, _flags,
         _ehsize, _phentsize, _phnum, shentsize, shnum, shstrndx) = _HEADER.unpack_from(data)  # fmt: skip
        for field, found, wanted, meaning in (
            ("EI_CLASS", class_, 2, "ELFCLASS64"),
            ("EI_DATA", encoding, 1, "ELFDATA2LSB"),
            ("EI_VERSION", ident_version, 1, "EV_CURRENT"),
            ("e_version", version, 1, "EV_CURRENT"),
            ("e_machine", machine, EM_X86_64, "EM_X86_64"),
        ):
            if found != wanted:
                raise ElfError(f"{field} is {found}; expected {meaning} ({wanted})", where=where)
        if type_ not in (ET_REL, ET_EXEC, ET_DYN):
            raise ElfError(f"e_type is {type_}; expected ET_REL (1), ET_EXEC (2) or ET_DYN (3)", where=where)
        if shoff == 0 and shnum == 0:
            return type_, entry, 0, 0, 0
        if shentsize != SECTION_HEADER.size:
            raise ElfError(f"e_shentsize is {shentsize}; expected {SECTION_HEADER.size}", where=where)
        if shoff + SECTION_HEADER.size > len(data):
            raise ElfError(f"section headers at {shoff:#x}; the file ends at {len(data):#x}", where=where)
        # gABI: what does not fit e_shnum and e_shstrndx stands in sh_size and sh_link of section 0.
        first = SECTION_HEADER.unpack_from(data, shoff)
        count = shnum or first[5]
        if count == 0 or shoff + count * SECTION_HEADER.size > len(data):
            raise ElfError(
                f"{count} section headers at {shoff:#x}; the file ends at {len(data):#x}", where=where
            )
        return type_, entry, shoff, count, first[6] if shstrndx == SHN_XINDEX else shstrndx


@lru_cache(maxsize=32)
def _parsed(data: bytes, path: str) -> Image:
    """The image of these bytes; nobody changes one."""
    return Image(data, path)
