"""Reading guest memory: the read-only protocol that every check uses, and what raises when a byte is missing.

All addresses are guest virtual addresses.  A live machine, a snapshot of one, and later an ELF core all serve
the same `Memory` protocol, so whatever is written against it can judge any of them.
"""

from collections.abc import Mapping
from typing import Protocol

from elf.errors import KlpemuError

__all__ = [
    "PAGE_SIZE",
    "Memory",
    "MemoryFault",
    "Snapshot",
    "WritableMemory",
    "read_c_string",
    "read_string",
    "read_u32",
    "read_u64",
]

PAGE_SIZE = 4096

# A kernel symbol name is at most KSYM_NAME_LEN bytes (include/linux/kallsyms.h); no guest string we follow is
# longer.
STRING_LIMIT = 4096


class MemoryFault(KlpemuError):  # noqa: N818
    """An address range that no page of the guest maps."""

    def __init__(self, address: int, size: int, doing: str) -> None:
        self.address = address
        self.size = size
        super().__init__(
            f"{doing} of {size} bytes touches an unmapped guest address",
            where=f"{address:#018x}",
            advice="the pointer that led there is not valid",
        )


class Memory(Protocol):
    """Read-only guest memory by virtual address."""

    def read(self, address: int, size: int) -> bytes:
        """Return exactly `size` bytes; raises MemoryFault where a page is not mapped."""
        ...


class WritableMemory(Memory, Protocol):
    """Guest memory that can be written, too."""

    def write(self, address: int, data: bytes) -> None:
        """Store `data`; raises MemoryFault where a page is not mapped, and stores nothing then."""
        ...


class Snapshot:
    """A copy of guest pages, page number to contents; serves as `Memory` after the machine has moved on."""

    def __init__(self, pages: Mapping[int, bytes]) -> None:
        self._pages = pages

    def read(self, address: int, size: int) -> bytes:
        parts = []
        at, left = address, size
        while left > 0:
            page = self._pages.get(at >> 12)
            if page is None:
                raise MemoryFault(address, size, "a read")
            start = at & (PAGE_SIZE - 1)
            part = page[start : start + left]
            parts.append(part)
            at += len(part)
            left -= len(part)
        return b"".join(parts)

    def changed(self, later: "Snapshot") -> list[int]:
        """Addresses of the pages that differ between this snapshot and a later one, or exist in one only."""
        pages = self._pages.keys() | later._pages.keys()
        return sorted(page << 12 for page in pages if self._pages.get(page) != later._pages.get(page))


def read_u32(memory: Memory, address: int) -> int:
    """The little-endian 32-bit word at a guest virtual address."""
    return int.from_bytes(memory.read(address, 4), "little")


def read_u64(memory: Memory, address: int) -> int:
    """Little-endian 64-bit value at `address`."""
    return int.from_bytes(memory.read(address, 8), "little")


def read_string(memory: Memory, address: int) -> str:
    """NUL-terminated string at `address`, undecodable bytes shown as escapes."""
    return read_c_string(memory, address).decode("ascii", "backslashreplace")


def read_c_string(memory: Memory, address: int) -> bytes:
    """The bytes of the NUL-terminated string at `address`, without the NUL."""
    found = bytearray()
    while len(found) < STRING_LIMIT:
        # Up to the end of the page: the string may be the last thing that is mapped.
        part = memory.read(address + len(found), 64 - ((address + len(found)) & 63))
        end = part.find(0)
        if end >= 0:
            found += part[:end]
            return bytes(found)
        found += part
    raise KlpemuError("no string ends here", where=f"{address:#018x}", advice="the pointer is not a string's")
