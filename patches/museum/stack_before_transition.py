"""What if a func were on its func_stack before it is marked as being in transition?

A handler that finds the func and not the mark takes the transition for over: the task gets the new
function, although it has not switched, and may just have called the old version of another.  Therefore
klp_init_transition() comes before klp_patch_object(), with a write barrier between them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from patches import patch
from patches.klp import Klp, klp_for_each_func
from patches.museum import Bug, Kind
from patches.variants import replaced

__all__ = ["BUG", "stack_before_transition"]


@contextmanager
def stack_before_transition() -> Iterator[None]:
    """Mark the funcs of an object once they are on their stacks."""
    patch_object = patch.klp_patch_object

    def klp_patch_object(klp: Klp, obj: Any) -> None:
        for func in klp_for_each_func(obj):
            func.transition = False
        patch_object(klp, obj)
        for func in klp_for_each_func(obj):
            func.transition = True

    with replaced(patch, "klp_patch_object", klp_patch_object):
        yield


BUG = Bug(
    title="The func_stack leads to a func that is not in transition yet",
    kind=Kind.COUNTERFACTUAL,
    commit="kept away by the smp_wmb() in __klp_enable_patch()",
    invariant="versions_are_never_mixed",
    breaks="func->transition is stored behind klp_patch_object()",
    bug=stack_before_transition,
)
