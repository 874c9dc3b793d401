"""Shadow variables: the hash table is whole, and nothing in it has outlived everybody who knows of it."""

from collections.abc import Iterator
from struct import iter_unpack
from typing import Any

from emu.memory import MemoryFault
from patches.invariants.finding import Finding, value_finding
from patches.invariants.subject import Subject
from patches.invariants.walk import entries

__all__ = ["no_shadow_variable_remains", "shadow_variables_are_hashed"]

TABLE = "klp_shadow_hash"
HASH_BITS = 12
ROW = 512  # bytes
EMPTY = bytes(ROW)
EMPTY_TABLE = bytes(8 << HASH_BITS)
GOLDEN_RATIO = 0x61C8_8646_80B5_83EB  # GOLDEN_RATIO_64 of include/linux/hash.h


def shadow_variables_are_hashed(subject: Subject) -> Iterator[Finding | None]:
    """Every shadow variable is in the bucket of its object, linked both ways, in live memory, and the only
    one of its object and id.

    Source: klp_shadow_hash and klp_shadow_lock of kernel/livepatch/shadow.c.
    """
    if TABLE not in subject.symbols:
        return
    invariant = "shadow_variables_are_hashed"
    seen: dict[tuple[int, int], int] = {}
    for bucket, link, at in _nodes(subject):
        shadow = subject.view("klp_shadow", at)
        try:
            pprev, obj, id_ = shadow.node.pprev, shadow.obj, shadow.id
        except MemoryFault:
            what = f"a bucket leads to {at:#x}, which is no memory"
            yield Finding(invariant, what, link, subject.place(link))
            continue
        name, where = f"<{obj:#x}, {id_:x}>", subject.place(at)
        bucket_of_obj = (obj * GOLDEN_RATIO & 0xFFFF_FFFF_FFFF_FFFF) >> (64 - HASH_BITS)
        if pprev != link:
            what = f"the link back of {name} does not lead to the one that leads to it"
            yield value_finding(invariant, what, shadow.node.member_("pprev"), where, link, pprev)
        elif subject.slab is not None and at not in subject.slab.live:
            yield Finding(invariant, f"{name} is in the table and is no object of the heap", at, where)
        elif bucket != bucket_of_obj:
            what = f"{name} is in bucket {bucket}, its object belongs to {bucket_of_obj}"
            yield Finding(invariant, what, at, where)
        elif seen.setdefault((obj, id_), at) != at:
            yield Finding(invariant, f"{name} exists twice, here and at {seen[obj, id_]:#x}", at, where)
        else:
            yield None
    yield None


def no_shadow_variable_remains(subject: Subject) -> Iterator[Finding | None]:
    """A shadow variable goes before the last livepatch module that allocated or freed one of its id.

    The kernel leaves that to the modules.  A cumulative patch that is enabled may have taken them over.

    Source: Documentation/livepatch/shadow-vars.rst: a variable is freed before its parent is, or with all
    of its id.
    """
    if TABLE not in subject.symbols:
        return
    modules = entries(subject, subject.symbols["modules"], "module", "list")
    livepatches = {_name(each) for each in _views(subject, "module", modules) if each.klp}
    patches = entries(subject, subject.symbols["klp_patches"], "klp_patch", "list")
    inherited = any(each.replace for each in _views(subject, "klp_patch", patches))
    for _, _, at in _nodes(subject):
        shadow = subject.view("klp_shadow", at)
        try:
            obj, id_ = shadow.obj, shadow.id
        except MemoryFault:
            continue  # shadow_variables_are_hashed says so
        users = set(subject.shadow_users.get(id_, ()))
        if inherited or (livepatches & users if users else livepatches):
            yield None
            continue
        whose = f" of {', '.join(sorted(users))}" if users else ""
        what = f"shadow variable <{obj:#x}, {id_:x}>{whose} is left behind"
        yield Finding("no_shadow_variable_remains", what, at, subject.place(at))
    yield None


def _nodes(subject: Subject) -> Iterator[tuple[int, int, int]]:
    """Bucket, address of the pointer that leads there, and address, of every node in the table.

    A chain ends behind a node whose link back is wrong: so it has an end, whatever is in it.
    """
    table = subject.symbols[TABLE]
    for bucket, at in _heads(subject.memory.read(table, 8 << HASH_BITS)):
        link = table + 8 * bucket
        while at:
            yield bucket, link, at
            node = subject.view("klp_shadow", at).node
            try:
                if node.pprev != link:
                    break
                link, at = node.member_("next"), node.next
            except MemoryFault:
                break


def _heads(table: bytes) -> Iterator[tuple[int, int]]:
    """Number and first pointer of each bucket that is not empty.  Most are: they are passed by in rows."""
    if table == EMPTY_TABLE:
        return
    for start in range(0, len(table), ROW):
        row = table[start : start + ROW]
        if row != EMPTY:
            yield from (
                (start // 8 + number, head) for number, (head,) in enumerate(iter_unpack("<Q", row)) if head
            )


def _views(subject: Subject, struct: str, addresses: list[int]) -> list[Any]:
    return [subject.view(struct, each) for each in addresses]


def _name(module: Any) -> str:
    name: bytes = module.name
    return name.split(b"\0")[0].decode("ascii", "backslashreplace")
