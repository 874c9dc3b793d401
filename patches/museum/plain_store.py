"""What if a site were changed by one store of five bytes?

A store of five bytes that crosses a boundary is seen in two parts, and another CPU may have fetched half of
the old instruction before it.  Which bytes a CPU fetches that has not serialised since is not defined; with
the first byte of one instruction and the rest of the other, it calls an address that nobody has written.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from emu.text_poke import TextPokeLoc, TextPoker
from patches.museum import Bug, Kind
from patches.variants import replaced

__all__ = ["BUG", "plain_store"]


@contextmanager
def plain_store() -> Iterator[None]:
    """Store the new instruction, then sync."""

    def text_poke_bp_batch(poker: TextPoker, batch: list[TextPokeLoc]) -> None:
        poker._patching = batch
        for site in batch:
            poker._store(site.address, site.text, "all five bytes")
        poker._sync("text_poke_sync")
        poker._patching = []

    with replaced(TextPoker, "_text_poke_bp_batch", text_poke_bp_batch):
        yield


BUG = Bug(
    title="A plain store of five bytes",
    kind=Kind.COUNTERFACTUAL,
    commit="kept away by the int3 of text_poke_bp_batch()",
    invariant="every_fetch_is_an_instruction",
    breaks="text_poke_bp_batch() is one store and one sync",
    bug=plain_store,
)
