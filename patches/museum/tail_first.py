"""What if the tail came before the int3?

The order of the stores is the whole protocol: the int3 closes the site, the tail is changed behind it, the
first byte opens it.  With the tail first, the site is open while half of it is new, syncs or no syncs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from emu.text_poke import TextPokeLoc, TextPoker
from patches.museum import Bug, Kind
from patches.variants import replaced

__all__ = ["BUG", "tail_first"]


@contextmanager
def tail_first() -> Iterator[None]:
    """Store the tail into the open site."""

    def text_poke_bp_batch(poker: TextPoker, batch: list[TextPokeLoc]) -> None:
        poker._patching = batch
        for site in batch:
            poker._store(site.address + 1, site.text[1:], "tail")
        poker._sync("text_poke_sync")
        for site in batch:
            poker._store(site.address, site.text[:1], "first byte")
        poker._sync("text_poke_sync")
        poker._patching = []

    with replaced(TextPoker, "_text_poke_bp_batch", text_poke_bp_batch):
        yield


BUG = Bug(
    title="The tail of the new instruction first",
    kind=Kind.COUNTERFACTUAL,
    commit="kept away by the order in text_poke_bp_batch()",
    invariant="every_fetch_is_an_instruction",
    breaks="text_poke_bp_batch() stores the tail, then the first byte, and no int3",
    bug=tail_first,
)
