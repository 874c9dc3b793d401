"""The klp relocations of a livepatch module's file: sections `.klp.rela.*`, symbols `.klp.sym.*`.

Source of the format: Documentation/livepatch/module-elf-format.rst.  Which names are well formed is decided
as the kernel decides it, by what its sscanf() formats match (klp_apply_section_relocs() and
klp_resolve_symbols() of kernel/livepatch/core.c): what stands behind a match does not matter there.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Self

from elf.errors import ElfError, RelocationError
from elf.image import Image
from elf.relocation import relocations, type_name
from elf.section import SHT_RELA, Section
from elf.symbols import SHN_LIVEPATCH, Symbol

__all__ = ["KlpRelocation", "KlpSymbolName", "klp_relocations", "klp_sections", "section_objname"]

# ".klp.rela.%55[^.]" and ".klp.sym.%55[^.].%511[^,],%lu": MODULE_NAME_LEN is 56 bytes, KSYM_NAME_LEN 512.
_SECTION: Final = re.compile(r"\.klp\.rela\.([^.]{1,55})")
_SYMBOL: Final = re.compile(r"\.klp\.sym\.([^.]{1,55})\.([^,]{1,511}),[ \t\n\v\f\r]*([0-9]+)")


@dataclass(frozen=True, slots=True)
class KlpSymbolName:
    """`.klp.sym.<objname>.<name>,<sympos>`: the symbol called `name` in `objname`, a module or "vmlinux".

    `sympos` chooses among several of that name, counted from 1; 0 says that the name is unique.
    """

    objname: str
    name: str
    sympos: int

    @classmethod
    def parse(cls, name: str) -> Self:
        """The parts of a livepatch symbol's name; `ElfError` with the kernel's message if it is malformed."""
        found = _SYMBOL.match(name)
        if found is None:
            raise ElfError(
                f"symbol {name} has an incorrectly formatted name",
                advice="write .klp.sym.<object>.<name>,<sympos>",
            )
        return cls(found[1], found[2], int(found[3]) % 2**64)

    def __str__(self) -> str:
        return f"{self.objname}:{self.name},{self.sympos}"


@dataclass(frozen=True, slots=True)
class KlpRelocation:
    """One entry of a klp relocation section.

    `offset` is in bytes from the start of the section that is relocated, `type` the psABI's number, `addend`
    is signed.
    """

    offset: int
    type: int
    symbol: Symbol
    addend: int

    @property
    def name(self) -> KlpSymbolName:
        """What the symbol's name says; `ElfError` with the kernel's message if it is no livepatch symbol."""
        if self.symbol.section != SHN_LIVEPATCH:
            raise ElfError(
                f"symbol {self.symbol.name} is not marked as a livepatch symbol",
                advice=f"its st_shndx must be SHN_LIVEPATCH, {SHN_LIVEPATCH:#x}",
            )
        return KlpSymbolName.parse(self.symbol.name)


def section_objname(name: str) -> str:
    """The object in a section's name `.klp.rela.<objname>.<section>`: a module, or "vmlinux".

    The relocations are applied when that object is there.  Raises `ElfError` with the kernel's message for a
    malformed name.  The kernel reads no more than 55 bytes of the object's name, and does not look at what
    follows it.
    """
    found = _SECTION.match(name)
    if found is None:
        raise ElfError(
            f"section {name} has an incorrectly formatted name",
            advice="write .klp.rela.<object>.<section>",
        )
    return found[1]


def klp_sections(image: Image) -> Iterator[Section]:
    """The sections with SHF_RELA_LIVEPATCH in file order; `ElfError` for one that is no SHT_RELA.

    The kernel takes the flag's word for it and reads any contents as `Elf64_Rela`.
    """
    for section in image.sections:
        if section.is_klp_relocation:
            if section.type != SHT_RELA:
                raise ElfError(
                    f"SHF_RELA_LIVEPATCH on a section of type {section.type}",
                    where=image.place(section.name),
                    advice="klp relocations are SHT_RELA",
                )
            yield section


def klp_relocations(image: Image, rela: Section) -> Iterator[KlpRelocation]:
    """The entries of a klp relocation section in file order.

    Raises `RelocationError` at one whose symbol does not exist; the kernel would read whatever lies behind
    its symbol table.
    """
    symbols = image.symbols_of(image.section_by_index(rela.link, rela.name))
    for offset, kind, index, addend in relocations(image, rela):
        if index >= len(symbols):
            raise RelocationError(
                f"symbol {index} does not exist, there are {len(symbols)}",
                where=image.place(f"{rela.name}: {type_name(kind)} at {offset:#x}"),
            )
        yield KlpRelocation(offset, kind, symbols[index], addend)
