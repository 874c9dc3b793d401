"""The patches that were replaced went before the new one's post_patch callback was called.

That callback may ask for what the old patches had done to the system, by klp_get_prev_state(), which looks
at the patches that stand before the one in transition.  They had been taken off the list by then, and their
memory was on its way to be freed.  Since then they stay until the transition is over.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from patches import core
from patches.klp import Klp
from patches.museum import Bug, Kind
from patches.variants import replaced

__all__ = ["BUG", "replaced_freed_early"]


@contextmanager
def replaced_freed_early() -> Iterator[None]:
    """Free the replaced patches as soon as they are unpatched (klp_discard_replaced_patches())."""
    unpatch = core.klp_unpatch_replaced_patches

    def klp_discard_replaced_patches(klp: Klp, new_patch: Any) -> None:
        unpatch(klp, new_patch)
        core.klp_free_replaced_patches_async(klp, new_patch)

    with replaced(core, "klp_unpatch_replaced_patches", klp_discard_replaced_patches):
        yield


BUG = Bug(
    title="Replaced patches go before the post_patch callback is called",
    kind=Kind.SHIPPED,
    commit='"livepatch: Keep replaced patches until post_patch callback is called" (in v5.5)',
    invariant="replaced_patches_stay_to_the_end",
    breaks="klp_complete_transition() frees the replaced patches where it unpatches them",
    bug=replaced_freed_early,
)
