"""ftrace's state as guest memory has it: the records, the registered ops, and the addresses each of them
wants.

Read without any of the code that keeps it, and without trust: whatever is damaged, reading ends, and what
could not be read is in `FtraceState`.
"""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import compress
from struct import Struct
from typing import Any

from emu.kallsyms import Kallsyms
from emu.memory import Memory, MemoryFault, read_u64
from emu.view import Layouts

__all__ = ["Damage", "FtraceState", "RegisteredOps", "read_ftrace"]

OPS_FL_ENABLED = 1 << 0
OPS_FL_STUB = 1 << 5
FTRACE_HASH_MAX_BITS = 12
GOLDEN_RATIO_64 = 0x61C8_8646_80B5_83EB  # include/linux/hash.h
RECORD = Struct("<QQ")  # ip, flags


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that cannot be what the kernel put there: what, and the guest virtual address of it."""

    what: str
    address: int


@dataclass(frozen=True, slots=True)
class RegisteredOps:
    """One ops of ftrace_ops_list: a read-only view, and the sites its hashes select."""

    ops: Any
    addresses: frozenset[int]


@dataclass(slots=True, eq=False)
class FtraceState:
    """The records, the ops newest first, and what was not readable.

    `ips` are the addresses that have a record, `flags` those of the records that have any.  `tables` are the
    arrays of records: address, and bytes of each.  `list_damage` is of ftrace_ops_list itself, `hash_damage`
    of the hashes, `record_damage` of the record pages.
    """

    ips: frozenset[int] = frozenset()
    flags: dict[int, int] = field(default_factory=dict)
    tables: list[tuple[int, bytes]] = field(default_factory=list)
    ops: list[RegisteredOps] = field(default_factory=list)
    record_damage: list[Damage] = field(default_factory=list)
    list_damage: list[Damage] = field(default_factory=list)
    hash_damage: list[Damage] = field(default_factory=list)

    def record_at(self, ip: int) -> int:
        """Guest virtual address of the last record that says `ip`."""
        return max(
            table + RECORD.size * index
            for table, rows in self.tables
            for index, row in enumerate(RECORD.iter_unpack(rows))
            if row[0] == ip
        )


def read_ftrace(
    memory: Memory, layouts: Layouts, kallsyms: Kallsyms, pointer: Callable[[str], int], end: int, sites: int
) -> FtraceState:
    """All of it; `pointer` reads a global, `end` is ftrace_list_end, `sites` how many sites there are."""
    state = FtraceState()
    _read_records(state, memory, layouts, pointer("ftrace_pages_start"), sites)
    for ops in _each_ops(state, memory, layouts, kallsyms, pointer("ftrace_ops_list"), end):
        state.ops.append(RegisteredOps(ops, _wanted(state, memory, layouts, ops)))
    return state


def _read_records(state: FtraceState, memory: Memory, layouts: Layouts, start: int, sites: int) -> None:
    at, seen = start, set[int]()
    while at:
        if at in seen:
            state.record_damage.append(Damage("the list of ftrace_pages goes in a circle", at))
            return
        seen.add(at)
        page = layouts.view("ftrace_page", memory, at)
        try:
            count, records, at = page.index, page.records, page.next
            if not 0 <= count <= sites - len(state.ips):
                what = f"an ftrace_page counts {count} records, {sites - len(state.ips)} are possible"
                state.record_damage.append(Damage(what, page.member_("index")))
                continue
            data = memory.read(records, RECORD.size * count)
        except MemoryFault as fault:
            what = f"an ftrace_page leads to unmapped {fault.address:#x}"
            state.record_damage.append(Damage(what, page.address_))
            return
        ips, flags = _columns(data)
        for ip in ips & state.flags.keys():  # a second record of one address
            del state.flags[ip]
        state.flags.update(flags)
        state.ips = state.ips | ips if state.ips else ips
        state.tables.append((records, data))


def _columns(data: bytes) -> tuple[frozenset[int], dict[int, int]]:
    """The addresses that records are of, and the flags of those that have any."""
    words = array("Q", data)
    ips, flags = words[::2], words[1::2]
    busy = {ips[index]: flags[index] for index in compress(range(len(flags)), flags)}
    return _set_of(ips.tobytes()), busy


@lru_cache(maxsize=64)
def _set_of(words: bytes) -> frozenset[int]:
    """The same 40,000 numbers at each step."""
    return frozenset(array("Q", words))


def _each_ops(
    state: FtraceState, memory: Memory, layouts: Layouts, kallsyms: Kallsyms, first: int, end: int
) -> Iterator[Any]:
    """The ops up to ftrace_list_end, or up to the first thing that is none."""
    at, seen = first, set[int]()
    while at != end:
        if at in seen:
            state.list_damage.append(Damage("ftrace_ops_list goes in a circle", at))
            return
        seen.add(at)
        ops = layouts.view("ftrace_ops", memory, at)
        try:
            following, flags, func = ops.next, ops.flags, ops.func
            ops.trampoline, ops.func_hash  # noqa: B018  the whole struct must be there
        except MemoryFault:
            state.list_damage.append(Damage(f"ftrace_ops_list leads to unmapped {at:#x}", at))
            return
        symbol = kallsyms.at(func)
        if not flags & OPS_FL_ENABLED or symbol is None or symbol.address != func:
            what = f"ftrace_ops_list leads to {at:#x}, which is no registered ftrace_ops"
            state.list_damage.append(Damage(what, at))
            return
        yield ops
        at = following


def _wanted(state: FtraceState, memory: Memory, layouts: Layouts, ops: Any) -> frozenset[int]:
    """The sites an ops is called for: those in its filter, all if that is empty, less those in notrace."""
    try:
        hashes = layouts.view("ftrace_ops_hash", memory, ops.func_hash)
        wanted = set(_entries(state, memory, layouts, hashes.filter_hash)) or set(state.ips)
        wanted -= set(_entries(state, memory, layouts, hashes.notrace_hash))
    except MemoryFault as fault:
        state.hash_damage.append(
            Damage(f"a hash of the ops leads to unmapped {fault.address:#x}", ops.address_)
        )
        return frozenset()
    return frozenset(wanted)


def _entries(state: FtraceState, memory: Memory, layouts: Layouts, address: int) -> Iterator[int]:
    """The addresses in a hash, bucket by bucket; each bucket's links and each entry's place are checked."""
    if not address:
        return
    found = layouts.view("ftrace_hash", memory, address)
    bits, count, buckets, number = found.size_bits, found.count, found.buckets, 0
    if not count:
        return
    if bits > FTRACE_HASH_MAX_BITS:
        state.hash_damage.append(
            Damage(
                f"a hash has size_bits {bits:#x}, at most {FTRACE_HASH_MAX_BITS}", found.member_("size_bits")
            )
        )
        return
    for index in range(1 << bits):
        link, seen = buckets + 8 * index, set[int]()
        while at := read_u64(memory, link):
            if at in seen:
                state.hash_damage.append(Damage("a bucket of a hash goes in a circle", at))
                break
            seen.add(at)
            entry = layouts.view("ftrace_func_entry", memory, at)
            ip, back = entry.ip, entry.hlist.pprev
            if back != link:
                what = f"a hash entry's pprev is {back:#x}, it hangs at {link:#x}"
                state.hash_damage.append(Damage(what, at))
            if _bucket_of(bits, ip) != index:
                what = f"{ip:#x} is in bucket {index} of a hash, a lookup looks in {_bucket_of(bits, ip)}"
                state.hash_damage.append(Damage(what, at))
            number += 1
            yield ip
            link = at
    if number != count:
        state.hash_damage.append(
            Damage(f"a hash counts {count} entries and has {number}", found.member_("count"))
        )


def _bucket_of(bits: int, ip: int) -> int:
    """hash_long(): the upper bits of the product."""
    return (ip * GOLDEN_RATIO_64 % (1 << 64)) >> (64 - bits) if bits else 0
