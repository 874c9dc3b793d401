"""What the author of a livepatch writes: which functions of which objects it replaces, and with what code.

`include/linux/livepatch.h` has the same shape, `struct klp_patch` of `klp_object`s of `klp_func`s.  These are
the facts as declared; the structs that the kernel works on are in guest memory and are made from them when
the patch is enabled (`materialise`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from elf.errors import KlpemuError

__all__ = ["VMLINUX", "Func", "Patch", "declared", "discard", "materialise"]

VMLINUX = "vmlinux"


# What a module may be called is what a file may be called without suffix; `-` becomes `_`.
MODULE_NAME = re.compile(r"[A-Za-z0-9_]+")


@dataclass(frozen=True, slots=True)
class Func:
    """One replaced function: `old` is its name, `new` the replacement's in the patch's own code.

    `sympos` chooses among several symbols named `old`, counted from 1; 0 says the name is unique.
    """

    old: str
    new: str
    sympos: int = 0

    def __post_init__(self) -> None:
        if not self.old or not self.new:
            raise KlpemuError("a func without a name", advice="name the old and the new function")
        if not 0 <= self.sympos < 1 << 64:
            raise KlpemuError(
                f"symbol position {self.sympos}",
                where=f"function '{self.old}'",
                advice="count from 1, or leave it 0 for a name that is unique",
            )


@dataclass(frozen=True, slots=True)
class Patch:
    """A livepatch: its name (its module's), its funcs by object, the file with its code, and `replace`."""

    name: str
    objects: Mapping[str, Sequence[Func]] = field(default_factory=dict)
    code: str | PathLike[str] | None = None
    replace: bool = False

    def __post_init__(self) -> None:
        if not MODULE_NAME.fullmatch(self.name) or self.name == VMLINUX:
            raise KlpemuError(
                f"no patch can be called '{self.name}'",
                advice="name it as its module is named: letters, digits and underscores",
            )
        for objname, funcs in self.objects.items():
            if not MODULE_NAME.fullmatch(objname):
                raise KlpemuError(
                    f"no object is called '{objname}'",
                    where=f"patch '{self.name}'",
                    advice="name a module, or vmlinux",
                )
            if not funcs:
                raise KlpemuError(
                    f"object '{objname}' without functions",
                    where=f"patch '{self.name}'",
                    advice="name at least one function, or leave the object out",
                )


def materialise(machine: Any, patch: Patch, module: int, new_func: Mapping[str, int]) -> Any:
    """The `struct klp_patch` of a patch in guest memory, with its arrays of objects and funcs.

    `module` is the address of the patch's struct module, `new_func` the addresses of its replacement
    functions.  The arrays end with an element of zeroes, as static ones in a livepatch module do.
    """
    layouts, slab, view = machine.layouts, machine.slab, machine.view
    owner = f"patch {patch.name}"
    object_size = layouts.sizeof("klp_object")
    guest = view("klp_patch", slab.kzalloc(layouts.sizeof("klp_patch"), f"klp_patch of {owner}"))
    guest.mod = module
    guest.replace = patch.replace
    try:
        guest.objs = slab.kzalloc(object_size * (len(patch.objects) + 1), f"klp_object[] of {owner}")
    except KlpemuError:
        slab.kfree(guest.address_)
        raise
    try:
        _fill(machine, patch, guest, new_func)
    except KlpemuError:
        discard(machine, guest)
        raise
    return guest


def _fill(machine: Any, patch: Patch, guest: Any, new_func: Mapping[str, int]) -> None:
    layouts, slab, view = machine.layouts, machine.slab, machine.view
    owner = f"patch {patch.name}"
    object_size, func_size = layouts.sizeof("klp_object"), layouts.sizeof("klp_func")
    for number, (objname, funcs) in enumerate(patch.objects.items()):
        obj = view("klp_object", guest.objs + number * object_size)
        obj.funcs = slab.kzalloc(func_size * (len(funcs) + 1), f"klp_func[] of {owner}")
        obj.name = 0 if objname == VMLINUX else slab.kstrdup(objname, f"object name of {owner}")
        for index, declared in enumerate(funcs):
            func = view("klp_func", obj.funcs + index * func_size)
            func.old_name = slab.kstrdup(declared.old, f"function name of {owner}")
            func.new_func = new_func[declared.new]
            func.old_sympos = declared.sympos


def discard(machine: Any, guest: Any) -> None:
    """Free what `materialise` made; the patch must be neither enabled nor in transition."""
    for obj in static_objects(machine, guest):
        for func in static_funcs(machine, obj):
            machine.slab.kfree(func.old_name)
        machine.slab.kfree(obj.funcs)
        machine.slab.kfree(obj.name)
    machine.slab.kfree(guest.objs)
    machine.slab.kfree(guest.address_)


def declared(klp: Any, guest: Any, path: str) -> tuple[Patch, dict[str, int]]:
    """What a livepatch module's own structs declare: the patch, and its replacements' addresses by name.

    Read before the core touches them: afterwards the objects also hold what it added.  An object without
    funcs, which has callbacks only, is left out.
    """
    objects: dict[str, list[Func]] = {}
    new_func: dict[str, int] = {}
    for obj in static_objects(klp.machine, guest):
        objname = klp.string(obj.name) if obj.name else VMLINUX
        for func in static_funcs(klp.machine, obj) if obj.funcs else ():
            if not func.old_name or not func.new_func:
                continue  # the core refuses that
            new = klp.machine.kallsyms.describe(func.new_func).split("+")[0]
            new_func[new] = func.new_func
            funcs = objects.setdefault(objname, [])
            funcs.append(Func(klp.string(func.old_name), new, func.old_sympos))
    return Patch(klp.name_of(guest), objects, code=path, replace=guest.replace), new_func


def static_objects(machine: Any, guest: Any) -> list[Any]:
    """klp_for_each_object_static: the array up to its element of zeroes."""
    found, at = [], guest.objs
    while (obj := machine.view("klp_object", at)).funcs or obj.name:
        found.append(obj)
        at += machine.layouts.sizeof("klp_object")
    return found


def static_funcs(machine: Any, obj: Any) -> list[Any]:
    """klp_for_each_func_static."""
    found, at = [], obj.funcs
    while (func := machine.view("klp_func", at)).old_name or func.new_func or func.old_sympos:
        found.append(func)
        at += machine.layouts.sizeof("klp_func")
    return found
