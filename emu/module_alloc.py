"""Memory for a module that is being loaded, and its place on the `modules` list (kernel/module/main.c).

Everything is given back through an ExitStack if a later step fails.
"""

from collections.abc import Collection
from contextlib import ExitStack
from typing import TYPE_CHECKING

from elf.image import Image
from emu.list import list_add_rcu, list_del_rcu
from emu.module_state import ModuleState, Taint, find_module_sections, set_layouts, taint_of
from emu.module_use import module_unload_init
from emu.placement import Placement, lay_out

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["add_unformed_module", "layout_and_allocate"]


def layout_and_allocate(machine: "Machine", image: Image, name: str, undo: ExitStack) -> Placement:
    """Reserve the core's memory, that of what goes after init, and per-CPU memory; nothing is mapped yet."""

    def reserve(size: int, tag: str) -> int:
        address = machine.area.reserve(size, tag)
        undo.callback(machine.area.free, address)
        return address

    def per_cpu(size: int, alignment: int) -> int:
        offset = machine.percpu.alloc(size, alignment)
        undo.callback(machine.percpu.free, offset)
        return offset

    return lay_out(
        image,
        lambda size: reserve(size, f"module {name}"),
        per_cpu,
        lambda size: reserve(size, f"init of module {name}"),
    )


def add_unformed_module(
    machine: "Machine",
    name: str,
    this_module: int,
    placement: Placement,
    taints: Collection[Taint],
    parameters: str,
    undo: ExitStack,
) -> int:
    """Put the struct module on the list, UNFORMED, with all that is known by now; returns its address.

    It is the module's own at `this_module`, or one of ours for an object that has none (0).
    """
    if not this_module:
        this_module = machine.slab.kzalloc(machine.layouts.sizeof("module"), f"struct module {name}")
        undo.callback(machine.slab.kfree, this_module)
    module = machine.view("module", this_module)
    module.name = name.encode()
    module.state = ModuleState.UNFORMED
    module.klp = "livepatch" in placement.image.modinfo
    module.taints = taint_of(taints)
    module.mkobj.mod = this_module
    set_layouts(module, placement)
    module_unload_init(module)
    find_module_sections(module, placement)
    module.args = machine.slab.kstrdup(parameters, f"args of module {name}")
    undo.callback(machine.slab.kfree, module.args)
    list_add_rcu(module.list, machine.list_head("modules"))
    undo.callback(list_del_rcu, module.list)
    return this_module
