"""Hash tables, their buckets singly headed lists: include/linux/hashtable.h, hash.h, and the hlist of list.h.

The order of the stores is the kernel's.  With the _rcu forms a reader in between sees either the old chain or
the new one.
"""

from collections.abc import Iterator
from typing import Any

from emu.ftrace_64 import GOLDEN_RATIO_64
from emu.view import Layouts

__all__ = [
    "hash_bucket",
    "hash_min",
    "hlist_add_head_rcu",
    "hlist_del_init_rcu",
    "hlist_for_each_entry",
]


def hash_min(key: int, bits: int) -> int:
    """Index of the bucket of a 64-bit key in a table of 1 << bits buckets: hash_64()."""
    return (key * GOLDEN_RATIO_64 & 0xFFFF_FFFF_FFFF_FFFF) >> (64 - bits)


def hash_bucket(layouts: Layouts, memory: Any, table: int, bits: int, key: int) -> Any:
    """The `struct hlist_head` of the key's bucket in the table at guest address `table`."""
    return layouts.view("hlist_head", memory, table + 8 * hash_min(key, bits))


def hlist_add_head_rcu(node: Any, head: Any) -> None:
    """Make `node` the first; it can be reached only once its own pointers are set (rculist.h)."""
    first = head.first
    node.next = first
    node.pprev = head.address_
    head.first = node.address_
    if first:
        _at(head, first).pprev = node.address_


def hlist_del_init_rcu(node: Any) -> None:
    """Unlink `node`, and leave its `next` valid for a reader that stands on it; no-op if it is on no list."""
    pprev = node.pprev
    if not pprev:
        return
    after = node.next
    _head(node, pprev).first = after
    if after:
        _at(node, after).pprev = pprev
    node.pprev = 0


def hlist_for_each_entry(head: Any, name: str, member: str) -> Iterator[Any]:
    """The structs `name` in one bucket, first to last.

    As with the kernel's macro, `next` of the current entry is read when the loop body has run.
    """
    offset = head.layouts_.offsetof(name, member)
    at = head.first
    while at:
        entry = head.layouts_.view(name, head.memory_, at - offset)
        yield entry
        at = getattr(entry, member).next


def _at(near: Any, address: int) -> Any:
    return near.layouts_.view("hlist_node", near.memory_, address)


def _head(near: Any, address: int) -> Any:
    """What `pprev` points to: a head, or the `next` of the node before, which is its first member."""
    return near.layouts_.view("hlist_head", near.memory_, address)
