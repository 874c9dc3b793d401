"""/sys/module/<name>: what a loaded module shows of itself (kernel/module/main.c, sysfs.c, kernel/params.c).

    initstate   0444   coming while its init function runs, then live; going while its exit function runs
    refcnt      0444   how many users it has, without the loader's own reference
    taint       0444   the letters of what it taints the kernel with
    coresize    0444   bytes of its text and data
    initsize    0444   bytes of what is only there until its init function has returned
    version, srcversion           0444   as its modinfo says, if it does
    parameters/<parameter>               with the parameter's own rights, for those that have any

The directory is there from when the module is COMING and livepatch has seen it, until it is freed.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from emu.kobject import Attribute, KobjType, add_attribute, kobject_add, kobject_init, kobject_put
from emu.module_use import module_refcount

if TYPE_CHECKING:
    from emu.machine import Machine
    from emu.module import LoadedObject

__all__ = ["connect", "mod_sysfs_setup", "mod_sysfs_teardown", "module_flags_taint"]

_STATES: Final = ("live", "coming", "going")
# The letters of what a module can taint the kernel with, by bit (taint_flags[] of kernel/panic.c).
_LETTERS: Final = {0: "P", 1: "F", 10: "C", 12: "O", 13: "E", 15: "K", 16: "X", 17: "T", 18: "N"}


def connect(machine: "Machine") -> None:
    """Let the module loader make and remove the directories."""
    machine.modules.mod_sysfs_setup = partial(mod_sysfs_setup, machine)
    machine.modules.mod_sysfs_teardown = partial(mod_sysfs_teardown, machine)


def module_flags_taint(taints: int) -> str:
    """The letters of the bits that are set, in the bits' order."""
    return "".join(letter for bit, letter in _LETTERS.items() if taints >> bit & 1)


def mod_sysfs_setup(machine: "Machine", loaded: "LoadedObject") -> None:
    """Make the directory of a module; raises EEXIST if there is one of its name."""
    module, modinfo = machine.view("module", loaded.struct), loaded.placement.image.modinfo
    kobj = module.mkobj.kobj
    kobject_init(
        machine,
        kobj,
        KobjType(default_attrs=lambda: _attributes(module, modinfo)),
    )
    module.mkobj.mod = module.address_
    kobject_add(machine, kobj, machine.module_kobj, loaded.name)
    parameters = machine.modules.parameters(loaded.name)
    if not parameters:
        return
    directory = f"{machine.kobjects.sd[kobj.address_]}/parameters"
    machine.kernfs.create_dir(directory)
    for name, mode in parameters:
        add_attribute(machine, kobj.address_, directory, _parameter(machine, loaded.name, name, mode))


def mod_sysfs_teardown(machine: "Machine", loaded: "LoadedObject") -> None:
    """Take the directory away, and wait until nobody uses what it shows (mod_kobject_put())."""
    module = machine.view("module", loaded.struct)
    if module.mkobj.kobj.address_ not in machine.kobjects.sd:  # it has not come so far
        return
    address = module.mkobj.kobj.address_
    kobject_put(machine, module.mkobj.kobj)
    machine.hub.wait(lambda: address not in machine.kobjects.ktypes, f"the kobject of module {loaded.name}")


def _attributes(module: Any, modinfo: Mapping[str, Sequence[str]]) -> list[Attribute]:
    said = [_said(key, modinfo[key][0]) for key in ("version", "srcversion") if modinfo.get(key)]
    return [
        *said,
        Attribute("initstate", 0o444, lambda _: f"{_STATES[module.state]}\n"),
        Attribute("coresize", 0o444, lambda _: f"{module.core_layout.size}\n"),
        Attribute("initsize", 0o444, lambda _: f"{module.init_layout.size}\n"),
        Attribute("taint", 0o444, lambda _: f"{module_flags_taint(module.taints)}\n"),
        Attribute("refcnt", 0o444, lambda _: f"{module_refcount(module)}\n"),
    ]


def _said(key: str, text: str) -> Attribute:
    return Attribute(key, 0o444, lambda _: f"{text}\n")


def _parameter(machine: "Machine", module: str, name: str, mode: int) -> Attribute:
    """param_attr_show() and param_attr_store(); what is not writable at first has no store, for ever."""

    def show(_: int) -> str:
        return machine.modules.param_get(module, name)

    def store(_: int, text: str) -> None:
        machine.modules.param_set(module, name, text)

    return Attribute(name, mode, show, store if mode & 0o222 else None)
