"""Symbol table entries (gABI "Symbol Table") and the kernel's rule for choosing among symbols of one name."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING, Final

from elf.errors import ElfError, SymbolError

if TYPE_CHECKING:
    from elf.image import Image, Section

__all__ = [
    "SHN_ABS",
    "SHN_COMMON",
    "SHN_LIVEPATCH",
    "SHN_UNDEF",
    "STB_GLOBAL",
    "STB_LOCAL",
    "STB_WEAK",
    "STT_FUNC",
    "STT_NOTYPE",
    "STT_OBJECT",
    "STT_SECTION",
    "SYMBOL_BYTES",
    "Symbol",
    "read_symbols",
    "select",
    "string_at",
]

SHN_UNDEF: Final = 0
SHN_LORESERVE: Final = 0xFF00
SHN_LIVEPATCH: Final = 0xFF20  # include/uapi/linux/elf.h
SHN_ABS: Final = 0xFFF1
SHN_COMMON: Final = 0xFFF2
SHN_XINDEX: Final = 0xFFFF

STB_LOCAL: Final = 0
STB_GLOBAL: Final = 1
STB_WEAK: Final = 2

STT_NOTYPE: Final = 0
STT_OBJECT: Final = 1
STT_FUNC: Final = 2
STT_SECTION: Final = 3

SYMBOL_BYTES: Final = 24
_SYMBOL: Final = Struct("<IBBHQQ")


@dataclass(frozen=True, slots=True)
class Symbol:
    """One `Elf64_Sym`.

    `value` is an offset in its section in ET_REL, a virtual address in linked images; `size` is bytes.
    `section` is the section index after SHN_XINDEX has been resolved, or SHN_UNDEF, SHN_ABS, SHN_COMMON,
    SHN_LIVEPATCH or another reserved number as the file has it.
    """

    index: int
    name: str
    value: int
    size: int
    type: int
    binding: int
    section: int

    @property
    def is_defined(self) -> bool:
        """Not SHN_UNDEF; SHN_LIVEPATCH counts as defined, although livepatch finds its value later."""
        return self.section != SHN_UNDEF

    @property
    def is_function(self) -> bool:
        """STT_FUNC."""
        return self.type == STT_FUNC

    @property
    def is_in_section(self) -> bool:
        """Defined in a section of this file, so that `section` is a section's index."""
        return self.section != SHN_UNDEF and not SHN_LORESERVE <= self.section <= SHN_XINDEX


def string_at(table: bytes, offset: int) -> str | None:
    """The string at `offset` bytes into a string table; None if it does not end there (gABI "String Table").

    Names are bytes in ELF: what is no UTF-8 is escaped, so that it can always be printed.
    """
    end = table.find(b"\0", offset)
    return None if end < 0 else table[offset:end].decode("utf-8", "backslashreplace")


def read_symbols(image: "Image", table: "Section") -> Iterator[Symbol]:
    """The entries of `table` (SHT_SYMTAB or SHT_DYNSYM) in order, the null symbol first."""
    strings = image.contents(image.section_by_index(table.link, table.name)).tobytes()
    extended = image.extended_indices(table)
    count = len(image.sections)
    rows = _SYMBOL.iter_unpack(image.contents(table))
    for index, (name_offset, info, _other, section, value, size) in enumerate(rows):
        name = string_at(strings, name_offset)
        if name is None:
            raise ElfError(
                f"name at {name_offset:#x} does not end in its string table of {len(strings):#x} bytes",
                where=image.place(f"symbol {index} of '{table.name}'"),
            )
        if section >= SHN_LORESERVE:
            if section == SHN_XINDEX:
                section = _extended_index(image, table, extended, index)
        elif section >= count:
            raise ElfError(
                f"section {section}, but there are {count}",
                where=image.place(f"symbol {index} of '{table.name}'"),
            )
        yield Symbol(index, name, value, size, info & 0xF, info >> 4, section)


def _extended_index(image: "Image", table: "Section", extended: memoryview, index: int) -> int:
    where = image.place(f"symbol {index} of '{table.name}'")
    if index >= len(extended):
        raise ElfError("SHN_XINDEX without an SHT_SYMTAB_SHNDX section", where=where)
    section: int = extended[index]
    if section >= len(image.sections):
        raise ElfError(f"section {section}, but there are {len(image.sections)}", where=where)
    if SHN_LORESERVE <= section <= SHN_XINDEX:
        # gABI allows it, but `Symbol.section` could then not be told from SHN_ABS and its like.
        raise ElfError(
            f"section {section} has the number of a reserved index",
            where=where,
            advice="link with fewer sections",
        )
    return section


def select(name: str, addresses: Sequence[int], sympos: int, objname: str | None) -> int:
    """Choose the address that a livepatch means by `name` and `sympos`; addresses are guest virtual.

    `addresses` are those of all symbols called `name` in `objname` (None or "vmlinux": the kernel itself), in
    address order for vmlinux and in symbol-table order for a module.  `sympos` counts from 1; 0 says that the
    name is unique.  The rule and the three messages of `SymbolError.what` are those of
    klp_find_object_symbol() and klp_find_callback() (kernel/livepatch/core.c), where the address 0 counts as
    not found and vmlinux is a NULL objname.
    """
    module = None if objname == "vmlinux" else objname
    # klp_find_callback() stops at the position asked for, or at the second symbol if none was.
    last = sympos or 2
    seen = addresses[:last]
    if not seen or seen[-1] == 0:
        raise SymbolError(f"symbol '{name}' not found in symbol table")
    if sympos == 0 and len(seen) > 1:
        raise SymbolError(f"unresolvable ambiguity for symbol '{name}' in object '{module or '(null)'}'")
    if sympos and len(seen) != sympos:
        raise SymbolError(
            f"symbol position {sympos} for symbol '{name}' in object '{module or 'vmlinux'}' not found"
        )
    return seen[-1]
