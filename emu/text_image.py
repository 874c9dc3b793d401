"""Text under construction: the relocated sections of one object, at their addresses, before any can run.

What text_poke_early() writes goes straight into the sections' bytes; nothing has translated or fetched them
yet, so no poker is needed.
"""

from bisect import bisect_right
from collections.abc import Iterable

from emu.memory import Memory, MemoryFault

__all__ = ["TextImage"]


class TextImage:
    """Bytes by virtual address; `parts` are (address, bytes), disjoint, and are written in place.

    What no part covers is read from `behind`, the machine's memory, if that is given, and cannot be written.
    """

    def __init__(self, parts: Iterable[tuple[int, bytearray]], behind: Memory | None = None) -> None:
        self._parts = sorted(((at, data) for at, data in parts if data), key=lambda part: part[0])
        self._starts = [at for at, _ in self._parts]
        self._behind = behind
        self._at, self._data = self._parts[0] if self._parts else (0, bytearray())

    def read(self, address: int, size: int) -> bytes:
        """Exactly `size` bytes; raises MemoryFault for what is nowhere."""
        offset = address - self._at
        if offset >= 0 and offset + size <= len(self._data):
            return bytes(self._data[offset : offset + size])
        if self._select(address, size):
            offset = address - self._at
            return bytes(self._data[offset : offset + size])
        if self._behind is None:
            raise MemoryFault(address, size, "a read")
        return self._behind.read(address, size)

    def place(self, address: int, size: int) -> tuple[bytearray, int]:
        """The bytes of the part that holds all these, to be changed in place, and the offset in them."""
        if not self._select(address, size):
            raise MemoryFault(address, size, "a change of text")
        return self._data, address - self._at

    def read_some(self, address: int, size: int) -> bytes:
        """At most `size` bytes: fewer at the end of a section."""
        if not self._select(address, 1):
            return self.read(address, size)
        offset = address - self._at
        return bytes(self._data[offset : offset + size])

    def write(self, address: int, data: bytes) -> None:
        """Replace bytes within one section; raises MemoryFault elsewhere."""
        if not self._select(address, len(data)):
            raise MemoryFault(address, len(data), "a write of text")
        offset = address - self._at
        self._data[offset : offset + len(data)] = data

    def holds(self, address: int, size: int = 1) -> bool:
        """Whether all these bytes are in one part of this image."""
        return self._select(address, size)

    def _select(self, address: int, size: int) -> bool:
        offset = address - self._at
        if offset >= 0 and offset + size <= len(self._data):
            return True
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return False
        self._at, self._data = self._parts[index]
        return address - self._at + size <= len(self._data)
