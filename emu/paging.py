"""The guest's address space: real 4-level page tables inside the arena (SDM Vol. 3A, 4.5).

Text is read + execute, data read + write and no-execute, exactly as the entries say, so a guest store to text
is a page fault of the CPU and not a check of ours.  The host side does not walk the tables again for each
access: it keeps one dictionary from page to frame, filled where the entries are written.
"""

import enum
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol

from elf.errors import KlpemuError
from emu.arena import Arena
from emu.memory import PAGE_SIZE, MemoryFault, Snapshot

__all__ = ["Access", "AddressSpace", "Translator"]

PRESENT = 1 << 0
WRITABLE = 1 << 1
# Set from the start, so that executing changes no page table (SDM Vol. 3A, 4.8).
ACCESSED_DIRTY = 1 << 5 | 1 << 6
NO_EXECUTE = 1 << 63
FRAME_MASK = 0x000F_FFFF_FFFF_F000
ENTRIES = 512
_OFFSET = PAGE_SIZE - 1  # the bits of an address within its page
MANY_PAGES = 64  # from here on frames come in one piece: what is free lies scattered


class Access(enum.Enum):
    """What a page's entry allows, as page table bits."""

    READ = PRESENT | ACCESSED_DIRTY | NO_EXECUTE
    WRITE = PRESENT | ACCESSED_DIRTY | WRITABLE | NO_EXECUTE
    EXECUTE = PRESENT | ACCESSED_DIRTY


class Translator(Protocol):
    """Whatever keeps translations of guest code or of guest addresses: each vCPU's Unicorn instance."""

    def drop_translations(self, start: int, end: int) -> None:
        """Forget the translated code of [start, end)."""
        ...

    def flush_tlb(self) -> None:
        """Forget all address translations."""
        ...


