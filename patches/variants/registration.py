"""Patches are registered, enabled, disabled and unregistered, each as a step of its own: before v5.1.

klp_register_patch() initialised a patch and put it on klp_patches.  klp_enable_patch(), klp_disable_patch()
and writes to the sysfs file `enabled` switched it on and off as often as one liked, klp_unregister_patch()
took it off the list again.  The list was a stack: only the first disabled patch could be enabled, only the
last enabled one disabled, else -EBUSY.  Enabling took a reference of the module, the end of disabling gave it
back.

958ef1e39d24 ("livepatch: Simplify API by removing registration step") (in v5.1) removed the steps,
d67a53720966 ("livepatch: Remove ordering (stacking) of the livepatches") (in v5.1) the rule.  The functions
here are those of kernel/livepatch/core.c of v4.19.  What a transition does is the reference's, except that a
disabled patch is not freed, and that once one transition was forced no module can go any more.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from elf.errors import KlpemuError
from emu.errno import KernelErrno
from emu.module_use import module_put, try_module_get
from patches import core, stacks, transition
from patches.handler import KLP_UNPATCHED
from patches.init_patch import klp_init_patch, klp_init_patch_early
from patches.klp import Klp
from patches.livepatch import static_objects
from patches.variants import replaced

__all__ = ["klp_disable_patch", "klp_register_patch", "klp_unregister_patch", "patches_registered"]


@contextmanager
def patches_registered() -> Iterator[None]:
    """Have the rules of v4.19.

    What is registered inside the block must be unregistered inside it.  A patch that replaces is refused with
    KlpemuError.
    """
    enable, disable = core.__klp_enable_patch, core.__klp_disable_patch
    complete, force = transition.klp_complete_transition, transition.klp_force_transition
    coming, going = core.patch_coming_object, core.revert_on_going
    forced: list[Klp] = []

    def __klp_enable_patch(klp: Klp, patch_: Any) -> None:
        _refuse_in_transition(klp)
        below = _neighbour(klp, patch_, -1)
        if not patch_.enabled and below is not None and not below.enabled:
            raise KernelErrno(
                errno.EBUSY,
                f"patch '{klp.name_of(below)}', registered before '{klp.name_of(patch_)}', is disabled",
                advice="enable it first, or unregister it",
            )
        if not patch_.enabled and not try_module_get(patch_.follow_("mod")):
            raise KernelErrno(errno.ENODEV, f"module '{klp.name_of(patch_)}' is going")
        enable(klp, patch_)

    def __klp_disable_patch(klp: Klp, patch_: Any) -> None:
        _refuse_in_transition(klp)
        above = _neighbour(klp, patch_, 1)
        if above is not None and above.enabled:
            raise KernelErrno(
                errno.EBUSY,
                f"patch '{klp.name_of(above)}', registered after '{klp.name_of(patch_)}', is enabled",
                advice="disable it first",
            )
        disable(klp, patch_)

    def klp_complete_transition(klp: Klp) -> None:
        patch_, target = klp.transition_patch, klp.klp_target_state.get()
        complete(klp)
        if target == KLP_UNPATCHED and klp not in forced:
            module_put(patch_.follow_("mod"))

    def klp_force_transition(klp: Klp) -> None:
        force(klp)
        forced.append(klp)

    def patch_coming_object(klp: Klp, patch_: Any, obj: Any, name: str) -> None:
        if _is_on(klp, patch_):
            coming(klp, patch_, obj, name)

    def revert_on_going(klp: Klp, patch_: Any, obj: Any, name: str) -> None:
        if _is_on(klp, patch_):
            going(klp, patch_, obj, name)

    with (
        replaced(core, "klp_enable_patch", klp_enable_patch),
        replaced(core, "enabled_store", enabled_store),
        replaced(core, "__klp_enable_patch", __klp_enable_patch),
        replaced(core, "__klp_disable_patch", __klp_disable_patch),
        replaced(core, "klp_free_patch_async", _stays_registered),
        replaced(core, "patch_coming_object", patch_coming_object),
        replaced(core, "revert_on_going", revert_on_going),
        replaced(transition, "klp_complete_transition", klp_complete_transition),
        replaced(transition, "klp_force_transition", klp_force_transition),
        replaced(stacks, "has_funcs_on_stacks", _is_on),
    ):
        yield


def klp_register_patch(klp: Klp, patch_: Any) -> None:
    """Initialise a patch and put it on top of the list; on failure no trace of it is left."""
    if not patch_.address_ or not patch_.mod:
        raise KernelErrno(errno.EINVAL, "a klp_patch without module")
    name = klp.name_of(patch_)
    if patch_.replace:
        raise KlpemuError(
            f"patch '{name}' replaces, and is registered",
            advice="no kernel had both: v5.1 ended the one and brought the other",
        )
    if not patch_.follow_("mod").klp:
        what = f"module {name} is not marked as a livepatch module"
        klp.log.pr_err(f"livepatch: {what}")
        raise KernelErrno(errno.EINVAL, what, advice='write MODULE_INFO(livepatch, "Y")')
    if not patch_.objs or not all(obj.funcs for obj in static_objects(klp.machine, patch_)):
        raise KernelErrno(
            errno.EINVAL, "a klp_patch without objects, or one of them without funcs", where=name
        )
    with core.klp_mutex(klp):
        klp_init_patch_early(klp, patch_)
        try:
            klp_init_patch(klp, patch_)
            return
        except KlpemuError as error:
            failed = error
            core.klp_free_patch_start(klp, patch_)
    _klp_free_patch_finish(klp, patch_)
    raise failed


def klp_unregister_patch(klp: Klp, patch_: Any) -> None:
    """Take a disabled patch off the list and free what belongs to it."""
    with core.klp_mutex(klp):
        _refuse_unregistered(klp, patch_)
        if patch_.enabled:
            raise KernelErrno(
                errno.EBUSY, f"patch '{klp.name_of(patch_)}' is enabled", advice="disable it first"
            )
        core.klp_free_patch_start(klp, patch_)
    _klp_free_patch_finish(klp, patch_)


def klp_enable_patch(klp: Klp, patch_: Any) -> None:
    """Enable a registered patch."""
    with core.klp_mutex(klp):
        _refuse_unregistered(klp, patch_)
        core.__klp_enable_patch(klp, patch_)


def klp_disable_patch(klp: Klp, patch_: Any) -> None:
    """Disable a registered, enabled patch."""
    with core.klp_mutex(klp):
        _refuse_unregistered(klp, patch_)
        if not patch_.enabled:
            raise KernelErrno(errno.EINVAL, f"patch '{klp.name_of(patch_)}' is not enabled")
        core.__klp_disable_patch(klp, patch_)


def enabled_store(klp: Klp, patch_: Any, value: bool) -> None:
    """A write to /sys/kernel/livepatch/<patch>/enabled: either way, again and again."""
    with core.klp_mutex(klp):
        _refuse_unregistered(klp, patch_)
        if patch_.enabled == value:
            raise KernelErrno(
                errno.EINVAL, f"patch '{klp.name_of(patch_)}' is in the requested state already"
            )
        if patch_ == klp.transition_patch:
            transition.klp_reverse_transition(klp)
        elif value:
            core.__klp_enable_patch(klp, patch_)
        else:
            core.__klp_disable_patch(klp, patch_)


def _refuse_in_transition(klp: Klp) -> None:
    if klp.transition_patch is not None:
        raise KernelErrno(errno.EBUSY, f"patch '{klp.name_of(klp.transition_patch)}' is in transition")


def _refuse_unregistered(klp: Klp, patch_: Any) -> None:
    """klp_is_patch_registered()."""
    if patch_ not in klp.patches():
        raise KernelErrno(
            errno.EINVAL, f"patch '{klp.name_of(patch_)}' is not registered", advice="register it first"
        )


def _neighbour(klp: Klp, patch_: Any, step: int) -> Any:
    """The patch registered before (-1) or after (1) another; None at the end."""
    registered = list(klp.patches())
    at = registered.index(patch_) + step
    return registered[at] if 0 <= at < len(registered) else None


def _is_on(klp: Klp, patch_: Any) -> bool:
    """A patch that is only registered changes nothing."""
    return bool(patch_.enabled) or patch_ == klp.transition_patch


def _stays_registered(klp: Klp, patch_: Any) -> None:
    """A disabled patch is not freed."""


def _klp_free_patch_finish(klp: Klp, patch_: Any) -> None:
    """As in the reference, which gives back a reference of the module; a patch that is off has none."""
    if not patch_.forced:
        count = patch_.follow_("mod").refcnt
        count.counter = count.counter + 1
    core.klp_free_patch_finish(klp, patch_)
