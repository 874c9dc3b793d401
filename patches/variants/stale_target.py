"""Immediate patches with a stale target state: the second RFC of the per-task model, April 2016.

[RFC PATCH v2 17/18] "livepatch: change to a per-task consistency model" set klp_target_state at the end of
klp_init_transition(), which an immediate patch had left by then, and nothing set it back afterwards.  So the
last transition's target counted for an immediate patch, too; before the first transition that was
KLP_UNPATCHED, the 0 of a static variable.  What was merged, d83a7cb375ee ("livepatch: change to a per-task
consistency model") (in v4.12), stores the target state first, has it begin and end as KLP_UNDEFINED, and
warns where it is not what it must be.

The RFC is known here by its description; its text could not be read again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from patches import transition
from patches.handler import KLP_UNDEFINED, KLP_UNPATCHED
from patches.klp import Klp
from patches.variants import replaced
from patches.variants.immediate import patches_immediate

__all__ = ["target_state_stale"]


@contextmanager
def target_state_stale(*names: str) -> Iterator[None]:
    """Have the patches of these names immediate, as in the second RFC."""
    seen: list[Klp] = []

    def klp_init_transition(klp: Klp, patch_: Any, state: int) -> None:
        if klp not in seen:
            seen.append(klp)
            klp.klp_target_state.set(KLP_UNPATCHED)
        if klp.name_of(patch_) in names:
            klp.klp_transition_patch.set(patch_)
            return  # and the target state is what it was
        klp.klp_target_state.set(KLP_UNDEFINED)  # for the reference's WARN, which the RFC had not
        init(klp, patch_, state)

    def klp_complete_transition(klp: Klp) -> None:
        target = klp.klp_target_state.get()
        complete(klp)
        klp.klp_target_state.set(target)

    with patches_immediate(*names):
        init = transition.klp_init_transition
        complete = transition.klp_complete_transition
        with (
            replaced(transition, "klp_init_transition", klp_init_transition),
            replaced(transition, "klp_complete_transition", klp_complete_transition),
        ):
            try:
                yield
            finally:
                for klp in seen:
                    if klp.transition_patch is None:
                        klp.klp_target_state.set(KLP_UNDEFINED)
