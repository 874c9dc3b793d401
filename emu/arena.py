"""Physical memory: one host mapping that Unicorn executes from and Python reads and writes directly.

Frames are handed out from two pools.  Frames for text and read-only data come from the top and never change
behind our back; everything the guest can write (page tables, data, stacks, heap) comes from the bottom.  The
writable part is therefore one slice, which is what makes copying and restoring it cheap (`checkpoint`).
"""

import ctypes
import mmap

from elf.errors import KlpemuError
from emu.memory import PAGE_SIZE
from emu.written_pages import Contents, WrittenPages

__all__ = ["Arena"]

# Reserved, not used: the host gives out a page only when it is first touched.
ARENA_SIZE = 1 << 30
MAP_NORESERVE = 0x4000


class Arena:
    """`size` bytes of physical memory; a physical address is an offset into it.

    `image_data` are the data of a linked kernel image: megabytes that guest code can write, and hardly does.
    They lie apart, so that the flight recorder need not copy them whenever guest code is entered.
    """

    def __init__(self, size: int = ARENA_SIZE) -> None:
        self.size = size
        self.bytes = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        self.host_address = ctypes.addressof(ctypes.c_char.from_buffer(self.bytes))
        self._writable_end = PAGE_SIZE  # frame 0 stays unused: physical address 0 is nobody's
        self._image_start = size
        self.image_data: list[range] = []
        self._free: list[int] = []
        self._free_images: list[int] = []
        self._written: WrittenPages | None = None

    def writable_frames(self, count: int) -> int:
        """Physical address of `count` contiguous zeroed frames from the writable pool."""
        if count == 1 and self._free:
            frame = self._free.pop()
            self.bytes[frame : frame + PAGE_SIZE] = bytes(PAGE_SIZE)
            return frame
        self._check(count)
        frame = self._writable_end
        self._writable_end += count * PAGE_SIZE
        return frame

    def image_frames(self, count: int) -> int:
        """Physical address of `count` contiguous zeroed frames for text or read-only data."""
        if count == 1 and self._free_images:
            frame = self._free_images.pop()
            self.bytes[frame : frame + PAGE_SIZE] = bytes(PAGE_SIZE)
            return frame
        self._check(count)
        self._image_start -= count * PAGE_SIZE
        return self._image_start

    def data_frames(self, count: int) -> int:
        """Physical address of `count` contiguous zeroed frames for a linked image's data."""
        frame = self.image_frames(count)
        self.image_data.append(range(frame, frame + count * PAGE_SIZE))
        return frame

    def release(self, frame: int) -> None:
        """Give back one frame to the pool it came from."""
        (self._free_images if frame >= self._image_start else self._free).append(frame)

    def in_use(self) -> tuple[range, range]:
        """Physical addresses that were handed out: the writable pool, and that of text and read-only data."""
        return range(PAGE_SIZE, self._writable_end), range(self._image_start, self.size)

    @property
    def written(self) -> WrittenPages:
        """The pages that were written since this was first asked for."""
        if self._written is None:
            self._written = WrittenPages(self.bytes, self.host_address, self.in_use())
        return self._written

    def checkpoint(self) -> bytes | Contents:
        """A copy of everything the guest can write, or of what of it was written since a base."""
        if self._written is not None:
            return self._written.take(self.in_use())
        kept = [self.bytes[: self._writable_end], *(self.bytes[at.start : at.stop] for at in self.image_data)]
        return b"".join(kept) if len(kept) > 1 else kept[0]

    def restore(self, checkpoint: bytes | Contents) -> None:
        """Make the writable memory what it was at the checkpoint; no frame may have been handed out since."""
        if isinstance(checkpoint, Contents):
            assert self._written is not None
            self._written.put(checkpoint, self._written.written(self.in_use()))
            return
        end = len(checkpoint)
        for at in reversed(self.image_data):
            self.bytes[at.start : at.stop] = checkpoint[end - len(at) : end]
            end -= len(at)
        self.bytes[:end] = checkpoint[:end]

    def _check(self, count: int) -> None:
        """Raise before anything is handed out, so that a refused request leaves the pools as they were."""
        if self._writable_end + count * PAGE_SIZE > self._image_start:
            raise KlpemuError(
                f"the guest's {self.size >> 20} MiB of physical memory are used up",
                advice="load fewer modules, or give the machine a larger arena",
            )
