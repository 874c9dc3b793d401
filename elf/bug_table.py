"""The table of `WARN` and `BUG`, `__bug_table`: which `ud2` stands for which line of which file.

Source of the form: struct bug_entry in include/asm-generic/bug.h of 6.1, with CONFIG_DEBUG_BUGVERBOSE and
CONFIG_GENERIC_BUG_RELATIVE_POINTERS, which x86-64 has; bug_addr() and bug_get_file_line() in lib/bug.c.
"""

from collections.abc import Iterator, Mapping
from struct import Struct
from typing import Final, NamedTuple

from elf.errors import ElfError
from elf.image import Image
from elf.kernel_symbols import KernelSymbols, kernel_table

__all__ = ["BUGFLAG_DONE", "BUG_ENTRY_BYTES", "BugEntry", "bug_table", "read_bug_table"]

_ENTRY: Final = Struct("<iiHH")
BUG_ENTRY_BYTES: Final = _ENTRY.size
_FILE_DISP: Final = 4  # offset of bug_entry::file_disp, from which it counts
_FLAGS_DISP: Final = 10

BUGFLAG_WARNING: Final = 1
BUGFLAG_ONCE: Final = 2
BUGFLAG_DONE: Final = 4
BUGFLAG_NO_CUT_HERE: Final = 8
_TAINT_SHIFT: Final = 8


class BugEntry(NamedTuple):
    """One `ud2` at `address`; `file` is where the name of the source file is.

    `flags_address` is where the entry keeps its flags, in which BUGFLAG_DONE is set when it warns once only.
    All three are guest virtual addresses.
    """

    address: int
    file: int
    line: int
    flags: int
    flags_address: int

    @property
    def is_warning(self) -> bool:
        """`WARN` and its like; others are `BUG`, after which the kernel does not go on."""
        return bool(self.flags & BUGFLAG_WARNING)

    @property
    def is_once(self) -> bool:
        """Warns the first time only (`WARN_ON_ONCE`)."""
        return bool(self.flags & BUGFLAG_ONCE)

    @property
    def says_cut_here(self) -> bool:
        """The trap prints the "cut here" line; with `WARN(..., format)` it has been printed by then."""
        return not self.flags & BUGFLAG_NO_CUT_HERE

    @property
    def taint(self) -> int:
        """The taint flag that a warning sets, TAINT_WARN (9) for most."""
        return self.flags >> _TAINT_SHIFT


def read_bug_table(table: bytes, address: int) -> Iterator[BugEntry]:
    """The entries of a relocated `__bug_table` that lies at guest virtual `address`, in table order."""
    if len(table) % _ENTRY.size:
        raise ElfError(
            f"__bug_table has {len(table)} bytes", advice=f"each entry takes {_ENTRY.size}: is it of 6.1?"
        )
    for at, (distance, file, line, flags) in zip(
        range(address, address + len(table), _ENTRY.size), _ENTRY.iter_unpack(table), strict=True
    ):
        yield BugEntry(
            (at + distance) % 2**64, (at + _FILE_DISP + file) % 2**64, line, flags, at + _FLAGS_DISP
        )


def bug_table(image: Image, symbols: KernelSymbols | None = None) -> Mapping[int, BugEntry]:
    """The entries of a linked kernel image by the address of their `ud2`.

    Found by its section or by __start___bug_table and __stop___bug_table; empty if the image has none.  Of
    two entries for one address the first counts, as find_bug() finds it.
    """
    table = kernel_table(image, symbols, "__bug_table", ("__start___bug_table", "__stop___bug_table"))
    found: dict[int, BugEntry] = {}
    for entry in read_bug_table(*table) if table else ():
        found.setdefault(entry.address, entry)
    return found
