"""What the author of a livepatch writes: which functions of which objects it replaces, and with what code.

`include/linux/livepatch.h` has the same shape, `struct klp_patch` of `klp_object`s of `klp_func`s.  These are the
facts as declared; the structs that the kernel works on are in guest memory and are made from them when the patch is
enabled (`materialise`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from elf.errors import KlpemuError

__all__ = ["VMLINUX", "Func", "Patch", "discard", "materialise"]

VMLINUX = "vmlinux"


@dataclass(frozen=True, slots=True)
class Func:
    """One replaced function: `old` is its name, `new` the replacement's in the patch's own code.

    `sympos` chooses among several symbols named `old`, counted from 1; 0 says the name is unique.
    """

    old: str
    new: str
    sympos: int = 0


@dataclass(frozen=True, slots=True)
class Patch:
    """A livepatch: its name (that of its module), its funcs by object, the file with its code, and `replace`."""

    name: str
    objects: Mapping[str, Sequence[Func]] = field(default_factory=dict)
    code: str | PathLike[str] | None = None
    replace: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise KlpemuError("a patch without a name", advice="name it as its module is named")
        for objname, funcs in self.objects.items():
            if not funcs:
                raise KlpemuError(
                    f"object '{objname}' without functions",
                    where=f"patch '{self.name}'",
                    advice="name at least one function, or leave the object out",
                )


def materialise(machine: Any, patch: Patch, module: int, new_func: Mapping[str, int]) -> Any:
    """The `struct klp_patch` of a patch in guest memory, with its arrays of objects and funcs.

    `module` is the address of the patch's struct module, `new_func` the addresses of its replacement functions.  The
    arrays end with an element of zeroes, as static ones in a livepatch module do.
    """
    layouts, slab, view = machine.layouts, machine.slab, machine.view
    owner = f"patch {patch.name}"
    object_size, func_size = layouts.sizeof("klp_object"), layouts.sizeof("klp_func")
    guest = view("klp_patch", slab.kzalloc(layouts.sizeof("klp_patch"), f"klp_patch of {owner}"))
    guest.mod = module
    guest.replace = patch.replace
    guest.objs = slab.kzalloc(object_size * (len(patch.objects) + 1), f"klp_object[] of {owner}")
    for number, (objname, funcs) in enumerate(patch.objects.items()):
        obj = view("klp_object", guest.objs + number * object_size)
        obj.name = 0 if objname == VMLINUX else slab.kstrdup(objname, f"object name of {owner}")
        obj.funcs = slab.kzalloc(func_size * (len(funcs) + 1), f"klp_func[] of {owner}")
        for index, declared in enumerate(funcs):
            func = view("klp_func", obj.funcs + index * func_size)
            func.old_name = slab.kstrdup(declared.old, f"function name of {owner}")
            func.new_func = new_func[declared.new]
            func.old_sympos = declared.sympos
    return guest


def discard(machine: Any, guest: Any) -> None:
    """Free what `materialise` made; the patch must be neither enabled nor in transition."""
    object_size, func_size = machine.layouts.sizeof("klp_object"), machine.layouts.sizeof("klp_func")
    at = guest.objs
    while True:
        obj = machine.view("klp_object", at)
        if not obj.funcs and not obj.name:
            break
        func_at = obj.funcs
        while True:
            func = machine.view("klp_func", func_at)
            if not func.old_name:
                break
            machine.slab.kfree(func.old_name)
            func_at += func_size
        machine.slab.kfree(obj.funcs)
        machine.slab.kfree(obj.name)
        at += object_size
    machine.slab.kfree(guest.objs)
    machine.slab.kfree(guest.address_)
