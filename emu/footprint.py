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

Beside the places a footprint has the values that a service has read in them, as one number (`seen`): two
services that began alike and have seen the same values stand at the same place, with the same local variables
(emu/same_state.py).
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from emu.paging import Access, AddressSpace
from emu.timer import Timers

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["Footprint", "Recorder"]

GRANULE_SHIFT = 3
PAGE_SHIFT = 12
_LOOKING = ("now", "jiffies", "seconds", "executed", "next_expiry", "_heap")


class Footprint:
    """What was read and written: a granule is its number, a part of an object a tuple (emu/tracked.py).

    `seen` stands for the values that a service has read, in order, `born` are the objects that were met for
    the first time, by id.
    """

    __slots__ = ("born", "everything", "reads", "seen", "time", "writes")

    def __init__(self) -> None:
        self.reads: set[Hashable] = set()
        self.writes: set[Hashable] = set()
        self.everything = False
        self.time = False
        self.seen = 0
        self.born: list[int] = []

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

    `now` is what is being recorded, None for nothing.  Whether or not anything is, `pages` are the physical
    pages that were written to, `changed` the parts of objects, and `mapped` says that mappings have changed;
    whoever has dealt with them clears them.  `ever_changed` only grows.  `shown` gives a number for a value
    that a service sees, `met` is told of objects that nobody has met before.
    """

    def __init__(self, machine: "Machine") -> None:
        self.now: Footprint | None = None
        self.pages: set[int] = set()
        self.changed: set[tuple[Any, ...]] = set()
        self.ever_changed: set[tuple[Any, ...]] = set()
        self.mapped = True
        self.shown: Callable[[Any], int] = lambda value: 0
        self.met: Callable[[int], None] = lambda number: None
        self._hub = machine.hub
        self._told = False
        self._space = machine.space
        machine.space.__class__ = _recording_space(self)
        machine.timers.__class__ = _recording_timers(self)
        self._jiffies = machine.space.physical(machine.symbol("jiffies")) >> GRANULE_SHIFT
        for cpu in machine.cpus:
            cpu.watch_memory(self._fetched, self._accessed)
        events = machine.events
        for heard in (events.listeners, *events.listeners_of.values(), *events.listeners_at.values()):
            heard[:] = [self._without_seeing(each) for each in heard]
        machine.log.listeners[:] = [self._without_seeing(each) for each in machine.log.listeners]

    @property
    def sees(self) -> bool:
        """A service is running, and what is read it sees (those who are only told of events are no part of
        it).
        """
        return self.now is not None and self._hub._running is not None and not self._told

    def see(self, value: Any) -> None:
        """The service that runs has read a value."""
        now = self.now
        if now is not None and self._hub._running is not None and not self._told:
            now.seen = hash((now.seen, self.shown(value)))

    def changes(self, part: tuple[Any, ...]) -> None:
        """A part of an object is stored to."""
        self.changed.add(part)
        self.ever_changed.add(part)

    def _without_seeing(self, listener: Callable[[Any], None]) -> Callable[[Any], None]:
        def told(what: Any) -> None:
            before, self._told = self._told, True
            try:
                listener(what)
            finally:
                self._told = before

        return told

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
        if is_write:
            self.pages.update(_pages(physical, size))
        if self.now is not None:
            (self.now.writes if is_write else self.now.reads).update(_granules(physical, size))


def _granules(start: int, length: int) -> range:
    return range(start >> GRANULE_SHIFT, (start + length - 1 >> GRANULE_SHIFT) + 1)


def _pages(start: int, length: int) -> range:
    return range(start >> PAGE_SHIFT, (start + length - 1 >> PAGE_SHIFT) + 1)


def _recording_space(recorder: Recorder) -> type[AddressSpace]:
    """An AddressSpace whose accesses are recorded."""

    class RecordingSpace(AddressSpace):
        def read(self, address: int, size: int) -> bytes:
            now = recorder.now
            if now is not None and size:
                for start, length in self._extents(address, size, "a read"):
                    now.reads.update(_granules(start, length))
                data = super().read(address, size)
                recorder.see(data)
                return data
            return super().read(address, size)

        def write(self, address: int, data: bytes) -> None:
            if data:
                now = recorder.now
                for start, length in self._extents(address, len(data), "a write"):
                    recorder.pages.update(_pages(start, length))
                    if now is not None:
                        now.writes.update(_granules(start, length))
            super().write(address, data)

        def exchange(self, address: int, data: bytes) -> bytes:
            """What was there before is for those who are told of the store: the service does not see it."""
            before = AddressSpace.read(self, address, len(data))
            self.write(address, data)
            return before

        def map(self, address: int, size: int, access: Access, frame: int | None = None) -> None:
            self._changes()
            super().map(address, size, access, frame)
            for start, length in self._extents(address, size, "a mapping"):  # whatever was there before
                recorder.pages.update(_pages(start, length))

        def protect(self, address: int, size: int, access: Access) -> None:
            self._changes()
            super().protect(address, size, access)

        def unmap(self, address: int, size: int) -> list[int]:
            self._changes()
            return super().unmap(address, size)

        def _changes(self) -> None:
            recorder.mapped = True
            if recorder.now is not None:
                recorder.now.everything = True

    return RecordingSpace


def _recording_timers(recorder: Recorder) -> type[Timers]:
    """Timers that tell who looks at the time, and when one of them fires."""

    class RecordingTimers(Timers):
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name in _LOOKING and recorder.now is not None:
                recorder.now.time = True
                if name != "_heap":
                    recorder.see(value)
            return value

        def spend(self, instructions: int) -> None:
            step = recorder.now
            with recorder.into(None):
                expiry = self.next_expiry
                super().spend(instructions)
                if step is not None and expiry is not None and expiry <= self.now:
                    step.everything = True

    return RecordingTimers
