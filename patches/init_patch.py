"""Making a patch ready to be enabled: klp_init_patch() and what it calls (kernel/livepatch/core.c).

The lists of a patch are linked, its kobjects exist, its functions are found in the objects that are loaded; a
replacing patch gets a nop func for each function that the older ones patch and it does not.
"""

import errno
from typing import Any

from elf.errors import SymbolError
from emu.errno import KernelErrno
from emu.kobject import kobject_add, kobject_init
from emu.list import init_list_head, list_add_tail
from emu.module import MODULE_NAME_LEN
from patches.klp import Klp, klp_for_each_func, klp_for_each_object
from patches.klp_relocation import klp_apply_object_relocs
from patches.livepatch import VMLINUX, static_funcs, static_objects

__all__ = [
    "klp_init_object_loaded",
    "klp_init_patch",
    "klp_init_patch_early",
    "klp_is_object_loaded",
    "object_name",
]

KSYM_NAME_LEN = 512  # include/linux/kallsyms.h


def klp_init_patch_early(klp: Klp, patch_: Any) -> None:
    """Lists and kobjects, before anything can fail."""
    init_list_head(patch_.list)
    init_list_head(patch_.obj_list)
    kobject_init(klp.machine, patch_.kobj, klp.klp_ktype_patch)
    patch_.enabled = False
    patch_.forced = False
    patch_.finish.done = 0
    init_list_head(patch_.finish.wait.task_list)
    for obj in static_objects(klp.machine, patch_):
        _klp_init_object_early(klp, patch_, obj)
        for func in static_funcs(klp.machine, obj):
            _klp_init_func_early(klp, obj, func)


def _klp_init_object_early(klp: Klp, patch_: Any, obj: Any) -> None:
    init_list_head(obj.func_list)
    kobject_init(klp.machine, obj.kobj, klp.klp_ktype_object)
    list_add_tail(obj.node, patch_.obj_list)


def _klp_init_func_early(klp: Klp, obj: Any, func: Any) -> None:
    kobject_init(klp.machine, func.kobj, klp.klp_ktype_func)
    list_add_tail(func.node, obj.func_list)


def klp_init_patch(klp: Klp, patch_: Any) -> None:
    """Initialise all objects and funcs, and put the patch behind the enabled ones."""
    kobject_add(klp.machine, patch_.kobj, klp.klp_root_kobj, klp.name_of(patch_))
    if patch_.replace:
        _klp_add_nops(klp, patch_)
    for obj in klp_for_each_object(patch_):
        _klp_init_object(klp, patch_, obj)
    list_add_tail(patch_.list, klp.klp_patches)


def _klp_init_object(klp: Klp, patch_: Any, obj: Any) -> None:
    name = object_name(klp, obj)
    if len(name) >= MODULE_NAME_LEN:
        raise KernelErrno(errno.EINVAL, f"the name of object '{name}' is too long")
    obj.patched = False
    obj.mod = 0
    if obj.name:
        _klp_find_object_module(klp, obj)
    kobject_add(klp.machine, obj.kobj, patch_.kobj, name)
    for func in klp_for_each_func(obj):
        _klp_init_func(klp, obj, func)
    if klp_is_object_loaded(obj):
        klp_init_object_loaded(klp, patch_, obj)


def _klp_init_func(klp: Klp, obj: Any, func: Any) -> None:
    if not func.old_name or not (func.new_func or func.nop):
        raise KernelErrno(errno.EINVAL, "a func without a name or without a replacement")
    name = klp.string(func.old_name)
    if len(name) >= KSYM_NAME_LEN:
        raise KernelErrno(errno.EINVAL, f"the name of function '{name[:32]}…' is too long")
    init_list_head(func.stack_node)
    func.patched = False
    func.transition = False
    # In sysfs the first of several functions of one name and the only one are alike.
    kobject_add(klp.machine, func.kobj, obj.kobj, f"{name},{func.old_sympos or 1}")


def klp_init_object_loaded(klp: Klp, patch_: Any, obj: Any) -> None:
    """Write the klp relocations for it; find the functions to be patched, and the sizes the stack check
    needs.
    """
    if obj.name:
        klp_apply_object_relocs(klp, patch_, obj)
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
    name = object_name(klp, old_obj)
    same = (each for each in klp_for_each_object(patch_) if object_name(klp, each) == name)
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
        try:
            obj.name = machine.slab.kstrdup(name, "name of a dynamic klp_object")
        except KernelErrno:
            machine.slab.kfree(obj.address_)
            raise
    _klp_init_object_early(klp, patch_, obj)
    obj.dynamic = True
    return obj


def _klp_alloc_func_nop(klp: Klp, obj: Any, old_func: Any) -> None:
    machine = klp.machine
    func = machine.view("klp_func", machine.slab.kzalloc(machine.layouts.sizeof("klp_func"), "nop klp_func"))
    try:
        func.old_name = machine.slab.kstrdup(klp.string(old_func.old_name), "name of a nop klp_func")
    except KernelErrno:
        machine.slab.kfree(func.address_)
        raise
    _klp_init_func_early(klp, obj, func)
    func.old_sympos = old_func.old_sympos
    func.nop = True


def _func_key(klp: Klp, func: Any) -> tuple[str, int]:
    """What makes two funcs the same one: name and sympos, 0 and 1 being alike (klp_find_func())."""
    return klp.string(func.old_name), func.old_sympos or 1


# Small things.


def klp_is_object_loaded(obj: Any) -> bool:
    """vmlinux, or a module that is there."""
    return not obj.name or bool(obj.mod)


def object_name(klp: Klp, obj: Any) -> str:
    """The name of a klp_object's module, or "vmlinux"."""
    return klp.string(obj.name) if obj.name else VMLINUX
