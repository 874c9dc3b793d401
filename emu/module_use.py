"""Who uses a module: its reference count, and the struct module_use that link two modules.

module_unload_init() to module_unload_free() of kernel/module/main.c.  All of it is in guest memory: the count
in `refcnt`, the users on `source_list`, what a module uses on its `target_list`.
"""

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from emu.errno import KernelErrno
from emu.list import init_list_head, list_add, list_del
from emu.module_state import ModuleState, struct_name
from emu.view import list_for_each_entry

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = [
    "add_module_usage",
    "module_put",
    "module_refcount",
    "module_unload_free",
    "module_unload_init",
    "strong_try_module_get",
    "try_module_get",
    "try_release_module_ref",
    "users_of",
    "uses_of",
]

MODULE_REF_BASE = 1  # what a module counts for itself as long as it may be used


def module_unload_init(module: Any) -> None:
    """A new module: nobody uses it, and its own initialisation holds a reference."""
    init_list_head(module.source_list)
    init_list_head(module.target_list)
    module.refcnt.counter = MODULE_REF_BASE + 1


def module_refcount(module: Any) -> int:
    """How many hold a reference, as lsmod shows; -1 if the module is being removed."""
    return int(module.refcnt.counter) - MODULE_REF_BASE


def try_module_get(module: Any) -> bool:
    """Take a reference; False if the module is about to go."""
    if module.state == ModuleState.GOING or not module.refcnt.counter:
        return False
    module.refcnt.counter = module.refcnt.counter + 1
    return True


def strong_try_module_get(module: Any) -> None:
    """Take a reference to a module that must be through its init; EBUSY if it is not, ENOENT if it goes."""
    name = struct_name(module)
    if module.state == ModuleState.COMING:
        raise KernelErrno(errno.EBUSY, f"module '{name}' is still being initialised")
    if not try_module_get(module):
        raise KernelErrno(errno.ENOENT, f"module '{name}' is going")


def module_put(module: Any) -> None:
    """Give a reference back."""
    module.refcnt.counter = module.refcnt.counter - 1


def try_release_module_ref(module: Any) -> int:
    """Give the module's own reference back, or keep it if others are left; returns their number."""
    left = int(module.refcnt.counter) - MODULE_REF_BASE
    module.refcnt.counter = left
    if left:
        module.refcnt.counter = left + MODULE_REF_BASE
    return left


def add_module_usage(machine: "Machine", user: Any, owner: Any) -> None:
    """`user` uses symbols of `owner`, of which it holds a reference already."""
    size = machine.layouts.sizeof("module_use")
    tag = f"module_use of {struct_name(owner)} by {struct_name(user)}"
    use = machine.view("module_use", machine.slab.kmalloc(size, tag))
    use.source = user.address_
    use.target = owner.address_
    list_add(use.source_list, owner.source_list)
    list_add(use.target_list, user.target_list)


def module_unload_free(machine: "Machine", module: Any) -> None:
    """A module goes: it uses nothing any more."""
    for use in list(_uses(module)):
        module_put(use.follow_("target"))
        list_del(use.source_list)
        list_del(use.target_list)
        machine.slab.kfree(use.address_)


def users_of(module: Any) -> list[str]:
    """Names of the modules that use this one's symbols, newest first."""
    uses = list_for_each_entry(module.source_list, "module_use", "source_list")
    return [struct_name(use.follow_("source")) for use in uses]


def uses_of(module: Any) -> list[str]:
    """Names of the modules whose symbols this one uses, newest first."""
    return [struct_name(use.follow_("target")) for use in _uses(module)]


def _uses(module: Any) -> Iterator[Any]:
    return list_for_each_entry(module.target_list, "module_use", "target_list")
