"""Per-CPU memory: one area a vCPU, all laid out alike, found through the GS base (mm/percpu.c).

A per-CPU symbol is an offset into the area, so what a module allocates lies at the same offset for every
vCPU.
"""

from elf.errors import KlpemuError
from emu.memory import PAGE_SIZE
from emu.paging import Access, AddressSpace
from emu.slab import PAGE_OFFSET

__all__ = ["PER_CPU_SIZE", "PerCpu"]

PER_CPU_SIZE = 16 * PAGE_SIZE


class PerCpu:
    """`areas` are the areas' guest virtual addresses, `live` maps offsets in use to sizes in bytes.

    The first `static` bytes of an area belong to a linked kernel image, whose symbols have their offsets.
    """

    def __init__(self, space: AddressSpace, static: int = 0) -> None:
        self._space = space
        self.areas: list[int] = []
        self.live: dict[int, int] = {0: static} if static else {}
        self.size = -(-static // PAGE_SIZE) * PAGE_SIZE + PER_CPU_SIZE

    def new_area(self) -> int:
        """Guest virtual address of the zeroed area of one more vCPU."""
        frame = self._space.arena.writable_frames(self.size // PAGE_SIZE)
        self._space.map(PAGE_OFFSET + frame, self.size, Access.WRITE, frame)
        self.areas.append(PAGE_OFFSET + frame)
        return self.areas[-1]

    def alloc(self, size: int, alignment: int) -> int:
        """Offset of `size` bytes in every area; the lowest that is free."""
        alignment = max(alignment, 1)
        start = 0
        for taken, length in sorted(self.live.items()):
            if start + size <= taken:
                break
            start = -(-(taken + length) // alignment) * alignment
        if start + size > self.size:
            raise KlpemuError(
                f"per-CPU memory of {size} bytes does not fit the area of {self.size:#x}",
                advice="unload modules first",
            )
        self.live[start] = size
        return start

    def free(self, offset: int) -> None:
        """Give back what `alloc` returned."""
        if self.live.pop(offset, None) is None:
            raise KlpemuError("free of per-CPU memory that was never allocated", where=f"offset {offset:#x}")

    def write(self, offset: int, data: bytes) -> None:
        """Store the same bytes in every vCPU's area."""
        for area in self.areas:
            self._space.write(area + offset, data)
