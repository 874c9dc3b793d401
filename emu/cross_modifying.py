"""Cross-modifying code: which bytes another CPU may fetch while text is being changed.

This model is ours.  The SDM (Vol. 3A, "Handling Self- and Cross-Modifying Code") leaves undefined what a CPU
executes that has not serialised since another one stored to its code; Linux's protocol rests on what the
vendors have assured beyond that (the comments in arch/x86/kernel/alternative.c).  Here a CPU that has not
serialised since a store to text may fetch, for each byte, the value before that store or the one after, and
so of every store since; a sync, which makes all CPUs serialise, leaves the last values only.

A change is safe if everything that can be fetched at each of its moments begins with the breakpoint, or is
the old instruction, or the new one.  It must be so wherever a CPU can be about to fetch: at the site, and
behind each instruction of the old text but the last.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from emu.assembly import disassemble

__all__ = ["SYNC", "Fetch", "Store", "TextFetches", "check_change", "entry_points"]

INT3 = 0xCC  # SDM Vol. 2A, INT3


@dataclass(frozen=True, slots=True)
class Store:
    """One store to text: bytes at an offset from the site."""

    offset: int
    data: bytes


SYNC = None  # in a sequence of stores: every CPU has serialised


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bytes that a CPU can fetch `offset` bytes behind the site and must not.

    `moment` is the number of stores and syncs until then.
    """

    offset: int
    data: bytes
    moment: int


class TextFetches:
    """For each byte that was stored to since the last sync, every value that may be fetched there."""

    def __init__(self) -> None:
        self._values: dict[int, list[int]] = {}

    @property
    def pending(self) -> bool:
        """Some CPU may not have seen all stores."""
        return bool(self._values)

    def store(self, address: int, before: bytes, after: bytes) -> None:
        """Text at `address` was `before`, and is `after` now."""
        for at, (old, new) in enumerate(zip(before, after, strict=True), address):
            values = self._values.setdefault(at, [old])
            if new not in values:
                values.append(new)

    def sync(self) -> None:
        """Every CPU has serialised: only what is there is fetched."""
        self._values.clear()

    def possible(self, address: int, now: bytes) -> Iterator[bytes]:
        """All that may be fetched at `address`, where the bytes are `now`."""
        return map(bytes, product(*(self._values.get(at, (byte,)) for at, byte in enumerate(now, address))))


def entry_points(text: bytes) -> list[int]:
    """Offsets at which an instruction of `text` begins: a CPU may be about to fetch there."""
    return list(_entry_points(text))


@lru_cache(maxsize=1024)  # the same few sites are changed again and again
def _entry_points(text: bytes) -> tuple[int, ...]:
    starts, end = [], 0
    for each in disassemble(text, 0):
        starts.append(each.address)
        end = each.address + len(each.code)
    return tuple(starts) if end == len(text) else (0,)


def check_change(
    old: bytes, new: bytes, stores: Iterable[Store | None], entries: Sequence[int] | None = None
) -> list[Fetch]:
    """What can be fetched and must not, when the text `old` becomes `new` by these stores and syncs.

    `entries` are the offsets at which a CPU may be about to fetch, by default those of `old`.
    """
    fetches, now, wrong = TextFetches(), bytearray(old), list[Fetch]()
    seen: set[tuple[int, bytes]] = set()
    new_entries = _entry_points(new)
    starts = _entry_points(old) if entries is None else entries
    for moment, store in enumerate(stores, 1):
        if store is None:
            fetches.sync()
        else:
            end = store.offset + len(store.data)
            fetches.store(store.offset, bytes(now[store.offset : end]), store.data)
            now[store.offset : end] = store.data
        for offset in starts:
            whole = (old[offset:], new[offset:]) if offset in new_entries else (old[offset:],)
            for data in fetches.possible(offset, bytes(now[offset:])):
                if data[0] == INT3 or data in whole or (offset, data) in seen:
                    continue
                seen.add((offset, data))
                wrong.append(Fetch(offset, data, moment))
    return wrong
