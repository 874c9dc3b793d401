"""ftrace_hash: the set of addresses an ftrace_ops wants, as a hash table in guest memory.

The list function looks into it with guest code, so the bucket of an address is the kernel's hash_long()
(include/linux/hash.h), and the number of buckets follows dup_hash() of kernel/trace/ftrace.c.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from emu.errno import KernelErrno
from emu.ftrace_64 import GOLDEN_RATIO_64
from emu.slab import Slab
from emu.view import Layouts

__all__ = [
    "FTRACE_HASH_MAX_BITS",
    "alloc_ftrace_hash",
    "entries",
    "free_ftrace_hash",
    "hash_is_empty",
    "lookup_ip",
]

FTRACE_HASH_MAX_BITS = 12


def hash_key(size_bits: int, ip: int) -> int:
    """Index of the bucket of `ip` (ftrace_hash_key())."""
    if not size_bits:
        return 0
    return (ip * GOLDEN_RATIO_64 & 0xFFFF_FFFF_FFFF_FFFF) >> (64 - size_bits)


def alloc_ftrace_hash(layouts: Layouts, slab: Slab, memory: Any, addresses: Iterable[int]) -> Any:
    """A new hash in guest memory that holds `addresses`; a view of its `struct ftrace_hash`."""
    wanted = sorted(set(addresses))
    bits = min((len(wanted) // 2).bit_length(), FTRACE_HASH_MAX_BITS)
    found = layouts.view("ftrace_hash", memory, slab.kzalloc(layouts.sizeof("ftrace_hash"), "ftrace_hash"))
    try:
        found.size_bits = bits
        found.buckets = slab.kzalloc(8 << bits, "ftrace_hash buckets")
        for ip in wanted:
            _add_hash_entry(layouts, slab, memory, found, ip)
    except KernelErrno:
        free_ftrace_hash(slab, found)
        raise
    found.count = len(wanted)
    return found


def _add_hash_entry(layouts: Layouts, slab: Slab, memory: Any, found: Any, ip: int) -> None:
    size = layouts.sizeof("ftrace_func_entry")
    entry = layouts.view("ftrace_func_entry", memory, slab.kzalloc(size, "ftrace_func_entry"))
    entry.ip = ip
    bucket = layouts.view("hlist_head", memory, found.buckets + 8 * hash_key(found.size_bits, ip))
    first = bucket.first
    entry.hlist.next = first
    entry.hlist.pprev = bucket.address_
    if first:
        layouts.view("hlist_node", memory, first).pprev = entry.hlist.address_
    bucket.first = entry.hlist.address_


def free_ftrace_hash(slab: Slab, found: Any) -> None:
    """Free a hash with its buckets and entries."""
    for entry in list(entries(found)) if found.buckets else ():
        slab.kfree(entry.address_)
    slab.kfree(found.buckets)
    slab.kfree(found.address_)


def entries(found: Any) -> Iterator[Any]:
    """Views of all `struct ftrace_func_entry` of a hash, bucket by bucket."""
    for index in range(1 << found.size_bits):
        yield from _bucket(found, index)


def hash_is_empty(found: Any) -> bool:
    """No hash, or one without entries: as a filter it means "all functions" (ftrace_hash_empty())."""
    return found is None or not found.count


def lookup_ip(found: Any, ip: int) -> bool:
    """`ip` is in the hash (ftrace_lookup_ip())."""
    if hash_is_empty(found):
        return False
    return any(entry.ip == ip for entry in _bucket(found, hash_key(found.size_bits, ip)))


def _bucket(found: Any, index: int) -> Iterator[Any]:
    layouts, memory = found.layouts_, found.memory_
    at = layouts.view("hlist_head", memory, found.buckets + 8 * index).first
    while at:
        entry = layouts.view("ftrace_func_entry", memory, at)
        at = entry.hlist.next
        yield entry
