"""What one step of a task touches: which memory it reads and writes, and which of our own objects.

Two steps of different tasks that touch nothing in common, or only read what they have in common, come to the
same in either order.  Whoever leaves out schedules stands on that, so a footprint may say too much and never
too little:

- guest memory in granules of 8 bytes, by physical address, whoever accesses it: a service from outside, or
  guest code, whose accesses and instruction bytes Unicorn's hooks tell;
- the Python objects of the emulator (emu/tracked.py);
- `everything`, where that is not known: pages are mapped, or virtual time passes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from emu.paging import Access, AddressSpace

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["Footprint", "Recorder"]

GRANULE_SHIFT = 3


class Footprint:
    """What was read and written; a granule is its number, an object a number above all granules."""

    __slots__ = ("everything", "reads", "writes")

    def __init__(self) -> None:
        self.reads: set[int] = set()
        self.writes: set[int] = set()
        self.everything = False

    def add(self, other: "Footprint") -> None:
        """This one and the other."""
        self.reads |= other.reads
        self.writes |= other.writes
        self.everything |= other.everything

    def commutes_with(self, other: "Footprint") -> bool:
        """In either order the two come to the same."""
        return not (
            self.everything
            or other.everything
            or not self.writes.isdisjoint(other.writes)
            or not self.writes.isdisjoint(other.reads)
            or not self.reads.isdisjoint(other.writes)
        )


class Recorder:
    """Records footprints on one machine from now on; there is no way back.

    `now` is what is being recorded, None for nothing.
    """

    def __init__(self, machine: "Machine") -> None:
        self.now: Footprint | None = None
        self._space = machine.space
        machine.space.__class__ = _recording(self)
        for cpu in machine.cpus:
            cpu.watch_memory(self._fetched, self._accessed)

    @contextmanager
    def into(self, footprint: Footprint) -> Iterator[None]:
        """Record into the footprint while the block runs."""
        before, self.now = self.now, footprint
        try:
            yield
        finally:
            self.now = before

    def _fetched(self, address: int, size: int) -> None:
        if self.now is not None:
            for start, length in self._space._extents(address, size, "a fetch"):
                self.now.reads.update(_granules(start, length))

    def _accessed(self, is_write: bool, physical: int, size: int) -> None:
        if self.now is not None:
            (self.now.writes if is_write else self.now.reads).update(_granules(physical, size))


def _granules(start: int, length: int) -> range:
    return range(start >> GRANULE_SHIFT, (start + length - 1 >> GRANULE_SHIFT) + 1)


def _recording(recorder: Recorder) -> type[AddressSpace]:
    """An AddressSpace whose accesses are recorded."""

    class RecordingSpace(AddressSpace):
        def read(self, address: int, size: int) -> bytes:
            now = recorder.now
            if now is not None and size:
                for start, length in self._extents(address, size, "a read"):
                    now.reads.update(_granules(start, length))
            return super().read(address, size)

        def write(self, address: int, data: bytes) -> None:
            now = recorder.now
            if now is not None and data:
                for start, length in self._extents(address, len(data), "a write"):
                    now.writes.update(_granules(start, length))
            super().write(address, data)

        def map(self, address: int, size: int, access: Access, frame: int | None = None) -> None:
            self._changes()
            super().map(address, size, access, frame)

        def protect(self, address: int, size: int, access: Access) -> None:
            self._changes()
            super().protect(address, size, access)

        def unmap(self, address: int, size: int) -> list[int]:
            self._changes()
            return super().unmap(address, size)

        def _changes(self) -> None:
            if recorder.now is not None:
                recorder.now.everything = True

    return RecordingSpace
