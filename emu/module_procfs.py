"""/proc/modules: one line a module, the newest first (kernel/module/procfs.c)."""

from typing import TYPE_CHECKING, Any, Final

from emu.module_state import ModuleState, struct_name
from emu.module_sysfs import module_flags_taint
from emu.module_use import module_refcount, users_of
from emu.view import list_for_each_entry

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["connect", "modules_show"]

_STATES: Final = {ModuleState.COMING: ("Loading", "+"), ModuleState.GOING: ("Unloading", "-")}


def connect(machine: "Machine") -> None:
    """Put the file into the tree."""
    machine.kernfs.create_file("/proc/modules", 0o444, show=lambda: modules_show(machine))


def modules_show(machine: "Machine") -> str:
    """Name, bytes, references, users, state, address and taints of each module."""
    modules = list_for_each_entry(machine.list_head("modules"), "module", "list")
    return "".join(_line(module) for module in modules if module.state != ModuleState.UNFORMED)


def _line(module: Any) -> str:
    size = module.init_layout.size + module.core_layout.size
    users = "".join(f"{name}," for name in users_of(module))
    if module.init and not module.exit:
        users += "[permanent],"
    state, sign = _STATES.get(module.state, ("Live", ""))
    taints = f" ({module_flags_taint(module.taints)}{sign})" if module.taints else ""
    start = f"{module.core_layout.base:#018x}"
    return f"{struct_name(module)} {size} {module_refcount(module)} {users or '-'} {state} {start}{taints}\n"
