"""The symbols of a kernel: names, type characters as nm(1) has them, guest virtual addresses.

They come from the kernel's own tables (elf/kallsyms_table.py), from the symbol table of an ELF vmlinux, or
from a System.map.  All three are sorted by address, as kallsyms is.
"""

import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Final, NamedTuple, Self

from elf.errors import ElfError, SymbolError
from elf.image import Image, file_bytes
from elf.symbols import SHN_ABS, STB_GLOBAL, STB_WEAK, STT_OBJECT, STT_SECTION, Symbol

__all__ = ["KernelSymbol", "KernelSymbols", "elf_symbols", "kernel_table", "read_system_map"]

_STT_FILE: Final = 4


class KernelSymbol(NamedTuple):
    """One symbol; `type` is nm's character: t for text, d for data, upper case for global, ..."""

    name: str
    type: str
    address: int


class KernelSymbols:
    """All symbols of one kernel, in table order, which is by address.

    `names`, `types` (a string, one character a symbol) and `addresses` are the columns.  A name may stand
    there more than once.
    """

    def __init__(self, names: Sequence[str], types: str, addresses: Sequence[int]) -> None:
        self.names = names
        self.types = types
        self.addresses = addresses

    @classmethod
    def sorted(cls, symbols: Iterable[tuple[str, str, int]]) -> Self:
        """Of symbols in any order; those of one address stay in the order in which they come."""
        rows = sorted(symbols, key=lambda row: row[2])
        return cls(
            [row[0] for row in rows], "".join(row[1] for row in rows), array("Q", [row[2] for row in rows])
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> KernelSymbol:
        return KernelSymbol(self.names[index], self.types[index], self.addresses[index])

    def __iter__(self) -> Iterator[KernelSymbol]:
        return map(KernelSymbol, self.names, self.types, self.addresses)

    def __contains__(self, name: object) -> bool:
        """Whether there is a symbol called `name`."""
        return name in self._first

    def addresses_of(self, name: str) -> list[int]:
        """The guest virtual addresses of all symbols called `name`, ascending; empty if there is none."""
        if name in self._repeated:
            return [self.addresses[index] for index in self._repeated[name]]
        return [self.addresses[self._first[name]]] if name in self._first else []

    def address_of(self, name: str) -> int:
        """The address of `name`; with more than one that of the first, as kallsyms_lookup_name() does.

        Raises `SymbolError` if there is none.
        """
        index = self._first.get(name)
        if index is None:
            raise SymbolError(f"symbol '{name}' not found in the kernel's symbol table")
        return self.addresses[index]

    def at(self, address: int) -> KernelSymbol | None:
        """The symbol that covers `address`: the first of those at the nearest address not above it.

        That is what kallsyms_lookup() says, save that nothing ends before the next symbol begins.
        """
        index = bisect_right(self.addresses, address) - 1
        if index < 0:
            return None
        nearest = self.addresses[index]
        while index and self.addresses[index - 1] == nearest:
            index -= 1
        return KernelSymbol(self.names[index], self.types[index], nearest)

    def end_of(self, address: int) -> int:
        """The first address above `address` at which another symbol begins; `address` itself after the last.

        Tables like kallsyms keep no sizes: a symbol reaches up to there (get_symbol_pos()).
        """
        index = bisect_right(self.addresses, address)
        return self.addresses[index] if index < len(self.addresses) else address

    @cached_property
    def _first(self) -> dict[str, int]:
        return dict(zip(reversed(self.names), range(len(self.names) - 1, -1, -1), strict=True))

    @cached_property
    def _repeated(self) -> dict[str, list[int]]:
        last = dict(zip(self.names, range(len(self.names)), strict=True))
        places: dict[str, list[int]] = {
            name: [] for name, index in self._first.items() if last[name] != index
        }
        for index, name in enumerate(self.names):
            if name in places:
                places[name].append(index)
        return places


def elf_symbols(image: Image) -> KernelSymbols:
    """The symbols of an ELF vmlinux that has a symbol table; `ElfError` if it has none."""
    rows = [
        (symbol.name, _type_character(image, symbol), symbol.value)
        for symbol in image.symbols
        if symbol.name and symbol.type not in (STT_SECTION, _STT_FILE) and symbol.is_defined
    ]
    if not rows:
        raise ElfError(
            "no symbol table",
            where=image.path,
            advice="give the vmlinux that is not stripped, or a System.map",
        )
    return KernelSymbols.sorted(rows)


def _type_character(image: Image, symbol: Symbol) -> str:
    """What nm shows: weak before everything else, then absolute, then by the flags of the section."""
    if symbol.binding == STB_WEAK:
        return "V" if symbol.type == STT_OBJECT else "W"
    if symbol.section == SHN_ABS or not symbol.is_in_section:
        character = "a"
    else:
        section = image.sections[symbol.section]
        if section.is_exec:
            character = "t"
        elif section.is_nobits:
            character = "b"
        else:
            character = "d" if section.is_write else "r"
    return character.upper() if symbol.binding == STB_GLOBAL else character


def kernel_table(
    image: Image, symbols: KernelSymbols | None, name: str, bounds: tuple[str, str]
) -> tuple[bytes, int] | None:
    """The contents and the address of a table of the linked kernel `image`; None if it has no such table.

    That is its section `name`, or what stands between two symbols of the linker script.  Raises `ElfError` if
    there is nothing between these.
    """
    section = image.section(name)
    if section is not None:
        return image.contents(section).tobytes(), section.address
    if symbols is None or not all(bound in symbols for bound in bounds):
        return None
    start, stop = map(symbols.address_of, bounds)
    holder = image.section_at(start)
    if start > stop or holder is None or stop - holder.address > len(image.contents(holder)):
        raise ElfError(f"{start:#x} to {stop:#x} is in no section", where=image.place(" to ".join(bounds)))
    return image.contents(holder)[start - holder.address : stop - holder.address].tobytes(), start


_MAP_LINE: Final = re.compile(rb"([0-9a-fA-F]{8,16}) (\S) (\S+)(\t\[\S+\])?")


def read_system_map(path: str | os.PathLike[str]) -> KernelSymbols:
    """The symbols in a System.map, or in a copy of /proc/kallsyms made by root.

    Raises `ElfError` naming the line that is none of a System.map's.  Debian's packages put only a text into
    theirs that says where the real one is.
    """
    data, name = file_bytes(path, "give a System.map")
    rows = []
    for number, line in enumerate(data.splitlines(), 1):
        found = _MAP_LINE.fullmatch(line)
        if found is None:
            raise ElfError(
                f"no symbol: {line[:40].decode('utf-8', 'backslashreplace')!r}",
                where=f"{name}:{number}",
                advice="a System.map has lines of address, type and name",
            )
        if found[4]:
            continue  # of a module
        rows.append(
            (found[3].decode("utf-8", "backslashreplace"), found[2].decode("latin-1"), int(found[1], 16))
        )
    if not any(address for _, _, address in rows):
        raise ElfError(
            f"{len(rows)} symbols, none of which has an address",
            where=name,
            advice="copy /proc/kallsyms as root: others see zeros",
        )
    return KernelSymbols.sorted(rows)
