"""A livepatch's own code around the patching of an object: kernel/livepatch/core.h.

The callbacks are guest functions that get the klp_object; they run on the stack of the task that enables,
disables, or completes the transition.  post_unpatch is only called if pre_patch did not fail, and one that is
not there counts as one that did not fail.
"""

from typing import Any

from elf.errors import KlpemuError
from patches.klp import Klp

__all__ = [
    "klp_post_patch_callback",
    "klp_post_unpatch_callback",
    "klp_pre_patch_callback",
    "klp_pre_unpatch_callback",
]


def klp_pre_patch_callback(klp: Klp, obj: Any) -> int:
    """Before an object is patched; anything but 0 refuses the patch."""
    result = _call(klp, obj, "pre_patch")
    obj.callbacks.post_unpatch_enabled = not result
    return result


def klp_post_patch_callback(klp: Klp, obj: Any) -> None:
    """All tasks have switched to the patched object."""
    _notify(klp, obj, "post_patch")


def klp_pre_unpatch_callback(klp: Klp, obj: Any) -> None:
    """Before the first task goes back."""
    _notify(klp, obj, "pre_unpatch")


def klp_post_unpatch_callback(klp: Klp, obj: Any) -> None:
    """Nobody uses the patched object any more."""
    if obj.callbacks.post_unpatch_enabled:
        _notify(klp, obj, "post_unpatch")
    obj.callbacks.post_unpatch_enabled = False


def _notify(klp: Klp, obj: Any, which: str) -> None:
    """Call one that cannot refuse.

    If it fails in the guest, whoever drives the machine is told when the core is done: in the kernel the task
    would die with klp_mutex held.
    """
    try:
        _call(klp, obj, which)
    except KlpemuError as error:
        klp.machine.hub.failed(error)


def _call(klp: Klp, obj: Any, which: str) -> int:
    """Call one of them, if it is there; returns its int."""
    function = getattr(obj.callbacks, which)
    if not function:
        return 0
    result = klp.machine.hub.call_guest(function, obj.address_) & 0xFFFF_FFFF
    return result - (1 << 32) if result >> 31 else result
