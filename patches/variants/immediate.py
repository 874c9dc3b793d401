"""Patches and functions that skip the consistency model: klp_patch.immediate and klp_func.immediate.

They came with the model itself, in d83a7cb375ee ("livepatch: change to a per-task consistency model") (in
v4.12), and went with d0807da78e11 ("livepatch: Remove immediate feature") (in v4.16).  An immediate patch was
meant for a change of no function's and no data's meaning: no task needs to be switched, the new functions are
everybody's at once, and nothing can hold the patch up.  An immediate func was meant for a function that is
always on somebody's stack, such as schedule(): the stack check does not look for it.

Since nobody looked, nobody knows when the last task has left the new code: the module stays loaded for ever.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from elf.errors import KlpemuError
from patches import core, debug, patch, stack_check, transition
from patches.handler import KLP_PATCHED, KLP_UNDEFINED, KLP_UNPATCHED
from patches.klp import Klp, klp_for_each_func, klp_for_each_object
from patches.variants import replaced

__all__ = ["funcs_immediate", "patches_immediate"]


@contextmanager
def patches_immediate(*names: str) -> Iterator[None]:
    """Have `klp_patch.immediate` set in the patches of these names (kernel/livepatch/transition.c of v4.15).

    The life of a disabled patch is that of 6.1, it cannot be enabled again.  Atomic replace is younger than
    v4.16: KlpemuError for a patch that is immediate and replaces.
    """
    init = transition.klp_init_transition
    start = transition.klp_start_transition
    attempt = transition.klp_try_complete_transition
    complete = transition.klp_complete_transition

    def klp_init_transition(klp: Klp, patch_: Any, state: int) -> None:
        name = klp.name_of(patch_)
        if name not in names:
            init(klp, patch_, state)
            return
        if patch_.replace:
            raise KlpemuError(
                f"patch '{name}' is immediate and replaces",
                advice="no kernel had both: v4.16 ended the one, v5.1 brought the other",
            )
        if klp.klp_target_state.get() != KLP_UNDEFINED:
            klp.warn_once("klp_init_transition", "klp_target_state != KLP_UNDEFINED")
        klp.klp_transition_patch.set(patch_)
        klp.klp_target_state.set(state)
        klp.log.pr_debug(
            f"livepatch: '{name}': initializing {_direction(klp)} transition", debug.INITIALIZING
        )

    def klp_start_transition(klp: Klp) -> None:
        name = klp.name_of(klp.transition_patch)
        if name not in names:
            start(klp)
            return
        if klp.klp_target_state.get() == KLP_UNDEFINED:
            klp.warn_once("klp_start_transition", "klp_target_state == KLP_UNDEFINED")
        klp.log.pr_notice(f"livepatch: '{name}': starting {_direction(klp)} transition")

    def klp_try_complete_transition(klp: Klp) -> None:
        patch_ = klp.transition_patch
        if klp.name_of(patch_) not in names:
            attempt(klp)
            return
        if klp.klp_target_state.get() == KLP_UNDEFINED:
            klp.warn_once("klp_try_complete_transition", "klp_target_state == KLP_UNDEFINED")
        transition.klp_complete_transition(klp)
        if not patch_.enabled:
            _keep_module(patch_)
            core.klp_free_patch_async(klp, patch_)

    def klp_complete_transition(klp: Klp) -> None:
        patch_ = klp.transition_patch
        name = klp.name_of(patch_)
        if name not in names:
            complete(klp)
            return
        klp.log.pr_debug(f"livepatch: '{name}': completing {_direction(klp)} transition", debug.COMPLETING)
        if klp.klp_target_state.get() == KLP_UNPATCHED:
            patch.klp_unpatch_objects(klp, patch_)
            klp.machine.synchronize("klp_synchronize_transition")
        klp.log.pr_notice(f"livepatch: '{name}': {_direction(klp)} complete")
        klp.klp_target_state.set(KLP_UNDEFINED)
        klp.klp_transition_patch.set(0)

    with (
        replaced(transition, "klp_init_transition", klp_init_transition),
        replaced(transition, "klp_start_transition", klp_start_transition),
        replaced(transition, "klp_try_complete_transition", klp_try_complete_transition),
        replaced(transition, "klp_complete_transition", klp_complete_transition),
    ):
        yield


@contextmanager
def funcs_immediate(*old_names: str) -> Iterator[None]:
    """Have `klp_func.immediate` set in the funcs that patch these functions.

    Tasks are switched as ever, but for all the stack check knows these functions are on no stack.
    """
    checked_function = stack_check.checked_function
    complete = transition.klp_complete_transition

    def immediate(klp: Klp, func: Any) -> stack_check.CheckedFunction:
        checked = checked_function(klp, func)
        return replace(checked, end=checked.start) if checked.old_name in old_names else checked

    def klp_complete_transition(klp: Klp) -> None:
        patch_, target = klp.transition_patch, klp.klp_target_state.get()
        complete(klp)
        if target == KLP_UNPATCHED and any(name in old_names for name in _old_names(klp, patch_)):
            _keep_module(patch_)

    with (
        replaced(stack_check, "checked_function", immediate),
        replaced(transition, "klp_complete_transition", klp_complete_transition),
    ):
        yield


def _keep_module(patch_: Any) -> None:
    """Keep the reference to the patch's module; 6.1 has a reason of its own to do that, and a flag for it."""
    patch_.forced = True


def _direction(klp: Klp) -> str:
    return "patching" if klp.klp_target_state.get() == KLP_PATCHED else "unpatching"


def _old_names(klp: Klp, patch_: Any) -> list[str]:
    return [
        klp.string(func.old_name) for obj in klp_for_each_object(patch_) for func in klp_for_each_func(obj)
    ]
