"""Enabling, disabling, replacing: kernel/livepatch/core.c.

The functions carry the kernel's names and do its stores in its order.  Each runs inside a service of the hub.
"""

import errno
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from elf.errors import KlpemuError
from emu.errno import KernelErrno
from emu.kobject import kobject_put
from emu.list import list_del, list_empty
from emu.module import ModuleState
from emu.module_use import module_put, try_module_get
from emu.mutex import mutex_held
from emu.wait import completed
from patches import klp_relocation, patch, transition
from patches.callbacks import (
    klp_post_patch_callback,
    klp_post_unpatch_callback,
    klp_pre_patch_callback,
    klp_pre_unpatch_callback,
)
from patches.handler import KLP_PATCHED, KLP_UNPATCHED
from patches.init_patch import (
    klp_init_object_loaded,
    klp_init_patch,
    klp_init_patch_early,
    klp_is_object_loaded,
    object_name,
)
from patches.klp import Klp, klp_for_each_func, klp_for_each_object
from patches.livepatch import VMLINUX, static_objects
from patches.state import klp_is_patch_compatible

__all__ = [
    "connect",
    "enabled_store",
    "force_store",
    "klp_discard_nops",
    "klp_enable_patch",
    "klp_free_patch_async",
    "klp_free_patch_finish",
    "klp_free_patch_start",
    "klp_free_patch_work_fn",
    "klp_free_replaced_patches_async",
    "klp_module_coming",
    "klp_module_going",
    "klp_mutex",
    "klp_unpatch_replaced_patches",
    "patch_coming_object",
    "revert_on_going",
]


def connect(klp: Klp) -> None:
    """Let livepatch know of modules that come and go."""
    klp_relocation.connect(klp)
    modules, view = klp.machine.modules, klp.machine.view
    modules.klp_module_coming = lambda module: klp_module_coming(klp, view("module", module))
    modules.klp_module_going = lambda module: klp_module_going(klp, view("module", module))


def klp_mutex(klp: Klp) -> AbstractContextManager[None]:
    """Serialises everything but the handler and klp_update_patch_state()."""
    return mutex_held(klp.machine, "klp_mutex")


def klp_enable_patch(klp: Klp, patch_: Any) -> None:
    """Enable a patch: initialise it, put its funcs in place, start the transition.  On failure no trace is
    left.
    """
    if not patch_.address_ or not patch_.mod or not patch_.objs:
        raise KernelErrno(errno.EINVAL, "a klp_patch without module or objects")
    if not all(obj.funcs for obj in static_objects(klp.machine, patch_)):
        raise KernelErrno(errno.EINVAL, "a klp_object without funcs", where=klp.name_of(patch_))
    name = klp.name_of(patch_)
    if not patch_.follow_("mod").klp:
        klp.log.pr_err(f"livepatch: module {name} is not marked as a livepatch module")
        raise KernelErrno(
            errno.EINVAL,
            f"module {name} is not marked as a livepatch module",
            advice='write MODULE_INFO(livepatch, "Y")',
        )
    with klp_mutex(klp):
        if not klp_is_patch_compatible(klp, patch_):
            what = f"Livepatch patch ({name}) is not compatible with the already installed livepatches."
            klp.log.pr_err(f"livepatch: {what}")
            raise KernelErrno(errno.EINVAL, what)
        if not try_module_get(patch_.follow_("mod")):
            raise KernelErrno(errno.ENODEV, f"module '{name}' is going")
        klp_init_patch_early(klp, patch_)
        try:
            klp_init_patch(klp, patch_)
            __klp_enable_patch(klp, patch_)
            return
        except KlpemuError as error:
            failed = error
            klp_free_patch_start(klp, patch_)
    # Outside of the mutex: who is in the middle of a write to the patch's `enabled` waits for that.
    klp_free_patch_finish(klp, patch_)
    raise failed


def enabled_store(klp: Klp, patch_: Any, value: bool) -> None:
    """A write to /sys/kernel/livepatch/<patch>/enabled."""
    with klp_mutex(klp):
        if patch_.enabled == value:
            raise KernelErrno(
                errno.EINVAL, f"patch '{klp.name_of(patch_)}' is in the requested state already"
            )
        if patch_ == klp.transition_patch:
            transition.klp_reverse_transition(klp)
        elif value:
            raise KernelErrno(
                errno.EINVAL, f"patch '{klp.name_of(patch_)}' was disabled and cannot come back"
            )
        else:
            __klp_disable_patch(klp, patch_)


def force_store(klp: Klp, patch_: Any) -> None:
    """A write of 1 to /sys/kernel/livepatch/<patch>/force."""
    with klp_mutex(klp):
        if patch_ != klp.transition_patch:
            raise KernelErrno(errno.EINVAL, f"patch '{klp.name_of(patch_)}' is not in transition")
        transition.klp_force_transition(klp)


