"""What if the tail were stored right behind the int3?

The sync behind the int3 makes every CPU see it before the tail changes.  Without that sync a CPU may still
fetch the old first byte and already the new tail: a NOP with another operand at best, and where a call goes
to another address a call of something in between.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from emu.text_poke import INT3, TextPokeLoc, TextPoker
from patches.museum import Bug, Kind
from patches.variants import replaced

__all__ = ["BUG", "missing_sync"]


@contextmanager
def missing_sync() -> Iterator[None]:
    """Leave out the sync between the int3 and the tail."""

    def text_poke_bp_batch(poker: TextPoker, batch: list[TextPokeLoc]) -> None:
        poker._patching = batch
        for site in batch:
            poker._store(site.address, bytes([INT3]), "int3")
            poker._store(site.address + 1, site.text[1:], "tail")
        poker._sync("text_poke_sync")
        for site in batch:
            poker._store(site.address, site.text[:1], "first byte")
        poker._sync("text_poke_sync")
        poker._patching = []

    with replaced(TextPoker, "_text_poke_bp_batch", text_poke_bp_batch):
        yield


BUG = Bug(
    title="No sync between the int3 and the tail",
    kind=Kind.COUNTERFACTUAL,
    commit="kept away by the first text_poke_sync() of text_poke_bp_batch()",
    invariant="every_fetch_is_an_instruction",
    breaks="text_poke_bp_batch() stores the tail without a sync before it",
    bug=missing_sync,
)
