"""What one step of a task touches: which memory it reads and writes, and which of our own objects.

Two steps of different tasks that touch nothing in common, or only read what they have in common, come to the
same in either order.  Whoever leaves out schedules stands on that, so a footprint may say too much and never
too little:

- guest memory in granules of 8 bytes, by physical address, whoever accesses it: a service from outside, or
  guest code, whose accesses and instruction bytes Unicorn's hooks tell;
- the Python objects of the emulator (emu/tracked.py);
- whether it looks at virtual time, which every step moves a little;
- `everything`, where that is not known: pages are mapped, or a timer fires.

The time that lines of the log are stamped with does not count: nobody decides by it.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from emu.paging import Access, AddressSpace
from emu.timer import Timers

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["Footprint", "Recorder"]

GRANULE_SHIFT = 3
_LOOKING = ("now", "jiffies", "seconds", "executed", "next_expiry", "_heap")


class Footprint:
    """What was read and written: a granule is its number, a part of an object a tuple (emu/tracked.py)."""

    __slots__ = ("everything", "reads", "time", "writes")

    def __init__(self) -> None:
        self.reads: set[Hashable] = set()
        self.writes: set[Hashable] = set()
        self.everything = False
        self.time = False

    def add(self, other: "Footprint") -> None:
        """This one and the other."""
        self.reads |= other.reads
        self.writes |= other.writes
        self.everything |= other.everything
        self.time |= other.time

    def commutes_with(self, other: "Footprint") -> bool:
        """In either order the two come to the same, if no jiffy ends meanwhile."""
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
        machine.space.__class__ = _recording_space(self)
        machine.timers.__class__ = _recording_timers(self)
        self._jiffies = machine.space.physical(machine.symbol("jiffies")) >> GRANULE_SHIFT
        for cpu in machine.cpus:
            cpu.watch_memory(self._fetched, self._accessed)

    @contextmanager
    def into(self, footprint: Footprint | None) -> Iterator[None]:
        """Record into the footprint while the block runs."""
        before, self.now = self.now, footprint
        try:
            yield
        finally:
            self.now = before
            if footprint is not None and self._jiffies in footprint.reads:
                footprint.time = True

    def _fetched(self, address: int, size: int) -> None:
        if self.now is not None:
            for start, length in self._space._extents(address, size, "a fetch"):
                self.now.reads.update(_granules(start, length))

    def _accessed(self, is_write: bool, physical: int, size: int) -> None:
        if self.now is not None:
            (self.now.writes if is_write else self.now.reads).update(_granules(physical, size))


def _granules(start: int, length: int) -> range:
    return range(start >> GRANULE_SHIFT, (start + length - 1 >> GRANULE_SHIFT) + 1)


def _recording_space(recorder: Recorder) -> type[AddressSpace]:
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


def _recording_timers(recorder: Recorder) -> type[Timers]:
    """Timers that tell who looks at the time, and when one of them fires."""

    class RecordingTimers(Timers):
        def __getattribute__(self, name: str) -> Any:
            if name in _LOOKING and recorder.now is not None:
                recorder.now.time = True
            return super().__getattribute__(name)

        def spend(self, instructions: int) -> None:
            step = recorder.now
            with recorder.into(None):
                expiry = self.next_expiry
                super().spend(instructions)
                if step is not None and expiry is not None and expiry <= self.now:
                    step.everything = True

    return RecordingTimers