class AddressSpace:
    """Maps guest virtual pages to frames, and reads and writes guest memory for the host side.

    Host-side accesses ignore the write permission, as the kernel's own text poking does through its temporary
    mapping, but a write to an executable page always drops the translations of it on every Unicorn instance.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._bytes = arena.bytes
        self.translators: list[Translator] = []
        self._frames: dict[int, int] = {}
        self._access: dict[int, Access] = {}
        self._executable: set[int] = set()
        self._top = [0] * ENTRIES
        self._roots: list[int] = []
        # The kernel half is shared by all roots: its second level exists before the first root is made.
        for address in (0xFFFF_8880_0000_0000, 0xFFFF_C900_0000_0000, 0xFFFF_FFFF_8000_0000):
            self._top[address >> 39 & 511] = arena.writable_frames(1) | PRESENT | WRITABLE | ACCESSED_DIRTY

    def new_root(self) -> int:
        """Physical address of a new top-level table (what CR3 holds) that shares the kernel half."""
        root = self.arena.writable_frames(1)
        struct.pack_into(f"<{ENTRIES}Q", self.arena.bytes, root, *self._top)
        self._roots.append(root)
        return root

    def map(self, address: int, size: int, access: Access, frame: int | None = None) -> None:
        """Map whole pages at `address`: to fresh frames, or to contiguous ones from physical `frame` on.

        All of them or none: whatever is raised, nothing stays mapped.
        """
        first = address >> 12
        pages = range(first, first + _pages(address, size))
        for page in pages:
            if page in self._frames:
                raise KlpemuError("the page is mapped already", where=f"{page << 12:#018x}")
        frames = self._backing(len(pages), access) if frame is None else None
        done = 0
        try:
            for page in pages:
                backing = frames[done] if frames else (frame or 0) + done * PAGE_SIZE
                self._set_entry(page, backing | access.value)
                self._frames[page] = backing
                done += 1
        except KlpemuError:
            for page in pages[:done]:
                self._set_entry(page, 0)
                del self._frames[page]
            for backing in frames or ():
                self.arena.release(backing)
            raise
        for page in pages:
            self._access[page] = access
            if access is Access.EXECUTE:
                self._executable.add(page)

    def _backing(self, count: int, access: Access) -> Sequence[int]:
        """Physical addresses of so many fresh frames; none is taken if there are not as many."""
        pool = self.arena.writable_frames if access is Access.WRITE else self.arena.image_frames
        if count > MANY_PAGES:
            first = pool(count)
            return range(first, first + count * PAGE_SIZE, PAGE_SIZE)
        frames: list[int] = []
        try:
            while len(frames) < count:
                frames.append(pool(1))
        except KlpemuError:
            for backing in frames:
                self.arena.release(backing)
            raise
        return frames

    def protect(self, address: int, size: int, access: Access) -> None:
        """Change what the mapped pages allow."""
        pages = range(address >> 12, (address >> 12) + _pages(address, size))
        self.drop_translations(address, size)
        for page in pages:
            self._set_entry(page, self._frames[page] | access.value)
            self._access[page] = access
        (self._executable.update if access is Access.EXECUTE else self._executable.difference_update)(pages)
        self.flush_tlb()

    def unmap(self, address: int, size: int) -> list[int]:
        """Unmap whole pages; returns their frames, which the caller owns again."""
        pages = range(address >> 12, (address >> 12) + _pages(address, size))
        self.drop_translations(address, size)
        frames = []
        for page in pages:
            self._set_entry(page, 0)
            frames.append(self._frames.pop(page))
            del self._access[page]
        self._executable.difference_update(pages)
        self.flush_tlb()
        return frames

    def executable(self) -> Iterator[tuple[int, int]]:
        """The executable pages: number of the page, and physical address of its frame."""
        return ((page, self._frames[page]) for page in self._executable)

    def frames_of(self, pages: Iterable[int]) -> tuple[int | None, ...]:
        """Physical address of the frame of each page, given by its number; None where nothing is mapped."""
        return tuple(map(self._frames.get, pages))

    def pages_of(self, frames: Collection[int]) -> dict[int, list[int]]:
        """By number of the frame, the numbers of the pages that are mapped to it; of these frames only."""
        wanted = {frame * PAGE_SIZE for frame in frames}
        found: dict[int, list[int]] = {}
        for page, at in self._frames.items():
            if at in wanted:
                found.setdefault(at // PAGE_SIZE, []).append(page)
        return found

    def access(self, address: int) -> Access | None:
        """What the page holding `address` allows; None where nothing is mapped."""
        return self._access.get(address >> 12)

    def physical(self, address: int) -> int:
        """Physical address of what lies at the virtual one; raises MemoryFault where nothing is mapped."""
        start, _ = next(self._extents(address, 1, "a translation"))
        return start

    def read(self, address: int, size: int) -> bytes:
        """Read guest memory; see `Memory`."""
        offset = address & _OFFSET
        if offset + size <= PAGE_SIZE:
            try:
                at = self._frames[address >> 12] + offset
            except KeyError:
                raise MemoryFault(address, size, "a read") from None
            return self._bytes[at : at + size]
        return b"".join(
            self.arena.bytes[start : start + length]
            for start, length in self._extents(address, size, "a read")
        )

    def read_mapped(self, address: int, size: int) -> bytes:
        """Up to `size` bytes: fewer where the next page is not mapped (an instruction may end before it)."""
        try:
            return self.read(address, size)
        except MemoryFault:
            return self.read(address, min(size, -address % PAGE_SIZE or PAGE_SIZE))

    def write(self, address: int, data: bytes) -> None:
        """Write guest memory; see `WritableMemory`."""
        size = len(data)
        offset = address & _OFFSET
        if 0 < size <= PAGE_SIZE - offset:
            page = address >> 12
            try:
                at = self._frames[page] + offset
            except KeyError:
                raise MemoryFault(address, size, "a write") from None
            self._bytes[at : at + size] = data
            if page in self._executable:
                self.drop_translations(address, size)
            return
        if not size:
            return
        extents = list(self._extents(address, size, "a write"))
        done = 0
        for start, length in extents:
            self._bytes[start : start + length] = data[done : done + length]
            done += length
        self.drop_translations(address, size)

    def exchange(self, address: int, data: bytes) -> bytes:
        """Write guest memory; returns what was there before."""
        size = len(data)
        offset = address & _OFFSET
        page = address >> 12
        if offset + size <= PAGE_SIZE and page in self._frames and page not in self._executable:
            at = self._frames[page] + offset
            before = self._bytes[at : at + size]
            self._bytes[at : at + size] = data
            return before
        before = self.read(address, size)
        self.write(address, data)
        return before

    def snapshot(self) -> Snapshot:
        """A copy of every mapped page."""
        return Snapshot({page: self.arena.bytes[at : at + PAGE_SIZE] for page, at in self._frames.items()})

    def _extents(self, address: int, size: int, doing: str) -> Iterator[tuple[int, int]]:
        """Runs of physical memory: start and length.  Neighbouring frames make one."""
        frames = self._frames
        end = address + size
        frame = frames.get(address >> 12)
        if frame is None:
            raise MemoryFault(address, size, doing)
        start = frame + (address & (PAGE_SIZE - 1))
        at = (address & -PAGE_SIZE) + PAGE_SIZE
        stop = frame + PAGE_SIZE
        while at < end:
            frame = frames.get(at >> 12)
            if frame is None:
                raise MemoryFault(address, size, doing)
            if frame != stop:
                yield start, stop - start
                start = frame
            stop = frame + PAGE_SIZE
            at += PAGE_SIZE
        yield start, stop - start - (at - end)

    def _set_entry(self, page: int, entry: int) -> None:
        table = self._top[page >> 27 & 511] & FRAME_MASK
        if not table:
            raise KlpemuError("no kernel region lies here", where=f"{page << 12:#018x}")
        for shift in (18, 9):
            slot = table + 8 * (page >> shift & 511)
            (below,) = struct.unpack_from("<Q", self.arena.bytes, slot)
            if not below & PRESENT:
                below = self.arena.writable_frames(1) | PRESENT | WRITABLE | ACCESSED_DIRTY
                struct.pack_into("<Q", self.arena.bytes, slot, below)
            table = below & FRAME_MASK
        struct.pack_into("<Q", self.arena.bytes, table + 8 * (page & 511), entry)

    def drop_translations(self, address: int, size: int) -> None:
        """Forget translated code of the range, where its pages are executable, and still are.

        Unicorn looks the address up as if it fetched code there.  Where that is not allowed it keeps a page
        fault in mind, and the guest's next one comes out as a double fault.
        """
        for page in range(address >> 12, (address + size + PAGE_SIZE - 1) >> 12):
            if page in self._executable:
                start, end = max(address, page << 12), min(address + size, (page + 1) << 12)
                for translator in self.translators:
                    translator.drop_translations(start, end)

    def flush_tlb(self) -> None:
        """Forget all address translations, after page table entries have changed."""
        for translator in self.translators:
            translator.flush_tlb()


def _pages(address: int, size: int) -> int:
    if address & (PAGE_SIZE - 1):
        raise KlpemuError("a mapping starts on a page boundary", where=f"{address:#018x}")
    return (size + PAGE_SIZE - 1) >> 12
