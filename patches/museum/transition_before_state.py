"""What if func->transition were set before the tasks have a state?

klp_init_transition() gives every task its initial patch_state, and only then marks the funcs: a handler
that sees the mark goes by the state of its task.  With the mark first, a call of a patched function in
between finds KLP_UNDEFINED there, and the handler has nothing to go by.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from patches import transition
from patches.klp import Klp, klp_for_each_func, klp_for_each_object
from patches.museum import Bug, Kind
from patches.variants import replaced

__all__ = ["BUG", "transition_before_state"]


@contextmanager
def transition_before_state() -> Iterator[None]:
    """Mark the funcs first."""
    init = transition.klp_init_transition

    def klp_init_transition(klp: Klp, patch_: Any, state: int) -> None:
        for obj in klp_for_each_object(patch_):
            for func in klp_for_each_func(obj):
                func.transition = True
        init(klp, patch_, state)

    with replaced(transition, "klp_init_transition", klp_init_transition):
        yield


BUG = Bug(
    title="func->transition is set before the tasks have their state",
    kind=Kind.COUNTERFACTUAL,
    commit="kept away by the smp_wmb() in klp_init_transition()",
    invariant="the_kernel_does_not_warn",
    breaks="klp_init_transition() marks the funcs before the loops over the tasks",
    bug=transition_before_state,
)
