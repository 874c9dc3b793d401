"""Walking doubly linked lists that may be damaged: always to an end, and past one broken link."""

from collections.abc import Iterator

from emu.memory import MemoryFault, read_u64
from patches.invariants.subject import Subject

__all__ = ["Break", "broken_links", "entries"]

NEXT, PREV, NODE = 0, 8, 16  # of struct list_head, in bytes

# A link that does not agree with the one back: where it is, what it says, and what it should say.
Break = tuple[int, int, int]


def entries(subject: Subject, head: int, struct: str, member: str) -> list[int]:
    """Addresses of the structs on a list, first to last.

    Where a link forwards is broken, the rest is found from the other end, so that one damaged pointer loses
    no entry.
    """
    offset = subject.layouts.offsetof(struct, member)
    forwards, whole = _walk(subject, head, NEXT)
    if not whole:
        backwards, _ = _walk(subject, head, PREV)
        known = set(forwards)
        forwards = [*forwards, *(at for at in reversed(backwards) if at not in known)]
    return [at - offset for at in forwards]


def broken_links(subject: Subject, head: int) -> Iterator[Break]:
    """The links of a list that disagree with the one back; both ways out of a broken place are looked at."""
    forwards, whole = _walk(subject, head, NEXT)
    if whole:
        return
    backwards, _ = _walk(subject, head, PREV)
    last = forwards[-1] if forwards else head
    first = backwards[-1] if backwards else head
    # Between `last` and `first` the two walks do not meet: one of the two links is wrong, or both are.
    for at, direction, wanted in ((last, NEXT, first), (first, PREV, last)):
        found = read_u64(subject.memory, at + direction)
        if found != wanted:
            yield at + direction, found, wanted


def _walk(subject: Subject, head: int, direction: int) -> tuple[list[int], bool]:
    """Nodes in one direction while each agrees with the link back; True if that led back to the head."""
    known = subject.walked.get((head, direction))
    if known is None:
        known = subject.walked[head, direction] = _followed(subject, head, direction)
    return known


def _followed(subject: Subject, head: int, direction: int) -> tuple[list[int], bool]:
    """This ends: a node that came up twice would have to agree with two different links back."""
    found: list[int] = []
    read, back = subject.memory.read, direction ^ PREV
    at = head
    try:
        following = int.from_bytes(read(at + direction, 8), "little")
        while True:
            node = read(following, NODE)  # both of its links at once
            if int.from_bytes(node[back : back + 8], "little") != at:
                return found, False
            if following == head:
                return found, True
            found.append(following)
            at = following
            following = int.from_bytes(node[direction : direction + 8], "little")
    except MemoryFault:
        return found, False
