"""System states that livepatches modify, and which patch can follow which: kernel/livepatch/state.c."""

from collections.abc import Iterator
from typing import Any

from patches.exports import klp_export
from patches.klp import Klp

__all__ = ["klp_for_each_state", "klp_get_prev_state", "klp_get_state", "klp_is_patch_compatible"]


def klp_for_each_state(klp: Klp, patch: Any) -> Iterator[Any]:
    """The states of a patch: an array that ends with id 0."""
    at, size = patch.states, klp.machine.layouts.sizeof("klp_state")
    while at and (state := klp.machine.view("klp_state", at)).id:
        yield state
        at += size


@klp_export
def klp_get_state(klp: Klp, patch: int, id: int) -> int:
    """Address of the klp_state `id` of a klp_patch; 0 if the patch does not modify that state."""
    states = klp_for_each_state(klp, klp.machine.view("klp_patch", patch))
    return next((state.address_ for state in states if state.id == id), 0)


@klp_export
def klp_get_prev_state(klp: Klp, id: int) -> int:
    """Address of the newest klp_state `id` of the patches before the one in transition, or 0."""
    if klp.transition_patch is None:
        klp.warn_once("klp_get_prev_state", "!klp_transition_patch")
        return 0
    last = 0
    for patch in klp.patches():
        if patch == klp.transition_patch:
            break
        last = klp_get_state(klp, patch.address_, id) or last
    return last


def klp_is_patch_compatible(klp: Klp, patch: Any) -> bool:
    """The patch can deal with what the enabled ones have done to the system.

    A cumulative patch must know every state that they modify; none may bring an older version of one.
    """
    return all(
        _is_state_compatible(klp, patch, old_state)
        for old_patch in klp.patches()
        for old_state in klp_for_each_state(klp, old_patch)
    )


def _is_state_compatible(klp: Klp, patch: Any, old_state: Any) -> bool:
    address = klp_get_state(klp, patch.address_, old_state.id)
    if not address:
        return not patch.replace
    version: int = klp.machine.view("klp_state", address).version
    return version >= int(old_state.version)
