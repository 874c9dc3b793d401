"""The hash table of shadow variables, walked here: independent of everything klpemu has for it."""

from dataclasses import dataclass
from struct import unpack

from livepatches import Raw

from klpemu import Kernel

__all__ = ["Variable", "bucket_of", "neighbours", "variables"]

BUCKETS = 4096
HEADER = 48  # sizeof(struct klp_shadow) of Debian's 6.1: node, rcu_head, obj, id
NEXT, PPREV, OBJ, ID = 0, 8, 32, 40


@dataclass(frozen=True)
class Variable:
    """One entry: its bucket, the address of its struct, and what is in it."""

    bucket: int
    address: int
    obj: int
    id: int

    @property
    def data(self) -> int:
        """Address of the data."""
        return self.address + HEADER


def bucket_of(obj: int) -> int:
    """hash_64(obj, 12): the product's upper twelve bits (include/linux/hash.h)."""
    return obj * 0x61C8864680B583EB % 2**64 // 2**52


def neighbours(count: int) -> list[int]:
    """So many addresses of objects that share a bucket."""
    first = 0xFFFF_8880_1234_5000
    return [
        each
        for each in range(first, first + (count + 2) * 16 * 2 * BUCKETS, 16)
        if bucket_of(each) == bucket_of(first)
    ][:count]


def variables(kernel: Kernel) -> list[Variable]:
    """All shadow variables, in the order of the table; fails where the links do not agree."""
    raw = Raw(kernel)
    table = raw.symbol("klp_shadow_hash")
    found = []
    for bucket, at in enumerate(unpack(f"<{BUCKETS}Q", raw.space.read(table, 8 * BUCKETS))):
        link = table + 8 * bucket
        while at:
            assert raw.u64(at + PPREV) == link
            found.append(Variable(bucket, at, raw.u64(at + OBJ), raw.u64(at + ID)))
            link, at = at + NEXT, raw.u64(at + NEXT)
    return found
