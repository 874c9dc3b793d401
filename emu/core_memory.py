"""Guest memory read back from a saved core: a walk of the page tables in the file (SDM Vol. 3A, 4.5).

The virtual addresses in the core's program headers are not looked at, so what is read here is what a vCPU
with these tables would have read.
"""

import mmap
import os
from collections.abc import Iterator
from struct import Struct, error, unpack_from
from typing import Final

from elf.errors import ElfError
from elf.image import EM_X86_64
from elf.output import ET_CORE, FILE_HEADER, PROGRAM_HEADER, PT_LOAD, PT_NOTE
from emu.memory import PAGE_SIZE, MemoryFault
from emu.paging import FRAME_MASK, PRESENT
from emu.vmcore import START_KERNEL_MAP

__all__ = ["CoreMemory"]

_NOTE: Final = Struct("<III")
_LEVELS: Final = (39, 30, 21, 12)


class CoreMemory:
    """The memory of a core that `save_core` wrote; `vmcoreinfo` is that note by key.

    Raises ElfError for a file that is no such core.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._frames: dict[int, int] = {}
        self._pages: dict[int, int] = {}
        self.vmcoreinfo: dict[str, str] = {}
        if os.path.exists(path) and not os.path.isfile(path):
            raise self._error("not a regular file")  # a FIFO would block
        try:
            with open(path, "rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._read_headers()
            self._root = (
                int(self.vmcoreinfo["SYMBOL(swapper_pg_dir)"], 16)
                - START_KERNEL_MAP
                + int(self.vmcoreinfo["NUMBER(phys_base)"])
            )
        except OSError as reason:
            raise ElfError(f"cannot be read: {reason.strerror or reason}", where=self._path) from reason
        except KeyError as missing:
            raise self._error(f"no {missing.args[0]} in a VMCOREINFO note") from None
        except (error, ValueError, OverflowError) as damage:
            raise self._error(f"a damaged file: {damage}") from None

    def read(self, address: int, size: int) -> bytes:
        """Read guest memory; see `Memory`."""
        parts = []
        at, end = address, address + size
        while at < end:
            page = self._translate(at & -PAGE_SIZE)
            if page is None:
                raise MemoryFault(address, size, "a read")
            offset = at & (PAGE_SIZE - 1)
            length = min(PAGE_SIZE - offset, end - at)
            parts.append(self._data[page + offset : page + offset + length])
            at += length
        return b"".join(parts)

    def _translate(self, page: int) -> int | None:
        """File offset of a virtual page; None if it is not mapped."""
        known = self._pages.get(page)
        if known is not None:
            return known
        table = self._root
        for shift in _LEVELS:
            at = self._frames.get(table)
            if at is None:
                return None
            (entry,) = unpack_from("<Q", self._data, at + 8 * (page >> shift & 511))
            if not entry & PRESENT:
                return None
            table = entry & FRAME_MASK
        found = self._frames.get(table)
        if found is not None:
            self._pages[page] = found
        return found

    def _read_headers(self) -> None:
        """Note where each frame is in the file, and what VMCOREINFO says."""
        fields = FILE_HEADER.unpack_from(self._data)
        magic, class_, encoding, _, kind, machine, _, _, table = fields[:9]
        if (magic, class_, encoding, kind, machine) != (b"\x7fELF", 2, 1, ET_CORE, EM_X86_64):
            raise self._error("no x86-64 ELF core")
        for index in range(fields[13]):
            header = PROGRAM_HEADER.unpack_from(self._data, table + index * PROGRAM_HEADER.size)
            type_, _, offset, _, physical, size = header[:6]
            if offset + size > len(self._data):
                raise self._error(f"segment {index} ends at {offset + size:#x} of {len(self._data):#x}")
            if type_ == PT_LOAD:
                for at in range(0, size - PAGE_SIZE + 1, PAGE_SIZE):
                    self._frames[physical + at] = offset + at
            elif type_ == PT_NOTE:
                for name, text in self._notes(offset, offset + size):
                    if name == b"VMCOREINFO\0":
                        lines = text.decode("ascii", "backslashreplace").splitlines()
                        self.vmcoreinfo |= dict(line.split("=", 1) for line in lines if "=" in line)

    def _notes(self, at: int, end: int) -> Iterator[tuple[bytes, bytes]]:
        while at < end:
            name_size, size, _ = _NOTE.unpack_from(self._data, at)
            name_at = at + _NOTE.size
            text_at = name_at + -(-name_size // 4) * 4
            yield self._data[name_at : name_at + name_size], self._data[text_at : text_at + size]
            at = text_at + -(-size // 4) * 4

    def _error(self, what: str) -> ElfError:
        return ElfError(what, where=self._path, advice="give a core that klpemu saved")