def klp_unpatch_replaced_patches(klp: Klp, new_patch: Any) -> None:
    """Take the funcs of all patches older than `new_patch` off their func_stacks."""
    for old_patch in klp.patches():
        if old_patch == new_patch:
            return
        old_patch.enabled = False
        patch.klp_unpatch_objects(klp, old_patch)


def klp_discard_nops(klp: Klp, new_patch: Any) -> None:
    """Remove the nop funcs: what nobody patches any more gets its original bytes back.

    d697bad588 ("livepatch: Remove Nop structures when unused") (in v5.1).
    """
    patch.klp_unpatch_objects_dynamic(klp, new_patch)
    _free_objects(klp, new_patch, nops_only=True)


def klp_free_patch_async(klp: Klp, patch_: Any) -> None:
    """Take a patch off the list; the rest of its release is work for later."""
    klp_free_patch_start(klp, patch_)
    klp.being_freed.add(patch_.address_)
    klp.machine.workqueue.schedule_work("free_work", partial(klp_free_patch_work_fn, klp, patch_))


def klp_free_replaced_patches_async(klp: Klp, new_patch: Any) -> None:
    """Free all patches older than `new_patch`."""
    for old_patch in list(klp.patches()):
        if old_patch == new_patch:
            return
        klp_free_patch_async(klp, old_patch)


def klp_free_patch_work_fn(klp: Klp, patch_: Any) -> None:
    """The work: the part of a patch's release that must happen outside of klp_mutex."""
    klp_free_patch_finish(klp, patch_)
    klp.being_freed.discard(patch_.address_)
    klp.freed(patch_)


def __klp_enable_patch(klp: Klp, patch_: Any) -> None:
    if klp.transition_patch is not None:
        raise KernelErrno(errno.EBUSY, f"patch '{klp.name_of(klp.transition_patch)}' is in transition")
    name = klp.name_of(patch_)
    if patch_.enabled:
        klp.warn("__klp_enable_patch", "patch->enabled")
        raise KernelErrno(errno.EINVAL, f"patch '{name}' is enabled already")
    klp.log.pr_notice(f"livepatch: enabling patch '{name}'")
    transition.klp_init_transition(klp, patch_, KLP_PATCHED)
    # smp_wmb(): the handler must see func->transition before the funcs.
    try:
        for obj in klp_for_each_object(patch_):
            if not klp_is_object_loaded(obj):
                continue
            result = klp_pre_patch_callback(klp, obj)
            if result:
                what = f"pre-patch callback failed for object '{object_name(klp, obj)}'"
                klp.log.pr_warn(f"livepatch: {what}")
                raise KernelErrno(abs(result), what)
            try:
                patch.klp_patch_object(klp, obj)
            except KernelErrno:
                klp.log.pr_warn(f"livepatch: failed to patch object '{object_name(klp, obj)}'")
                raise
    except KlpemuError:  # a callback may also fail in the guest
        klp.log.pr_warn(f"livepatch: failed to enable patch '{name}'")
        transition.klp_cancel_transition(klp)
        raise
    transition.klp_start_transition(klp)
    patch_.enabled = True
    transition.klp_try_complete_transition(klp)


def __klp_disable_patch(klp: Klp, patch_: Any) -> None:
    if klp.transition_patch is not None:
        raise KernelErrno(errno.EBUSY, f"patch '{klp.name_of(klp.transition_patch)}' is in transition")
    transition.klp_init_transition(klp, patch_, KLP_UNPATCHED)
    for obj in klp_for_each_object(patch_):
        if obj.patched:
            klp_pre_unpatch_callback(klp, obj)
    # smp_wmb(): func->transition must be seen before TIF_PATCH_PENDING.
    transition.klp_start_transition(klp)
    patch_.enabled = False
    transition.klp_try_complete_transition(klp)


# Modules come and go.


def klp_module_coming(klp: Klp, module: Any) -> None:
    """A module is about to run its init function: apply to it what the enabled patches have for it.

    If one of them fails the earlier ones are undone, and the error refuses the module.
    """
    name = klp.module_name(module)
    if module.state != ModuleState.COMING:
        klp.warn("klp_module_coming", "mod->state != MODULE_STATE_COMING")
        raise KernelErrno(errno.EINVAL, f"module '{name}' is not coming")
    if name == VMLINUX:
        klp.log.pr_err("livepatch: vmlinux.ko: invalid module name")
        raise KernelErrno(errno.EINVAL, "vmlinux.ko: invalid module name")
    with klp_mutex(klp):
        module.klp_alive = True
        for patch_ in klp.patches():
            obj = _object_of(klp, patch_, name)
            if obj is None:
                continue
            obj.mod = module.address_
            try:
                _klp_apply_to_coming(klp, patch_, obj, name)
            except KernelErrno as error:
                patch_name = klp.name_of(patch_)
                klp.log.pr_warn(
                    f"livepatch: patch '{patch_name}' failed for module '{name}', "
                    f"refusing to load module '{name}'"
                )
                module.klp_alive = False
                obj.mod = 0
                _klp_cleanup_module_patches_limited(klp, name, patch_)
                raise KernelErrno(
                    error.number,
                    f"patch '{patch_name}' failed for it: {error.reason}",
                    where=f"module '{name}'",
                ) from error


