"""The records of all fentry sites: `struct dyn_ftrace` in guest memory, one array a loaded object.

A record's flags are the kernel's (include/linux/ftrace.h): the low 23 bits count the ops that want the site,
the others say what it calls.  The arrays hang off `ftrace_pages_start`; beside that list a host-side index of
their address ranges finds a record by bisection, as the kernel's bsearch does within one array.
"""

import bisect
import enum
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from emu.slab import Slab
from emu.view import GuestVariable, Layouts

__all__ = ["FTRACE_REF_MAX", "DynFtrace", "FtraceFl", "ftrace_rec_count"]

RECORD = struct.Struct("<QQ")


class FtraceFl(enum.IntFlag):
    """FTRACE_FL_*: what a record's flags say beside the count."""

    ENABLED = 1 << 31
    REGS = 1 << 30
    REGS_EN = 1 << 29
    TRAMP = 1 << 28
    TRAMP_EN = 1 << 27
    IPMODIFY = 1 << 26
    DISABLED = 1 << 25
    DIRECT = 1 << 24
    DIRECT_EN = 1 << 23


FTRACE_REF_MAX = (1 << 23) - 1


def ftrace_rec_count(flags: int) -> int:
    """How many ops want the site."""
    return flags & FTRACE_REF_MAX


class DynFtrace:
    """Adds, finds and removes records.

    `start` and `last` are the guest variables ftrace_pages_start and ftrace_pages.
    """

    def __init__(
        self, layouts: Layouts, memory: Any, slab: Slab, start: GuestVariable, last: GuestVariable
    ) -> None:
        self._layouts = layouts
        self._memory = memory
        self._slab = slab
        self._start = start
        self._last = last
        self._index: list[tuple[int, int, int]] = []  # first ip, last ip, address of the ftrace_page

    def process_locs(self, addresses: Sequence[int]) -> None:
        """Make the records of one object's sites (ftrace_process_locs()): sorted, flags 0."""
        if not addresses:
            return
        ips = sorted(addresses)
        records = self._slab.kzalloc(RECORD.size * len(ips), "dyn_ftrace records")
        self._memory.write(records, b"".join(RECORD.pack(ip, 0) for ip in ips))
        page = self._layouts.view(
            "ftrace_page",
            self._memory,
            self._slab.kzalloc(self._layouts.sizeof("ftrace_page"), "ftrace_page"),
        )
        page.records = records
        page.index = len(ips)
        last = self._last.get()
        if last:
            self._page(last).next = page.address_
        else:
            self._start.set(page.address_)
        self._last.set(page.address_)
        bisect.insort(self._index, (ips[0], ips[-1], page.address_))

    def release(self, addresses: Sequence[int]) -> None:
        """Free the records of one object's sites (ftrace_release_mod())."""
        if not addresses:
            return
        first = min(addresses)
        found = next(entry for entry in self._index if entry[0] == first)
        self._index.remove(found)
        page = self._page(found[2])
        before = None
        for each in self.pages():
            if each == page:
                break
            before = each
        if before is None:
            self._start.set(page.next)
        else:
            before.next = page.next
        if self._last.get() == page.address_:
            self._last.set(before.address_ if before is not None else 0)
        self._slab.kfree(page.records)
        self._slab.kfree(page.address_)

    def lookup_rec(self, start: int, end: int) -> Any:
        """The first record whose five bytes touch [start, end], both included; None if there is none."""
        at = bisect.bisect_right(self._index, (end, 1 << 64, 0))
        for first, last, page in reversed(self._index[max(0, at - 1) : at]):
            if first <= end and start < last + 5:
                return self._search(self._page(page), start, end)
        return None

    def pages(self) -> Iterator[Any]:
        """Views of the `struct ftrace_page` list, oldest first."""
        at = self._start.get()
        while at:
            page = self._page(at)
            yield page
            at = page.next

    def __iter__(self) -> Iterator[Any]:
        """Views of all records, page by page."""
        for page in self.pages():
            records, count = page.records, page.index
            for index in range(count):
                yield self._layouts.view("dyn_ftrace", self._memory, records + RECORD.size * index)

    def _search(self, page: Any, start: int, end: int) -> Any:
        records, low, high = page.records, 0, page.index
        while low < high:
            middle = (low + high) // 2
            record = self._layouts.view("dyn_ftrace", self._memory, records + RECORD.size * middle)
            ip = record.ip
            if end < ip:
                high = middle
            elif start >= ip + 5:
                low = middle + 1
            else:
                return record
        return None

    def _page(self, address: int) -> Any:
        return self._layouts.view("ftrace_page", self._memory, address)
