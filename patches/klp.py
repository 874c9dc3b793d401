"""The livepatch core's state: views of its globals in guest memory, and what has no place there."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from emu.kobject import KobjType, kobject_create_and_add
from emu.machine import Machine
from emu.memory import read_string
from emu.printk import Printk
from emu.view import GuestVariable, Struct, list_for_each_entry

__all__ = ["Klp", "klp_for_each_func", "klp_for_each_object"]


@dataclass(eq=False)
class Klp:
    """One machine's livepatch core.

    `klp_root_kobj` is the kobject of /sys/kernel/livepatch, the `klp_ktype_...` are set by patches/sysfs.py.
    `freed` is called when a patch's release is done, which is when its module may go.  `why_not` has, by
    task_struct, why the last attempt could not switch a task.
    """

    machine: Machine
    klp_patches: Any = field(init=False)
    klp_ops: Any = field(init=False)
    klp_transition_patch: GuestVariable = field(init=False)
    klp_target_state: GuestVariable = field(init=False)
    klp_signals_cnt: GuestVariable = field(init=False)
    klp_root_kobj: Any = field(init=False)
    klp_ktype_patch: KobjType = field(default_factory=KobjType)
    klp_ktype_object: KobjType = field(default_factory=KobjType)
    klp_ktype_func: KobjType = field(default_factory=KobjType)
    freed: Callable[[Any], None] = field(default=lambda patch: None)
    why_not: dict[int, str] = field(default_factory=dict)
    # Addresses of the klp_patches that are off the list and still wait for their release.
    being_freed: set[int] = field(default_factory=set)
    # By id of shadow variables, the livepatch modules that have allocated or freed any.
    shadow_users: dict[int, set[str]] = field(default_factory=dict)
    # old_func to the address of its klp_ops: a guess, checked in guest memory before it is used.
    ops_hints: dict[int, int] = field(default_factory=dict)
    _warned: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        machine = self.machine
        self.klp_patches = machine.list_head("klp_patches")
        self.klp_ops = machine.list_head("klp_ops")
        self.klp_transition_patch = machine.variable("klp_transition_patch")
        self.klp_target_state = machine.variable("klp_target_state", "<i")
        self.klp_signals_cnt = machine.variable("klp_signals_cnt", "<I")
        self.klp_root_kobj = kobject_create_and_add(machine, "livepatch", machine.kernel_kobj)

    @property
    def log(self) -> Printk:
        """The kernel's log."""
        return self.machine.log

    @property
    def transition_patch(self) -> Any:
        """The patch in transition, or None."""
        address = self.klp_transition_patch.get()
        return self.machine.view("klp_patch", address) if address else None

    def patches(self) -> Iterator[Any]:
        """The enabled patches and the one in transition, oldest first (klp_for_each_patch)."""
        return list_for_each_entry(self.klp_patches, "klp_patch", "list")

    def ops(self) -> Iterator[Any]:
        """All klp_ops, newest first."""
        return list_for_each_entry(self.klp_ops, "klp_ops", "node")

    def tasks(self) -> Iterator[Any]:
        """All tasks but the idle ones (for_each_process_thread)."""
        init_task = self.machine.view("task_struct", self.machine.symbol("init_task"))
        return list_for_each_entry(init_task.tasks, "task_struct", "tasks")

    def idle_tasks(self) -> Iterator[Any]:
        """The idle task of each possible CPU."""
        for rq in self.machine.sched.runqueues:
            yield self.machine.view("task_struct", rq.idle.struct)

    def leads_into(self, module: int) -> bool:
        """Whether the struct module at `module` is that of the patch in transition, or a func_stack has a
        function of it.
        """
        patch = self.transition_patch
        if patch is not None and patch.mod == module:
            return True
        core = self.machine.view("module", module).core_layout
        return any(
            core.base <= func.new_func < core.base + core.size
            for ops in self.ops()
            for func in list_for_each_entry(ops.func_stack, "klp_func", "stack_node")
        )

    def name_of(self, patch: Any) -> str:
        """A patch is called as its module."""
        return self.module_name(patch.follow_("mod"))

    def module_name(self, module: Any) -> str:
        """The name in a struct module."""
        name: bytes = module.name
        return name.split(b"\0")[0].decode("ascii", "backslashreplace")

    def string(self, address: int) -> str:
        """A C string of the core's structs."""
        return read_string(self.machine.shared, address)

    def warn(self, function: str, condition: str) -> None:
        """WARN_ON(condition) in a function of the core: it goes on."""
        number = self.machine.hub.current.cpu.number
        pid = self.machine.pid_of(self.machine.hub.current)
        self.log.pr_warn(f"WARNING: CPU: {number} PID: {pid} at {function}")
        self.machine.warnings.append(f"WARNING at {function}: {condition}")

    def warn_once(self, function: str, condition: str) -> None:
        """WARN_ON_ONCE(condition)."""
        if (function, condition) not in self._warned:
            self._warned.add((function, condition))
            self.warn(function, condition)


def klp_for_each_object(patch: Struct) -> Iterator[Any]:
    """The objects of a patch, those made for nops included."""
    return list_for_each_entry(patch.obj_list, "klp_object", "node")


def klp_for_each_func(obj: Struct) -> Iterator[Any]:
    """The funcs of an object, nops included."""
    return list_for_each_entry(obj.func_list, "klp_func", "node")
