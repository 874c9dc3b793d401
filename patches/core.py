"""Enabling, disabling, replacing: kernel/livepatch/core.c.

The functions carry the kernel's names and do its stores in its order.  Each runs inside a service of the hub.
"""

import errno
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from elf.errors import KlpemuError, SymbolError
from emu.errno import KernelErrno
from emu.list import init_list_head, list_add_tail, list_del, list_empty
from emu.module import MODULE_NAME_LEN
from emu.mutex import mutex_held
from patches import patch, transition
from patches.handler import KLP_PATCHED, KLP_UNPATCHED
from patches.klp import Klp, klp_for_each_func, klp_for_each_object
from patches.livepatch import VMLINUX, static_funcs, static_objects

__all__ = [
    "enabled_store",
    "force_store",
    "klp_discard_nops",
    "klp_enable_patch",
    "klp_free_patch_async",
    "klp_free_patch_work_fn",
    "klp_free_replaced_patches_async",
    "klp_mutex",
    "klp_unpatch_replaced_patches",
]

KSYM_NAME_LEN = 512  # include/linux/kallsyms.h
SYSFS = "/kernel/livepatch"
KOBJECT_INITIALIZED = 1 << 0
KOBJECT_IN_SYSFS = 1 << 1


def klp_mutex(klp: Klp) -> AbstractContextManager[None]:
    """Serialises everything but the handler and klp_update_patch_state()."""
    return mutex_held(klp.machine, "klp_mutex")


def klp_enable_patch(klp: Klp, patch_: Any) -> None:
    """Enable a patch: initialise it, put its funcs in place, start the transition.  On failure no trace is
    left.
    """
    with klp_mutex(klp):
        _module_get(klp, patch_)
        _klp_init_patch_early(klp, patch_)
        try:
            _klp_init_patch(klp, patch_)
            _klp_enable_patch(klp, patch_)
        except KlpemuError:
            _klp_free_patch_start(klp, patch_)
            # The kernel does this behind the unlock, which changes nothing.
            _klp_free_patch_finish(klp, patch_)
            raise


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
            _klp_disable_patch(klp, patch_)


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
    _klp_free_patch_start(klp, patch_)
    klp.machine.workqueue.schedule_work("free_work", partial(klp_free_patch_work_fn, klp, patch_))


def klp_free_replaced_patches_async(klp: Klp, new_patch: Any) -> None:
    """Free all patches older than `new_patch`."""
    for old_patch in list(klp.patches()):
        if old_patch == new_patch:
            return
        klp_free_patch_async(klp, old_patch)


def klp_free_patch_work_fn(klp: Klp, patch_: Any) -> None:
    """The work: the part of a patch's release that must happen outside of klp_mutex."""
    _klp_free_patch_finish(klp, patch_)
    klp.freed(patch_)


def _klp_enable_patch(klp: Klp, patch_: Any) -> None:
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
            if not _is_object_loaded(obj):
                continue
            try:
                patch.klp_patch_object(klp, obj)
            except KernelErrno:
                klp.log.pr_warn(f"livepatch: failed to patch object '{_object_name(klp, obj)}'")
                raise
    except KernelErrno:
        klp.log.pr_warn(f"livepatch: failed to enable patch '{name}'")
        transition.klp_cancel_transition(klp)
        raise
    transition.klp_start_transition(klp)
    patch_.enabled = True
    transition.klp_try_complete_transition(klp)


def _klp_disable_patch(klp: Klp, patch_: Any) -> None:
    if klp.transition_patch is not None:
        raise KernelErrno(errno.EBUSY, f"patch '{klp.name_of(klp.transition_patch)}' is in transition")
    transition.klp_init_transition(klp, patch_, KLP_UNPATCHED)
    # smp_wmb(): func->transition must be seen before TIF_PATCH_PENDING.
    transition.klp_start_transition(klp)
    patch_.enabled = False
    transition.klp_try_complete_transition(klp)


# Initialising.


def _klp_init_patch_early(klp: Klp, patch_: Any) -> None:
    init_list_head(patch_.list)
    init_list_head(patch_.obj_list)
    _kobject_init(patch_)
    patch_.enabled = False
    patch_.forced = False
    patch_.finish.done = 0
    for obj in static_objects(klp.machine, patch_):
        _klp_init_object_early(patch_, obj)
        for func in static_funcs(klp.machine, obj):
            _klp_init_func_early(obj, func)


