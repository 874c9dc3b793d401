"""Which pages of the arena were written since a moment, as the host's own page tables tell.

From that moment, the base, on the arena is a private mapping of a file that nobody writes.  The host copies a
page of such a mapping when it is first written, whoever does it, a CPU or Python; which pages it has copied
is in /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst).  So putting back a moment costs what was
written, not what there is: of a linked image's 47 MB some hundred pages.
"""

import ctypes
import mmap
import os
import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Final

from elf.errors import KlpemuError
from emu.memory import PAGE_SIZE

__all__ = ["Contents", "WrittenPages"]

PAGEMAP: Final = "/proc/self/pagemap"
ENTRY: Final = 8  # bytes; the flags are in the last: present 0x80, swapped 0x40, the file's own page 0x20
_COPIED: Final = re.compile(rb"[\x40-\x5f\x80-\x9f\xc0-\xdf]+")
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000
MAP_FAILED: Final = ctypes.c_void_p(-1).value


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """What differs from the base at one moment: physical addresses, each with the bytes from there on."""

    runs: tuple[tuple[int, bytes], ...]
    pages: frozenset[int]

    @property
    def size(self) -> int:
        """Bytes that were copied."""
        return len(self.pages) * PAGE_SIZE

    def page(self, number: int) -> bytes | None:
        """The contents of a page, given by its number; None for one that is as in the base."""
        if number not in self.pages:
            return None
        at = number * PAGE_SIZE
        start, data = self.runs[bisect_right(self.runs, at, key=lambda run: run[0]) - 1]
        return data[at - start : at - start + PAGE_SIZE]


class WrittenPages:
    """The pages of `memory` that were written since this was made; `used` are the addresses in use now.

    `address` is where the memory lies in this process.
    """

    def __init__(self, memory: mmap.mmap, address: int, used: Iterable[range]) -> None:
        self._memory = memory
        self._address = address
        file = os.memfd_create("klpemu")
        try:
            os.ftruncate(file, len(memory))
            self._base = mmap.mmap(file, len(memory), flags=mmap.MAP_SHARED | MAP_NORESERVE)
            for each in used:
                self._base[each.start : each.stop] = memory[each.start : each.stop]
            _map_private(address, len(memory), file)
        finally:
            os.close(file)

    def base(self, number: int) -> bytes:
        """The contents of a page, given by its number, at the base."""
        return self._base[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]

    def take(self, used: Iterable[range]) -> Contents:
        """What differs from the base now, within the addresses in use."""
        memory = self._memory
        written = self.written(used)
        pages = frozenset(number for run in written for number in run)
        return Contents(
            tuple(
                (run.start * PAGE_SIZE, memory[run.start * PAGE_SIZE : run.stop * PAGE_SIZE])
                for run in written
            ),
            pages,
        )

    def put(self, contents: Contents, written: Iterable[range]) -> None:
        """Make memory what it was; `written` are the runs of pages that differ from the base now."""
        memory, kept = self._memory, contents.pages
        for run in written:
            if kept.issuperset(run):
                continue
            for start, stop in _outside(run, kept):
                # The host forgets its copies, and the base is there again.
                memory.madvise(mmap.MADV_DONTNEED, start * PAGE_SIZE, (stop - start) * PAGE_SIZE)
        for at, data in contents.runs:
            memory[at : at + len(data)] = data

    def written(self, used: Iterable[range]) -> list[range]:
        """Runs of pages, by their numbers, that may differ from the base; of other pages it is sure."""
        found: list[range] = []
        for each in used:
            first, last = each.start // PAGE_SIZE, -(-each.stop // PAGE_SIZE)
            flags = self._flags(first, last - first)
            found += [range(first + run.start(), first + run.end()) for run in _COPIED.finditer(flags)]
        return found

    def _flags(self, first: int, count: int) -> bytes:
        """The flags of so many pages; where the host does not tell, all count as written."""
        try:
            at = (self._address // PAGE_SIZE + first) * ENTRY
            entries = os.pread(_pagemap(os.getpid()), count * ENTRY, at)
        except OSError:
            entries = b""
        return entries[ENTRY - 1 :: ENTRY] if len(entries) == count * ENTRY else b"\x80" * count


@cache
def _pagemap(pid: int) -> int:
    """The open file; it shows the memory of the process that has opened it."""
    return os.open(PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)


def _outside(run: range, kept: frozenset[int]) -> Iterable[tuple[int, int]]:
    """The runs of pages of `run` that are not `kept`: first and behind the last."""
    start = None
    for number in run:
        if number in kept:
            if start is not None:
                yield start, number
            start = None
        elif start is None:
            start = number
    if start is not None:
        yield start, run.stop


def _map_private(address: int, size: int, file: int) -> None:
    """Put a private mapping of the file in place of what is mapped at an address of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE
    if libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, 0) == MAP_FAILED:
        reason = os.strerror(ctypes.get_errno())
        raise KlpemuError(
            f"{size >> 20} MiB cannot be mapped: {reason}",
            advice="raise the limit of address space (ulimit -v)",
        )
