"""What livepatch shows in /sys/kernel/livepatch, and takes from there: kernel/livepatch/core.c.

    <patch>/enabled                      0644   1 or 0; a write disables the patch, or reverses its transition
    <patch>/transition                   0444   1 while the patch is in transition
    <patch>/force                        0200   a write of 1 ends the transition
    <patch>/<object>/patched             0444   1 while the object's functions are patched
    <patch>/<object>/<function,sympos>/         a directory without files

A directory is there from klp_init_patch(), klp_init_object() and klp_init_func() on, until the last reference
to its kobject goes.  Documentation/ABI/testing/sysfs-kernel-livepatch has rights and meanings; `patched`
came with bb26cfd9e77e ("livepatch: add sysfs entry "patched" for each klp_object") (in v6.1).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from emu.kobject import Attribute, KobjType, kstrtobool
from emu.wait import complete_one
from patches import core
from patches.klp import Klp

__all__ = [
    "connect",
    "directories",
    "klp_kobj_release_func",
    "klp_kobj_release_object",
    "klp_kobj_release_patch",
    "klp_object_attrs",
    "klp_patch_attrs",
    "klp_patch_of",
]


def connect(klp: Klp) -> None:
    """Give the kobjects of patches, objects and funcs their files and their release functions."""
    klp.klp_ktype_patch = KobjType(
        lambda kobj: klp_kobj_release_patch(klp, kobj), lambda: klp_patch_attrs(klp)
    )
    klp.klp_ktype_object = KobjType(
        lambda kobj: klp_kobj_release_object(klp, kobj), lambda: klp_object_attrs(klp)
    )
    klp.klp_ktype_func = KobjType(lambda kobj: klp_kobj_release_func(klp, kobj))


def directories(klp: Klp) -> dict[str, int]:
    """The directories below /sys/kernel/livepatch as the tree has them, with their kobjects (0: none)."""
    kobjects = {path: address for address, path in klp.machine.kobjects.sd.items()}
    kernfs = klp.machine.kernfs
    root = klp.machine.kobjects.sd[klp.klp_root_kobj.address_]
    return {path: kobjects.get(path, 0) for path in kernfs.directories(root)}


def klp_patch_attrs(klp: Klp) -> Sequence[Attribute]:
    """The files of a patch.  Kernels with other ones are variants: they replace this function."""
    return (
        Attribute("enabled", 0o644, partial(enabled_show, klp), partial(enabled_store, klp)),
        Attribute("transition", 0o444, partial(transition_show, klp)),
        Attribute("force", 0o200, store=partial(force_store, klp)),
    )


def klp_object_attrs(klp: Klp) -> Sequence[Attribute]:
    """The files of an object."""
    return (Attribute("patched", 0o444, partial(patched_show, klp)),)


def enabled_show(klp: Klp, kobj: int) -> str:
    """The patch is enabled, or on the way to it."""
    return f"{klp_patch_of(klp, kobj).enabled:d}\n"


def enabled_store(klp: Klp, kobj: int, text: str) -> None:
    """Disable the patch, or reverse its transition; EINVAL for what it is already, or cannot become."""
    core.enabled_store(klp, klp_patch_of(klp, kobj), kstrtobool(text))


def transition_show(klp: Klp, kobj: int) -> str:
    """The patch is the one in transition."""
    return f"{klp_patch_of(klp, kobj) == klp.transition_patch:d}\n"


def force_store(klp: Klp, kobj: int, text: str) -> None:
    """End the transition of the patch, EINVAL if it is in none; to write 0 does nothing."""
    if kstrtobool(text):
        core.force_store(klp, klp_patch_of(klp, kobj))


def patched_show(klp: Klp, kobj: int) -> str:
    """The functions of the object are patched."""
    return f"{_owner(klp, 'klp_object', kobj).patched:d}\n"


def klp_kobj_release_patch(klp: Klp, kobj: int) -> None:
    """Nobody refers to the patch any more: whoever frees it can go on."""
    complete_one(klp.machine, klp_patch_of(klp, kobj).finish.address_)


def klp_kobj_release_object(klp: Klp, kobj: int) -> None:
    """Nobody refers to the object any more: free it if it was made for nops."""
    obj = _owner(klp, "klp_object", kobj)
    if obj.dynamic:
        klp.machine.slab.kfree(obj.name)
        klp.machine.slab.kfree(obj.address_)


def klp_kobj_release_func(klp: Klp, kobj: int) -> None:
    """Nobody refers to the func any more: free it if it is a nop."""
    func = _owner(klp, "klp_func", kobj)
    if func.nop:
        klp.machine.slab.kfree(func.old_name)
        klp.machine.slab.kfree(func.address_)


def klp_patch_of(klp: Klp, kobj: int) -> Any:
    """The patch whose kobject is at an address."""
    return _owner(klp, "klp_patch", kobj)


def _owner(klp: Klp, struct: str, kobj: int) -> Any:
    return klp.machine.view(struct, kobj - klp.machine.layouts.offsetof(struct, "kobj"))
