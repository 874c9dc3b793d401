"""The livepatch core's state: views of its globals in guest memory, and what has no place there."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from emu.memory import read_string
from emu.printk import Printk
from emu.view import GuestVariable, Struct, list_for_each_entry

__all__ = ["Klp", "klp_for_each_func", "klp_for_each_object"]


@dataclass(eq=False)
class Klp:
    """One machine's livepatch core.  `pending_free` are patches whose release is scheduled (free_work)."""

    machine: Any
    klp_patches: Any = None
    klp_ops: Any = None
    klp_transition_patch: GuestVariable = field(init=False)
    klp_target_state: GuestVariable = field(init=False)
    klp_signals_cnt: GuestVariable = field(init=False)
    pending_free: list[Any] = field(default_factory=list)
    transition_work_pending: bool = False
    # old_func to the address of its klp_ops: a guess, checked in guest memory before it is used.
    ops_hints: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        machine = self.machine
        self.klp_patches = machine.list_head("klp_patches")
        self.klp_ops = machine.list_head("klp_ops")
        self.klp_transition_patch = machine.variable("klp_transition_patch")
        self.klp_target_state = machine.variable("klp_target_state", "<i")
        self.klp_signals_cnt = machine.variable("klp_signals_cnt", "<I")

    @property
    def log(self) -> Printk:
        return self.machine.log  # type: ignore[no-any-return]  # the machine is composed dynamically

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
        yield self.machine.view("task_struct", self.machine.symbol("init_task"))

    def name_of(self, patch: Any) -> str:
        """A patch is called as its module."""
        return patch.follow_("mod").name.rstrip(b"\0").decode()  # type: ignore[no-any-return]  # a view's member

    def string(self, address: int) -> str:
        """A C string of the core's structs."""
        return read_string(self.machine.shared, address)


def klp_for_each_object(patch: Struct) -> Iterator[Any]:
    """The objects of a patch, those made for nops included."""
    return list_for_each_entry(patch.obj_list, "klp_object", "node")


def klp_for_each_func(obj: Struct) -> Iterator[Any]:
    """The funcs of an object, nops included."""
    return list_for_each_entry(obj.func_list, "klp_func", "node")
