"""kmalloc and kfree: objects with red zones around them, poisoned and kept back when they are freed.

The heap lies in the kernel's direct map (address = PAGE_OFFSET + physical address).  What the kernel would
find only with slub_debug=FZP is always on here:

- a red zone of `RED_ZONE` bytes on both sides tells a write past either end;
- a fresh object is filled with POISON_INUSE unless zeroed, a freed one with POISON_FREE
  (include/linux/poison.h);
- a freed object waits in quarantine before its memory is used again, and must still be poison when it leaves.
"""

import errno
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache

from elf.errors import KlpemuError
from emu.errno import KernelErrno
from emu.memory import PAGE_SIZE, Memory
from emu.paging import Access, AddressSpace

__all__ = ["PAGE_OFFSET", "Corruption", "Slab"]

PAGE_OFFSET = 0xFFFF_8880_0000_0000
RED_ZONE = 16
RED_ACTIVE = 0xCC
POISON_INUSE = 0x5A
POISON_FREE = 0x6B
POISON_END = 0xA5
QUARANTINE_OBJECTS = 256
SLAB_PAGES = 16
_RED = bytes([RED_ACTIVE]) * RED_ZONE


@dataclass(frozen=True, slots=True)
class Corruption:
    """A byte of the heap that somebody wrote who must not: address, what it is part of, and the object."""

    address: int
    what: str
    object: int
    size: int
    tag: str


class Slab:
    """The heap of one machine.  `live` maps an object's address to its size in bytes and its tag.

    `fails` says of an allocation's tag that there is no memory for it, as the kernel's failslab does; where
    the kernel's allocator returns NULL these raise KernelErrno ENOMEM.
    """

    def __init__(self, space: AddressSpace) -> None:
        self._space = space
        self.live: dict[int, tuple[int, str]] = {}
        self.fails: Callable[[str], bool] = lambda tag: False
        # Told of every object that is freed, while it is whole: address, size in bytes, tag.
        self.freeing: list[Callable[[int, int, str], None]] = []
        self._quarantine: deque[tuple[int, int, str]] = deque()
        self._free: dict[int, list[int]] = {}
        self._next = self._end = 0

    def kmalloc(self, size: int, tag: str) -> int:
        """Address of `size` bytes of POISON_INUSE; `tag` says in reports whose they are."""
        return self._allocate(size, tag, bytes([POISON_INUSE]) * size)

    def kzalloc(self, size: int, tag: str) -> int:
        """Address of `size` zero bytes."""
        return self._allocate(size, tag, bytes(size))

    def kstrdup(self, text: str, tag: str) -> int:
        """Address of a NUL-terminated copy of `text`."""
        data = text.encode() + b"\0"
        return self._allocate(len(data), tag, data)

    def kfree(self, address: int) -> None:
        """Free an object; NULL is ignored.  Raises KlpemuError for what is not allocated, or not any more."""
        if not address:
            return
        found = self.live.pop(address, None)
        if found is None:
            before = next((tag for at, _, tag in self._quarantine if at == address), None)
            raise KlpemuError(
                f"double free of {before}" if before else "free of what kmalloc never returned",
                where=f"{address:#018x}",
            )
        size, tag = found
        for told in self.freeing:
            told(address, size, tag)
        self._space.write(address, _poison(size))
        self._quarantine.append((address, size, tag))
        if len(self._quarantine) > QUARANTINE_OBJECTS:
            at, size, tag = self._quarantine.popleft()
            if self._space.read(at, size) != _poison(size):
                raise KlpemuError(f"{tag} was written to after it was freed", where=f"{at:#018x}")
            self._free.setdefault(_class_of(size), []).append(at)

    def contents(self) -> Hashable:
        """Which objects there are, and which were freed, in a form that can be compared."""
        return tuple(self.live.items()), tuple(self._quarantine)

    def corruptions(self, memory: Memory) -> list[Corruption]:
        """Damaged red zones and freed objects written to, as `memory` shows them."""
        found = []
        read = memory.read
        page, start = b"", 0  # objects that lie in one page are looked at in it
        for address, (size, tag) in self.live.items():
            before, end = address - RED_ZONE - start, address + size + RED_ZONE - start
            if not 0 <= before < end <= len(page):
                start = (address - RED_ZONE) & -PAGE_SIZE
                before, end = address - RED_ZONE - start, address + size + RED_ZONE - start
                page = read(start, PAGE_SIZE) if end <= PAGE_SIZE else b""
            if page and page[before : before + RED_ZONE] == _RED == page[end - RED_ZONE : end]:
                continue
            for at, side in ((address - RED_ZONE, "before"), (address + size, "behind")):
                zone = read(at, RED_ZONE)
                if zone != _RED:
                    where = at + next(i for i in range(RED_ZONE) if zone[i] != RED_ACTIVE)
                    found.append(Corruption(where, f"red zone {side} the object", address, size, tag))
        for address, size, tag in self._quarantine:
            data = read(address, size)
            if data != _poison(size):
                where = address + next(i for i, byte in enumerate(_poison(size)) if data[i] != byte)
                found.append(Corruption(where, "freed object written to", address, size, tag))
        return found

    def owner(self, address: int) -> str | None:
        """The tag of the live object that holds `address`."""
        for start, (size, tag) in self.live.items():
            if start <= address < start + size:
                return tag
        return None

    def _allocate(self, size: int, tag: str, contents: bytes) -> int:
        if not 0 < size <= (1 << 22):
            raise KlpemuError(
                f"kmalloc of {size} bytes", advice="the kernel's limit is 4 MiB (KMALLOC_MAX_SIZE)"
            )
        if self.fails(tag):
            raise KernelErrno(errno.ENOMEM, f"no memory for {tag}")
        room = _class_of(size)
        free = self._free.get(room)
        start = (free.pop() - RED_ZONE) if free else self._grow(room + 2 * RED_ZONE)
        red = bytes([RED_ACTIVE]) * RED_ZONE
        self._space.write(start, red + contents + red)
        self.live[start + RED_ZONE] = (size, tag)
        return start + RED_ZONE

    def _grow(self, need: int) -> int:
        if self._next + need > self._end:
            size = max(SLAB_PAGES * PAGE_SIZE, -(-need // PAGE_SIZE) * PAGE_SIZE)
            frame = self._space.arena.writable_frames(size // PAGE_SIZE)
            self._next = PAGE_OFFSET + frame
            self._end = self._next + size
            self._space.map(self._next, size, Access.WRITE, frame)
        start = self._next
        self._next += need
        return start


def _class_of(size: int) -> int:
    """Bytes reserved for an object of `size` bytes: its size class, a multiple of 16."""
    return max(32, (size + 15) & ~15)


@lru_cache(maxsize=256)
def _poison(size: int) -> bytes:
    return bytes([POISON_FREE]) * (size - 1) + bytes([POISON_END])