def klp_module_going(klp: Klp, module: Any) -> None:
    """A module goes: what patches have changed in it is reverted, newest changes last as in the kernel."""
    if module.state not in (ModuleState.GOING, ModuleState.COMING):
        klp.warn("klp_module_going", "mod->state is neither GOING nor COMING")
        return
    with klp_mutex(klp):
        module.klp_alive = False
        _klp_cleanup_module_patches_limited(klp, klp.module_name(module), None)


def _klp_apply_to_coming(klp: Klp, patch_: Any, obj: Any, name: str) -> None:
    patch_name = klp.name_of(patch_)
    try:
        klp_init_object_loaded(klp, patch_, obj)
    except KernelErrno as error:
        klp.log.pr_warn(
            f"livepatch: failed to initialize patch '{patch_name}' for module '{name}' (-{error.number})"
        )
        raise
    patch_coming_object(klp, patch_, obj, name)


def patch_coming_object(klp: Klp, patch_: Any, obj: Any, name: str) -> None:
    """A part of klp_module_coming(): a patch's object is initialised and can be patched."""
    patch_name = klp.name_of(patch_)
    klp.log.pr_notice(f"livepatch: applying patch '{patch_name}' to loading module '{name}'")
    result = klp_pre_patch_callback(klp, obj)
    if result:
        klp.log.pr_warn(f"livepatch: pre-patch callback failed for object '{name}'")
        raise KernelErrno(abs(result), f"pre-patch callback failed for object '{name}'")
    try:
        patch.klp_patch_object(klp, obj)
    except KernelErrno as error:
        klp.log.pr_warn(
            f"livepatch: failed to apply patch '{patch_name}' to module '{name}' (-{error.number})"
        )
        klp_post_unpatch_callback(klp, obj)
        raise
    if patch_ != klp.transition_patch:
        klp_post_patch_callback(klp, obj)


def _klp_cleanup_module_patches_limited(klp: Klp, name: str, limit: Any) -> None:
    """Revert what the patches before `limit` (None: all of them) have changed in a module."""
    for patch_ in klp.patches():
        if limit is not None and patch_ == limit:
            break
        obj = _object_of(klp, patch_, name)
        if obj is None or not obj.mod:
            continue
        revert_on_going(klp, patch_, obj, name)
        klp_free_object_loaded(klp, patch_, obj)


def revert_on_going(klp: Klp, patch_: Any, obj: Any, name: str) -> None:
    """A part of klp_cleanup_module_patches_limited(): undo what a patch changed in a module."""
    if patch_ != klp.transition_patch:
        klp_pre_unpatch_callback(klp, obj)
    patch_name = klp.name_of(patch_)
    klp.log.pr_notice(f"livepatch: reverting patch '{patch_name}' on unloading module '{name}'")
    patch.klp_unpatch_object(klp, obj)
    klp_post_unpatch_callback(klp, obj)


def klp_free_object_loaded(klp: Klp, patch_: Any, obj: Any) -> None:
    """The object's module is gone: nothing of it is known any more.

    What its klp relocations wrote stays.
    """
    obj.mod = 0
    for func in klp_for_each_func(obj):
        func.old_func = 0
        if func.nop:
            func.new_func = 0


def _object_of(klp: Klp, patch_: Any, name: str) -> Any:
    """The klp_object of a patch for the module of that name; None if it has none."""
    return next(
        (obj for obj in klp_for_each_object(patch_) if obj.name and klp.string(obj.name) == name), None
    )


# Freeing.


def klp_free_patch_finish(klp: Klp, patch_: Any) -> None:
    """Drop our reference to the patch's kobject and wait for the others; then its module may go, unless the
    patch was forced.
    """
    kobject_put(klp.machine, patch_.kobj)
    completed(klp.machine, patch_.finish.address_)
    if not patch_.forced:
        module_put(patch_.follow_("mod"))


def klp_free_patch_start(klp: Klp, patch_: Any) -> None:
    """The part of a patch's release that can be done under klp_mutex: off the lists."""
    if not list_empty(patch_.list):
        list_del(patch_.list)
    _free_objects(klp, patch_, nops_only=False)


def _free_objects(klp: Klp, patch_: Any, *, nops_only: bool) -> None:
    """__klp_free_objects(): unlink the funcs and objects, and drop our reference to each."""
    for obj in list(klp_for_each_object(patch_)):
        for func in list(klp_for_each_func(obj)):
            if nops_only and not func.nop:
                continue
            list_del(func.node)
            kobject_put(klp.machine, func.kobj)
        if nops_only and not obj.dynamic:
            continue
        list_del(obj.node)
        kobject_put(klp.machine, obj.kobj)
