"""Which symbol is where: the kernel's kallsyms, for vmlinux, for each module and for ftrace's trampolines.

Addresses are guest virtual.  A symbol's size is what kallsyms says, the distance to the next symbol of the
same object or to the end of the section it lies in (`find_kallsyms_symbol()` of kernel/module/kallsyms.c).
"""

import bisect
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import count
from types import MappingProxyType
from typing import NamedTuple

from elf.symbols import select

__all__ = ["Kallsyms", "Ksym"]


class Ksym(NamedTuple):
    """One symbol; `module` is "" for vmlinux.  `is_function` is what the ELF symbol type said."""

    name: str
    address: int
    size: int
    module: str
    is_function: bool = True


class SymbolTable(NamedTuple):
    """The symbols of one object, in sympos order, by name, and by address; nobody changes it."""

    symbols: tuple[Ksym, ...]
    by_name: Mapping[str, Sequence[Ksym]]
    addresses: tuple[int, ...]
    by_address: tuple[Ksym, ...]


def _table_of(symbols: Iterable[Ksym]) -> SymbolTable:
    table = tuple(symbols)
    by_name: dict[str, list[Ksym]] = {}
    for symbol in table:
        by_name.setdefault(symbol.name, []).append(symbol)
    by_address = tuple(sorted(table, key=lambda symbol: symbol.address))
    return SymbolTable(
        table, MappingProxyType(by_name), tuple(symbol.address for symbol in by_address), by_address
    )


class Kallsyms:
    """Lookups by name and by address.

    The tables of one object keep the order that sympos counts in: the symbol table's for a module, the
    addresses' for vmlinux (`klp_find_object_symbol()` of kernel/livepatch/core.c).
    """

    def __init__(self) -> None:
        self._objects: dict[str, SymbolTable] = {}
        self._spans: list[tuple[int, int, str]] = []
        self._trampolines: dict[int, int] = {}
        self._numbers: dict[str, int] = {}
        self._trampoline_starts: list[int] = []

    def add(self, module: str, symbols: Iterable[Ksym], spans: Iterable[tuple[int, int]]) -> None:
        """Add an object's symbols, in sympos order, and the address spans [start, end) that belong to it."""
        self._objects[module] = _table_of(symbols)
        pages = tuple(spans)
        for start, end in pages:
            bisect.insort(self._spans, (start, end, module))
        self._numbers[module] = _number_of(module, self._objects[module].symbols, pages)

    def contents(self) -> Hashable:
        """All that lookups depend on, in a form that is compared at once: equal tables have one number."""
        return tuple(self._numbers.items()), tuple(self._trampolines.items())

    def remove(self, module: str) -> None:
        """Forget an object."""
        del self._objects[module], self._numbers[module]
        self._spans = [span for span in self._spans if span[2] != module]

    def add_trampoline(self, address: int, size: int) -> None:
        """A trampoline shows up as a symbol of a module that does not exist (FTRACE_TRAMPOLINE_SYM)."""
        self._trampolines[address] = size
        bisect.insort(self._trampoline_starts, address)

    def remove_trampoline(self, address: int) -> None:
        """The trampoline at `address` is about to be freed."""
        del self._trampolines[address]
        del self._trampoline_starts[bisect.bisect_left(self._trampoline_starts, address)]

    def module_of(self, address: int) -> str | None:
        """The object whose pages hold `address`: "" for vmlinux, None for what is no object's."""
        index = bisect.bisect_right(self._spans, (address, 1 << 64, "")) - 1
        if index < 0:
            return None
        start, end, module = self._spans[index]
        return module if start <= address < end else None

    def modules(self) -> Iterator[str]:
        """Names of the objects that have symbols, vmlinux as ""."""
        return iter(self._objects)

    def symbols(self, module: str = "") -> Sequence[Ksym]:
        """All symbols of one object, in sympos order."""
        return self._objects[module].symbols

    def named(self, name: str, module: str = "") -> Sequence[Ksym]:
        """All symbols of that name in one object, in sympos order."""
        table = self._objects.get(module)
        return () if table is None else table.by_name.get(name, ())

    def address_of(self, name: str, module: str = "", sympos: int = 0) -> int:
        """Address of a symbol; raises SymbolError with the kernel's message if it is missing or ambiguous."""
        return select(name, [symbol.address for symbol in self.named(name, module)], sympos, module)

    def at(self, address: int) -> Ksym | None:
        """The symbol that covers `address`; of several at one place the first function, else the first."""
        module = self.module_of(address)
        if module is None:
            return self._trampoline_at(address)
        _, _, addresses, table = self._objects[module]
        last = bisect.bisect_right(addresses, address) - 1
        best = None
        while last >= 0 and (best is None or addresses[last] == best.address):
            symbol = table[last]
            if best is None or symbol.is_function or not best.is_function:
                best = symbol
            last -= 1
        if best is None or address >= best.address + max(best.size, 1):
            return None
        return best

    def lookup_size_offset(self, address: int) -> tuple[int, int] | None:
        """Size of the symbol that covers `address`, and the offset in it (kallsyms_lookup_size_offset())."""
        symbol = self.at(address)
        return None if symbol is None else (symbol.size, address - symbol.address)

    def describe(self, address: int) -> str:
        """`sym+0x5/0x30 [mod]`, as the kernel's %pS; the bare address if no symbol covers it."""
        symbol = self.at(address)
        if symbol is None:
            return f"{address:#x}"
        module = f" [{symbol.module}]" if symbol.module else ""
        return f"{symbol.name}+{address - symbol.address:#x}/{symbol.size:#x}{module}"

    def _trampoline_at(self, address: int) -> Ksym | None:
        index = bisect.bisect_right(self._trampoline_starts, address) - 1
        if index < 0:
            return None
        start = self._trampoline_starts[index]
        size = self._trampolines[start]
        if address >= start + size:
            return None
        return Ksym("ftrace_trampoline", start, size, "__builtin__ftrace")


_NUMBERS = count()


@lru_cache(maxsize=1 << 12)
def _number_of(module: str, table: tuple[Ksym, ...], spans: tuple[tuple[int, int], ...]) -> int:
    """A number of their own for the symbols of an object where it lies: they come again and again."""
    return next(_NUMBERS)
