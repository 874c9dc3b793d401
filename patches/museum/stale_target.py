"""An immediate patch went by the target state that the last transition had left.

The second RFC of the per-task model stored the target state at the end of klp_init_transition(), which an
immediate patch had left before.  The code that completes a transition asked for it nevertheless: a patch
that was to be enabled was unpatched in the same call, or the other way round.  What was merged stores it
first, and resets it at the end.  Who found it in review is not known to us.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from patches.museum import Bug, Kind
from patches.variants.stale_target import target_state_stale

__all__ = ["BUG", "stale_target"]


@contextmanager
def stale_target() -> Iterator[None]:
    """Have the patch of the scenario immediate, as in the RFC."""
    with target_state_stale("fix_area"):
        yield


BUG = Bug(
    title="The stale target state of immediate patches",
    kind=Kind.CAUGHT,
    commit='d83a7cb375ee ("livepatch: change to a per-task consistency model") (in v4.12)',
    invariant="func_stacks_hold_the_patches",
    breaks="klp_init_transition() as in the second RFC of April 2016 (patches/variants/stale_target.py)",
    bug=stale_target,
)
