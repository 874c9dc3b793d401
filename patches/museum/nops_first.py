"""What if the nops of a cumulative patch were removed before what it replaces?

A nop stands on top of the func that it hides.  When all tasks have switched, the replaced funcs are
unpatched first and the nops last: at no moment the old func is on top.  The other way round, a task that is
new already gets the old function for as long as it takes to unpatch the rest.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from patches import core
from patches.klp import Klp
from patches.museum import Bug, Kind
from patches.variants import replaced

__all__ = ["BUG", "nops_first"]


@contextmanager
def nops_first() -> Iterator[None]:
    """Discard the nops, then unpatch the replaced patches."""
    unpatch = core.klp_unpatch_replaced_patches

    def klp_unpatch_replaced_patches(klp: Klp, new_patch: Any) -> None:
        core.klp_discard_nops(klp, new_patch)
        unpatch(klp, new_patch)

    with replaced(core, "klp_unpatch_replaced_patches", klp_unpatch_replaced_patches):
        yield


BUG = Bug(
    title="Nops are discarded before the replaced patches are unpatched",
    kind=Kind.COUNTERFACTUAL,
    commit="kept away by the order in klp_complete_transition()",
    invariant="versions_are_never_mixed",
    breaks="klp_discard_nops() comes before klp_unpatch_replaced_patches()",
    bug=nops_first,
)
