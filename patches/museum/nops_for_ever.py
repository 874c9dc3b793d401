"""What if nobody removed the nops?

A nop func decides between old and new while the transition is on.  Afterwards there is nothing to decide:
it keeps a trampoline, an ops and a walk through the handler for a function that nobody patches. d697bad588
removes them; until that commit, one behind the one that brought atomic replace, they stayed, for which
there is a variant that expects it (patches/variants/keep_nops.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from patches import core
from patches.museum import Bug, Kind
from patches.variants import replaced

__all__ = ["BUG", "nops_for_ever"]


@contextmanager
def nops_for_ever() -> Iterator[None]:
    """Discard nothing."""
    with replaced(core, "klp_discard_nops", lambda klp, new_patch: None):
        yield


BUG = Bug(
    title="Nops are never removed",
    kind=Kind.COUNTERFACTUAL,
    commit='kept away by d697bad588 ("livepatch: Remove Nop structures when unused") (in v5.1)',
    invariant="func_stacks_hold_the_patches",
    breaks="klp_discard_nops() does nothing",
    bug=nops_for_ever,
)
