"""The kernel's ORC unwind tables, `.orc_unwind_ip` and `.orc_unwind`.

Source: arch/x86/include/asm/orc_types.h of 6.1.
Entry i holds from address i up to the next one.  An address is stored as the distance from its own field.
"""

import bisect
import struct
from dataclasses import dataclass
from operator import lt

from elf.errors import ElfError
from elf.unwind_row import FrameBase, FrameKind, UnwindRow

__all__ = ["OrcTable", "read_orc"]

_ENTRY = struct.Struct("<hhH")
_UNDEFINED, _PREV_SP, _BP = 0, 1, 4
_BASES = {
    0: FrameBase.UNDEFINED,
    2: FrameBase.DX,
    3: FrameBase.DI,
    4: FrameBase.BP,
    5: FrameBase.SP,
    6: FrameBase.R10,
    7: FrameBase.R13,
    8: FrameBase.BP_INDIRECT,
    9: FrameBase.SP_INDIRECT,
}
_KINDS = {0: FrameKind.CALL, 1: FrameKind.REGS, 2: FrameKind.REGS_PARTIAL}


@dataclass(frozen=True, slots=True)
class OrcTable:
    """The entries of one object, sorted by guest virtual address."""

    addresses: list[int]
    entries: list[tuple[int, int, int]]

    def row_at(self, address: int) -> UnwindRow | None:
        """The row that holds at `address`: the rightmost entry at or below it, as __orc_find() takes it."""
        index = bisect.bisect_right(self.addresses, address) - 1
        if index < 0:
            return None
        return _row(*self.entries[index])


def read_orc(ips: bytes, entries: bytes, address: int) -> OrcTable:
    """Decode relocated tables; `address` is where `.orc_unwind_ip` lies in guest memory.

    Raises ElfError if the two tables do not belong together.
    """
    if len(ips) % 4 or len(entries) != len(ips) // 4 * _ENTRY.size:
        raise ElfError(
            f".orc_unwind_ip has {len(ips)} bytes and .orc_unwind {len(entries)}",
            advice=f"each entry takes 4 bytes in the one and {_ENTRY.size} in the other",
        )
    addresses = [
        (address + 4 * index + distance) % 2**64
        for index, (distance,) in enumerate(struct.iter_unpack("<i", ips))
    ]
    decoded = list(_ENTRY.iter_unpack(entries))
    if not all(map(lt, addresses, addresses[1:])):  # a linked image's are sorted but for some that are equal
        # A section's terminator counts less than a real entry at the same address (orc_sort_cmp()).
        order = sorted(
            range(len(addresses)), key=lambda index: (addresses[index], not _is_terminator(decoded[index]))
        )
        addresses, decoded = [addresses[index] for index in order], [decoded[index] for index in order]
    return OrcTable(addresses, decoded)


def _is_terminator(entry: tuple[int, int, int]) -> bool:
    return entry[2] & 0xF == _UNDEFINED and not entry[2] >> 10 & 1


def _row(sp_offset: int, bp_offset: int, packed: int) -> UnwindRow | None:
    base, bp_reg = packed & 0xF, packed >> 4 & 0xF
    kind, end = packed >> 8 & 3, packed >> 10 & 1
    if base == _UNDEFINED:
        return UnwindRow(FrameBase.UNDEFINED, 0, kind=FrameKind.END) if end else None
    if base not in _BASES or kind not in _KINDS or bp_reg not in (_UNDEFINED, _PREV_SP, _BP):
        return None
    kept = None if bp_reg == _UNDEFINED else bp_offset
    return UnwindRow(_BASES[base], sp_offset, kept, bp_reg == _BP, _KINDS[kind])
