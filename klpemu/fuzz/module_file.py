"""A module's file as the oracle of answers needs it: its symbols by name, its sites, its klp relocations."""

import bisect
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Final

from elf.errors import ElfError
from elf.image import Image
from elf.klp_sections import KlpRelocation, klp_relocations, klp_sections, section_objname
from elf.mcount import fentry_sites
from elf.relocation import RULES
from elf.section import Section
from elf.symbols import STT_FUNC, Symbol
from klpemu.modprobe import name_of
from patches.livepatch import VMLINUX

__all__ = ["ModuleFile", "is_chosen"]

KEPT: Final = 64  # files, of which one campaign uses a few


def is_chosen(count: int, sympos: int) -> bool:
    """Of so many symbols of a name one is meant: the only one, or the one at that position from 1 on
    (klp_find_object_symbol()).
    """
    return count >= sympos if sympos else count == 1


class ModuleFile:
    """One file; `name` is what the module will be called."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.name = name_of(image)

    @staticmethod
    @lru_cache(KEPT)
    def open(path: Path) -> "ModuleFile":
        """Read a file, once; raises ElfError for one that is no module."""
        return ModuleFile(Image.open(path))

    @staticmethod
    @lru_cache(KEPT)
    def of(image: Image) -> "ModuleFile":
        """The file that was loaded from this image."""
        return ModuleFile(image)

    @cached_property
    def objnames(self) -> frozenset[str]:
        """The objects that it has klp relocations for."""
        return frozenset(section_objname(each.name) for each in klp_sections(self.image))

    def count(self, name: str) -> int:
        """How many symbols of that name kallsyms will have."""
        return len(self._symbols.get(name, ()))

    def has_site(self, name: str, sympos: int) -> bool:
        """The function has a fentry site, wherever in it."""
        symbol = self._symbols[name][max(sympos, 1) - 1]
        starts = self._starts[symbol.section]
        behind = bisect.bisect_right(starts, symbol.value)
        end = starts[behind] if behind < len(starts) else 1 << 64
        sites = self._sites.get(symbol.section, ())
        return any(symbol.value <= each < end for each in sites)

    def resolves(self, objname: str, count: Callable[[str, str], int]) -> bool:
        """All klp relocations for that object have their symbols; `count` says how many there are of an
        object and a name (klp_resolve_symbols()).
        """
        for _, each in self._klp_relocations(objname):
            try:
                wanted = each.name
            except ElfError:
                return False
            if wanted.objname == VMLINUX != objname:
                return False
            if not is_chosen(count(wanted.objname, wanted.name), wanted.sympos):
                return False
        return True

    def targets(self, objname: str) -> Iterator[tuple[int, int, int]]:
        """What the klp relocations for that object write: section, offset in it, bytes."""
        for rela, each in self._klp_relocations(objname):
            if each.type in RULES and RULES[each.type].size:
                yield rela.info, each.offset, RULES[each.type].size

    def _klp_relocations(self, objname: str) -> Iterator[tuple[Section, KlpRelocation]]:
        for rela in klp_sections(self.image):
            if section_objname(rela.name) == objname:
                for each in klp_relocations(self.image, rela):
                    yield rela, each

    @cached_property
    def _symbols(self) -> dict[str, list[Symbol]]:
        """What kallsyms will have, by name, in the order of the symbol table."""
        found: dict[str, list[Symbol]] = {}
        for each in self.image.symbols:
            if not each.name or each.name.startswith(".L") or each.type > STT_FUNC:
                continue
            if 0 < each.section < len(self.image.sections) and self.image.sections[each.section].is_alloc:
                found.setdefault(each.name, []).append(each)
        return found

    @cached_property
    def _starts(self) -> dict[int, list[int]]:
        """By section, where symbols begin: a function is as long as it is to the next one."""
        found: dict[int, set[int]] = {}
        for symbols in self._symbols.values():
            for each in symbols:
                found.setdefault(each.section, set()).add(each.value)
        return {section: sorted(values) for section, values in found.items()}

    @cached_property
    def _sites(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for each in fentry_sites(self.image):
            found.setdefault(each.section, []).append(each.offset)
        return found
