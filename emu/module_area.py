"""module_alloc: whole pages in the module mapping space, for modules and trampolines.

The space is the kernel's (MODULES_VADDR, arch/x86/include/asm/pgtable_64_types.h).  Behind each area lies an
unmapped guard page, as vmalloc leaves one.  Freed areas are unmapped, so that a stale jump into one faults,
and the addresses come back into use only after `QUARANTINE_AREAS` others were freed.
"""

import bisect
from collections import deque
from collections.abc import Callable

from elf.errors import KlpemuError
from emu.memory import PAGE_SIZE
from emu.paging import Access, AddressSpace

__all__ = ["MODULES_VADDR", "ModuleArea"]

MODULES_VADDR = 0xFFFF_FFFF_C000_0000
MODULES_END = 0xFFFF_FFFF_FF00_0000
QUARANTINE_AREAS = 16


class ModuleArea:
    """The areas in use: `live` maps an area's address to its size in bytes and its tag."""

    def __init__(self, space: AddressSpace) -> None:
        self._space = space
        self.live: dict[int, tuple[int, str]] = {}
        self._next = MODULES_VADDR
        # Told of every area that is freed, while it is mapped: address, size in bytes, tag.
        self.freeing: list[Callable[[int, int, str], None]] = []
        self._quarantine: deque[tuple[int, int]] = deque()
        self._free: dict[int, list[int]] = {}

    def reserve(self, size: int, tag: str) -> int:
        """Address of an area of at least `size` bytes, nothing of it mapped yet."""
        pages = -(-size // PAGE_SIZE)
        free = self._free.get(pages)
        if free:
            address = free.pop(0)
        else:
            address = self._next
            self._next += (pages + 1) * PAGE_SIZE
            if self._next > MODULES_END:
                raise KlpemuError("the module mapping space is full", advice="unload modules first")
        self.live[address] = (pages * PAGE_SIZE, tag)
        return address

    def module_alloc(self, size: int, tag: str, access: Access = Access.WRITE) -> int:
        """Address of an area of mapped pages; text is mapped executable at once, nothing knows it yet."""
        address = self.reserve(size, tag)
        try:
            self._space.map(address, self.live[address][0], access)
        except KlpemuError:
            self.free(address)
            raise
        return address

    def free(self, address: int) -> None:
        """Unmap and give back an area; raises KlpemuError for what is none."""
        found = self.live.pop(address, None)
        if found is None:
            raise KlpemuError("free of what module_alloc never returned", where=f"{address:#018x}")
        size, tag = found
        for told in self.freeing:
            told(address, size, tag)
        for at in range(address, address + size, PAGE_SIZE):
            access = self._space.access(at)
            if access is not None:
                for frame in self._space.unmap(at, PAGE_SIZE):
                    self._space.arena.release(frame)
        self._quarantine.append((address, size))
        if len(self._quarantine) > QUARANTINE_AREAS:
            old, size = self._quarantine.popleft()
            bisect.insort(self._free.setdefault(size // PAGE_SIZE, []), old)