def _klp_init_object_early(patch_: Any, obj: Any) -> None:
    init_list_head(obj.func_list)
    _kobject_init(obj)
    list_add_tail(obj.node, patch_.obj_list)


def _klp_init_func_early(obj: Any, func: Any) -> None:
    _kobject_init(func)
    list_add_tail(func.node, obj.func_list)


def _klp_init_patch(klp: Klp, patch_: Any) -> None:
    _kobject_add(patch_)
    if patch_.replace:
        _klp_add_nops(klp, patch_)
    names: set[str] = set()
    for obj in klp_for_each_object(patch_):
        _klp_init_object(klp, patch_, obj, names)
    list_add_tail(patch_.list, klp.klp_patches)


def _klp_init_object(klp: Klp, patch_: Any, obj: Any, siblings: set[str]) -> None:
    """`siblings` are the names of the patch's objects so far; each has a directory of its own in sysfs."""
    name = _object_name(klp, obj)
    if len(name) >= MODULE_NAME_LEN:
        raise KernelErrno(errno.EINVAL, f"the name of object '{name}' is too long")
    obj.patched = False
    obj.mod = 0
    if obj.name:
        _klp_find_object_module(klp, obj)
    directory = f"{SYSFS}/{klp.name_of(patch_)}"
    _sysfs_name(klp, directory, name, siblings)
    _kobject_add(obj)
    names: set[str] = set()
    for func in klp_for_each_func(obj):
        _klp_init_func(klp, func, f"{directory}/{name}", names)
    if _is_object_loaded(obj):
        _klp_init_object_loaded(klp, obj)


def _klp_init_func(klp: Klp, func: Any, directory: str, siblings: set[str]) -> None:
    if not func.old_name or not (func.new_func or func.nop):
        raise KernelErrno(errno.EINVAL, "a func without a name or without a replacement")
    name = klp.string(func.old_name)
    if len(name) >= KSYM_NAME_LEN:
        raise KernelErrno(errno.EINVAL, f"the name of function '{name[:32]}…' is too long")
    init_list_head(func.stack_node)
    func.patched = False
    func.transition = False
    _sysfs_name(klp, directory, f"{name},{func.old_sympos or 1}", siblings)
    _kobject_add(func)


def _sysfs_name(klp: Klp, directory: str, name: str, siblings: set[str]) -> None:
    """Every kobject is a directory, so that two of one name cannot be (fs/sysfs/dir.c, lib/kobject.c)."""
    if name in siblings:
        klp.log.pr_warn(f"sysfs: cannot create duplicate filename '{directory}/{name}'")
        klp.log.pr_err(
            f"kobject_add_internal failed for {name} with -EEXIST, "
            "don't try to register things with the same name in the same directory."
        )
        raise KernelErrno(
            errno.EEXIST,
            f"'{name}' is there twice",
            where=directory,
            advice="name each function once; sympos 0 and 1 are the same",
        )
    siblings.add(name)


def _klp_init_object_loaded(klp: Klp, obj: Any) -> None:
    """Find the functions to be patched, and the sizes the stack check needs."""
    objname = klp.string(obj.name) if obj.name else ""
    kallsyms = klp.machine.kallsyms
    for func in klp_for_each_func(obj):
        name = klp.string(func.old_name)
        try:
            func.old_func = kallsyms.address_of(name, objname, func.old_sympos)
        except SymbolError as error:
            klp.log.pr_err(f"livepatch: {error.what}")
            raise KernelErrno(errno.EINVAL, error.what, where=error.where, advice=error.advice) from error
        found = kallsyms.lookup_size_offset(func.old_func)
        if found is None:
            klp.log.pr_err(f"livepatch: kallsyms size lookup failed for '{name}'")
            raise KernelErrno(errno.ENOENT, f"kallsyms size lookup failed for '{name}'")
        func.old_size = found[0]
        if func.nop:
            func.new_func = func.old_func
        found = kallsyms.lookup_size_offset(func.new_func)
        if found is None:
            klp.log.pr_err(f"livepatch: kallsyms size lookup failed for '{name}' replacement")
            raise KernelErrno(errno.ENOENT, f"kallsyms size lookup failed for '{name}' replacement")
        func.new_size = found[0]


def _klp_find_object_module(klp: Klp, obj: Any) -> None:
    loaded = klp.machine.modules.objects.get(klp.string(obj.name))
    if loaded is not None and klp.machine.view("module", loaded.struct).klp_alive:
        obj.mod = loaded.struct


