"""The tables that say where a kernel rewrites its own text while it is loaded.

Each reader takes the bytes of one table, relocated, and the virtual address at which they lie: the entries
are place-relative, so a relocated module and a linked vmlinux read alike.  Addresses in the results are
virtual; bad sizes raise `ElfError`.
"""

from collections.abc import Iterator
from struct import Struct
from typing import Final, NamedTuple

from elf.errors import ElfError

__all__ = [
    "ALTINSTR_FLAG_INV",
    "AltInstr",
    "JumpEntry",
    "ParavirtPatchSite",
    "StaticCallSite",
    "alt_instrs",
    "jump_entries",
    "paravirt_patch_sites",
    "place_relative",
    "static_call_sites",
    "static_call_tramp_keys",
]

ALTINSTR_FLAG_INV: Final = 1 << 15  # arch/x86/include/asm/alternative.h
JUMP_TYPE_MASK: Final = 3  # include/linux/jump_label.h
STATIC_CALL_SITE_FLAGS: Final = 3  # include/linux/static_call_types.h
_ADDRESS_BITS: Final = (1 << 64) - 1

_S32: Final = Struct("<i")
_ALT_INSTR: Final = Struct("<iiHBB")
_PARAVIRT: Final = Struct("<QBB6x")
_STATIC_CALL: Final = Struct("<ii")
_JUMP_ENTRY: Final = Struct("<iiq")


class AltInstr(NamedTuple):
    """struct alt_instr: what stands at `instr` becomes `replacement` if the CPU has feature `cpuid`.

    `cpuid` is word * 32 + bit, with ALTINSTR_FLAG_INV if the feature must be missing; lengths in bytes.
    """

    instr: int
    replacement: int
    cpuid: int
    instrlen: int
    replacementlen: int


class ParavirtPatchSite(NamedTuple):
    """struct paravirt_patch_site: an indirect call through slot `type` of pv_ops, `len` bytes long."""

    instr: int
    type: int
    len: int


class StaticCallSite(NamedTuple):
    """struct static_call_site: `key` is a static_call_key, or a trampoline if the key is not exported."""

    addr: int
    key: int
    is_tail: bool


class JumpEntry(NamedTuple):
    """struct jump_entry: `code` becomes a jump to `target` if `key`'s state differs from `branch`."""

    code: int
    target: int
    key: int
    branch: bool


def alt_instrs(data: bytes, address: int) -> Iterator[AltInstr]:
    """`.altinstructions` in the order in which the kernel applies it."""
    rows = _rows(_ALT_INSTR, data, ".altinstructions")
    for at, (instr, replacement, cpuid, instrlen, replacementlen) in zip(
        range(address, address + len(data), _ALT_INSTR.size), rows, strict=True
    ):
        yield AltInstr(at + instr, at + 4 + replacement, cpuid, instrlen, replacementlen)


def place_relative(data: bytes, address: int, table: str) -> list[int]:
    """`.retpoline_sites`, `.return_sites`, `.ibt_endbr_seal` and `.smp_locks`: one place each.

    alternatives_smp_unlock() skips entries that are 0, and so does this.
    """
    rows = _rows(_S32, data, table)
    return [at + row[0] for at, row in _at_addresses(address, 4, rows) if row[0]]


def paravirt_patch_sites(data: bytes) -> list[ParavirtPatchSite]:
    """`.parainstructions`; its addresses are absolute."""
    return [ParavirtPatchSite(*row) for row in _rows(_PARAVIRT, data, ".parainstructions")]


def static_call_sites(data: bytes, address: int) -> list[StaticCallSite]:
    """`.static_call_sites`."""
    sites = []
    for at, (addr, key) in _at_addresses(address, 8, _rows(_STATIC_CALL, data, ".static_call_sites")):
        value = at + 4 + key
        sites.append(StaticCallSite(at + addr, value & ~STATIC_CALL_SITE_FLAGS, bool(value & 1)))
    return sites


def static_call_tramp_keys(data: bytes, address: int) -> dict[int, int]:
    """`.static_call_tramp_key`: the key of each trampoline that modules may call, but not update."""
    rows = _rows(_STATIC_CALL, data, ".static_call_tramp_key")
    return {at + tramp: at + 4 + key for at, (tramp, key) in _at_addresses(address, 8, rows)}


def jump_entries(data: bytes, address: int) -> list[JumpEntry]:
    """`__jump_table`, in file order: the kernel sorts it by key when it is loaded."""
    entries = []
    for at, (code, target, key) in _at_addresses(address, 16, _rows(_JUMP_ENTRY, data, "__jump_table")):
        found = (at + 8 + (key & ~JUMP_TYPE_MASK)) & _ADDRESS_BITS
        entries.append(JumpEntry(at + code, at + 4 + target, found, bool(key & 1)))
    return entries


def _at_addresses(
    address: int, size: int, rows: Iterator[tuple[int, ...]]
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Each row with the address at which it lies."""
    for row in rows:
        yield address, row
        address += size


def _rows(layout: Struct, data: bytes, table: str) -> Iterator[tuple[int, ...]]:
    if len(data) % layout.size:
        raise ElfError(
            f"{len(data)} bytes are no whole number of {layout.size}-byte entries",
            where=table,
            advice="the object was built for a kernel with another layout of this table",
        )
    return layout.iter_unpack(data)
