"""Results that follow from guest memory, kept with what they followed from.

A function that reads guest memory and a few named facts, and nothing else that changes, must return the same
again while each byte that it has read is the same: it would read the same places in the same order.  So its
result is kept with the places and the bytes, and nobody has to say when it becomes stale.  It cannot: when
the bytes differ it is not found, and when they are back (a restore point was restored) it is true again,
whoever wrote them: a service, the guest, or somebody who reached into the arena.
"""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any, Final, Protocol

from emu.cpu import MAX_INSTRUCTION
from emu.memory import PAGE_SIZE
from emu.paging import AddressSpace
from emu.stream import Stream

__all__ = ["Facts", "Remembered"]

Extent = tuple[int, int]  # guest virtual [start, end)
KEPT: Final = 128 << 20  # bytes of memory with the results, of all functions together
MANY: Final = 1 << 16  # bytes in one place: then only the pages that were written are compared
PLACES: Final = 8  # that one function has read with the same facts, and that are compared
_NONE: Final = object()


class Facts(Protocol):
    """What a function is told beside memory: by name, in a form that can be compared."""

    def fact(self, name: str) -> Hashable:
        """The fact as it is now."""
        ...


class Remembered:
    """What was found out about one address space, `space`.

    It is the `Memory` that the functions have to read.
    """

    def __init__(self, space: AddressSpace) -> None:
        self.space = space
        self._known: dict[Hashable, list[_Places]] = {}
        self._names: dict[Hashable, tuple[str, ...]] = {}
        self._reading: _Reading | None = None
        self._kept = 0
        self._written: list[int] | None = None

    def look(self) -> None:
        """Memory may have changed since the last call: which pages were written has to be asked for anew."""
        self._written = None

    def written(self, place: slice) -> list[int]:
        """The pages of a place in the arena, by their numbers, that may have been written since a moment that
        stays the same as long as the arena is there (emu/written_pages.py).
        """
        if self._written is None:
            arena = self.space.arena
            self._written = [page for run in arena.written.written(arena.in_use()) for page in run]
        first = bisect_left(self._written, place.start // PAGE_SIZE)
        return self._written[first : bisect_left(self._written, -(-place.stop // PAGE_SIZE))]

    def contents(self, place: slice) -> Hashable:
        """A name for what lies at a large place: what was written, and with which bytes."""
        memory = self.space.arena.bytes
        return tuple(
            (page, memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]) for page in self.written(place)
        )

    def read(self, address: int, size: int) -> bytes:
        """See `Memory`."""
        if self._reading is not None:
            self._reading.extents.append((address, address + (size or 1)))
        return self.space.read(address, size)

    def note_stream(self, stream: Stream) -> None:
        """The function that runs has had guest code executed: it depends on what that fetched and loaded."""
        if self._reading is None:
            return
        extents = self._reading.extents
        extents += _runs(sorted({*stream.addresses, stream.stop.rip}))
        extents.append((stream.stop.address, stream.stop.address + 1))
        mapped = self.space.pages_of({at // PAGE_SIZE for at, _ in stream.loads})
        for at, size in stream.loads:
            for page in mapped.get(at // PAGE_SIZE, ()):
                start = page * PAGE_SIZE + at % PAGE_SIZE
                extents.append((start, start + size))

    def note(self, name: str) -> None:
        """The function that runs looks at a fact."""
        if self._reading is not None:
            self._reading.names.add(name)

    def call(self, function: Callable[..., Any], subject: Facts, *arguments: Hashable) -> Any:
        """`function(subject, *arguments)`, or what it has returned when all that it read was as it is now.

        It reads memory through this object, notes each fact of the subject that it looks at, and leaves
        memory as it was.  One may call another.
        """
        what = (function, arguments)
        names = self._names.get(what, ())
        key = (what, names, tuple(map(subject.fact, names)))
        for places in self._known.get(key, ()):
            result = places.results.get(places.contents(self, self.space), _NONE)
            if result is not _NONE:
                self._note(places.extents, names)
                return result
        reading = _Reading()
        result = self._within(reading, function, subject, *arguments)
        names = self._names[what] = tuple(sorted(reading.names.union(names)))
        extents = tuple(sorted(set(reading.extents)))
        self._note(extents, names)
        self._keep((what, names, tuple(map(subject.fact, names))), extents, result)
        return result

    def apart(self, function: Callable[..., Any], subject: Facts) -> Any:
        """The same, for a result that is itself a fact: whoever looks at it has not read what made it."""
        return self._within(None, self.call, function, subject)

    def _within(self, reading: "_Reading | None", function: Callable[..., Any], *arguments: Any) -> Any:
        outer, self._reading = self._reading, reading
        try:
            return function(*arguments)
        finally:
            self._reading = outer

    def _note(self, extents: Iterable[Extent], names: Iterable[str]) -> None:
        if self._reading is not None:
            self._reading.extents += extents
            self._reading.names.update(names)

    def _keep(self, key: Hashable, extents: tuple[Extent, ...], result: Any) -> None:
        if self._kept >= KEPT:
            self._known.clear()
            self._names.clear()
            self._kept = 0
        known = self._known.setdefault(key, [])
        places = next((each for each in known if each.extents == extents), None)
        if places is None:
            places = _Places(extents)
            known.insert(0, places)
            del known[PLACES:]
        contents = places.contents(self, self.space)
        places.results[contents] = result
        self._kept += _size(contents)


class _Reading:
    """What a running function has read, and which facts it has looked at."""

    def __init__(self) -> None:
        self.extents: list[Extent] = []
        self.names: set[str] = set()


class _Places:
    """Places in guest memory, and by what they contained, what followed from that."""

    def __init__(self, extents: tuple[Extent, ...]) -> None:
        self.extents = extents
        self.results: dict[Hashable, Any] = {}
        self._pages = tuple(_pages_of(extents))
        self._frames: tuple[int | None, ...] | None = None
        self._taken: Callable[[Any], Hashable] = bytes
        self._large: list[slice] = []
        self._missing: tuple[int, ...] = ()

    def contents(self, remembered: Remembered, space: AddressSpace) -> Hashable:
        """What the places contain now; pages that are not mapped are a part of it."""
        frames = space.frames_of(self._pages)
        if frames != self._frames:
            self._frames = frames
            frame_of = dict(zip(self._pages, frames, strict=True))
            self._missing = tuple(page for page, frame in frame_of.items() if frame is None)
            places = _physical(self.extents, frame_of)
            self._large = [each for each in places if each.stop - each.start >= MANY]
            self._taken = _taking([each for each in places if each.stop - each.start < MANY])
        found = self._taken(space.arena.bytes), self._missing
        if not self._large:
            return found
        return found, tuple((each.start, each.stop, remembered.contents(each)) for each in self._large)


def _size(contents: Hashable) -> int:
    """Bytes in what was taken out of memory, with something for each object."""
    if isinstance(contents, tuple):
        return 64 + sum(map(_size, contents))
    return 64 + (len(contents) if isinstance(contents, bytes) else 0)


def _runs(addresses: Iterable[int]) -> Iterator[Extent]:
    """Where the instructions at these addresses lie, neighbours together."""
    first = last = -1
    for address in addresses:
        if address > last:
            if last >= 0:
                yield first, last
            first = address
        last = address + MAX_INSTRUCTION
    yield first, last


def _pages_of(extents: Iterable[Extent]) -> set[int]:
    pages = {start // PAGE_SIZE for start, _ in extents}
    for start, end in extents:
        if (end - 1) // PAGE_SIZE != start // PAGE_SIZE:
            pages.update(range(start // PAGE_SIZE, (end - 1) // PAGE_SIZE + 1))
    return pages


def _physical(extents: Iterable[Extent], frame_of: dict[int, int | None]) -> list[slice]:
    """Where the extents lie in the arena, as far as they are mapped."""
    found: list[slice] = []
    for start, end in extents:
        page = start // PAGE_SIZE
        frame = frame_of[page]
        if (end - 1) // PAGE_SIZE == page:
            if frame is not None:
                at = frame + start - page * PAGE_SIZE
                found.append(slice(at, at + end - start))
        else:
            found += _pieces(start, end, frame_of)
    return found


def _pieces(start: int, end: int, frame_of: dict[int, int | None]) -> Iterator[slice]:
    """The same of one extent that goes over several pages; neighbouring frames make one."""
    first = last = 0
    while start < end:
        stop = min(end, (start // PAGE_SIZE + 1) * PAGE_SIZE)
        frame = frame_of[start // PAGE_SIZE]
        if frame is not None:
            at = frame + start % PAGE_SIZE
            if at != last:
                if last:
                    yield slice(first, last)
                first = at
            last = at + stop - start
        start = stop
    if last:
        yield slice(first, last)


def _taking(places: Sequence[slice]) -> Callable[[Any], Hashable]:
    """What takes the bytes at all these places out of the arena at once."""
    return itemgetter(*places) if places else lambda arena: ()