# Nops.


def _klp_add_nops(klp: Klp, patch_: Any) -> None:
    """Give a replacing patch a nop func for everything the older ones patch and it does not."""
    for old_patch in klp.patches():
        for old_obj in klp_for_each_object(old_patch):
            _klp_add_object_nops(klp, patch_, old_obj)


def _klp_add_object_nops(klp: Klp, patch_: Any, old_obj: Any) -> None:
    name = _object_name(klp, old_obj)
    same = (each for each in klp_for_each_object(patch_) if _object_name(klp, each) == name)
    obj = next(same, None) or _klp_alloc_object_dynamic(klp, patch_, name)
    known = {_func_key(klp, func) for func in klp_for_each_func(obj)}
    for old_func in klp_for_each_func(old_obj):
        key = _func_key(klp, old_func)
        if key not in known:
            known.add(key)
            _klp_alloc_func_nop(klp, obj, old_func)


def _klp_alloc_object_dynamic(klp: Klp, patch_: Any, name: str) -> Any:
    machine = klp.machine
    obj = machine.view(
        "klp_object", machine.slab.kzalloc(machine.layouts.sizeof("klp_object"), "dynamic klp_object")
    )
    if name != VMLINUX:
        obj.name = machine.slab.kstrdup(name, "name of a dynamic klp_object")
    _klp_init_object_early(patch_, obj)
    obj.dynamic = True
    return obj


def _klp_alloc_func_nop(klp: Klp, obj: Any, old_func: Any) -> None:
    machine = klp.machine
    func = machine.view("klp_func", machine.slab.kzalloc(machine.layouts.sizeof("klp_func"), "nop klp_func"))
    func.old_name = machine.slab.kstrdup(klp.string(old_func.old_name), "name of a nop klp_func")
    _klp_init_func_early(obj, func)
    func.old_sympos = old_func.old_sympos
    func.nop = True


def _func_key(klp: Klp, func: Any) -> tuple[str, int]:
    """What makes two funcs the same one: name and sympos, 0 and 1 being alike (klp_find_func())."""
    return klp.string(func.old_name), func.old_sympos or 1


# Freeing.


def _klp_free_patch_finish(klp: Klp, patch_: Any) -> None:
    """Drop the last reference to the patch's kobject; its module may go from now on, unless it was forced."""
    patch_.kobj.kref.refcount.refs.counter = 0
    patch_.kobj.state = 0
    patch_.finish.done = 1
    if not patch_.forced:
        count = patch_.follow_("mod").refcnt
        count.counter = count.counter - 1


def _module_get(klp: Klp, patch_: Any) -> None:
    """try_module_get(): as long as a patch is enabled its module cannot be unloaded."""
    count = patch_.follow_("mod").refcnt
    count.counter = count.counter + 1


def _klp_free_patch_start(klp: Klp, patch_: Any) -> None:
    if not list_empty(patch_.list):
        list_del(patch_.list)
    _free_objects(klp, patch_, nops_only=False)


def _free_objects(klp: Klp, patch_: Any, *, nops_only: bool) -> None:
    """__klp_free_objects(): unlink the funcs and objects; what was allocated for nops is freed."""
    slab = klp.machine.slab
    for obj in list(klp_for_each_object(patch_)):
        for func in list(klp_for_each_func(obj)):
            if nops_only and not func.nop:
                continue
            list_del(func.node)
            func.kobj.state = 0
            if func.nop:
                slab.kfree(func.old_name)
                slab.kfree(func.address_)
        if nops_only and not obj.dynamic:
            continue
        list_del(obj.node)
        obj.kobj.state = 0
        if obj.dynamic:
            slab.kfree(obj.name)
            slab.kfree(obj.address_)


# Small things.


def _is_object_loaded(obj: Any) -> bool:
    return not obj.name or bool(obj.mod)


def _object_name(klp: Klp, obj: Any) -> str:
    return klp.string(obj.name) if obj.name else VMLINUX


def _kobject_init(owner: Any) -> None:
    owner.kobj.kref.refcount.refs.counter = 1
    owner.kobj.state = KOBJECT_INITIALIZED


def _kobject_add(owner: Any) -> None:
    owner.kobj.state = KOBJECT_INITIALIZED | KOBJECT_IN_SYSFS
