"""The func_stacks at every moment of a transition: what a call would reach if it came right now.

Most orders that livepatch keeps matter for a few stores only.  Whether a call falls in between is chance;
whether one could go wrong there is not.  So each store that decides where calls go is judged by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from emu.events import Event, EventKind
from emu.list import LIST_POISON2
from emu.machine import Machine
from emu.memory import read_u32, read_u64
from emu.module_state import ModuleState
from emu.view import list_for_each_entry
from patches.invariants.finding import Finding
from patches.invariants.witness import Witness

__all__ = ["MOMENT", "EveryMoment"]

MOMENT: Final = "every_moment_has_its_version"
KLP_UNDEFINED, KLP_UNPATCHED, KLP_PATCHED = 0xFFFF_FFFF, 0, 1
LINK: Final = 8  # bytes of a pointer; a list_head is next, prev


@dataclass(frozen=True, slots=True)
class _Versions:
    """Where calls of a function go without the patch in transition, and with it.

    `module` is the struct module that the function is in, 0 for vmlinux: what comes back under the same name
    is another one.
    """

    without: int
    with_: int
    module: int


class EveryMoment(Witness):
    """every_moment_has_its_version: While a transition is on, whatever has just been stored, a call by a task
    that is KLP_UNPATCHED would reach what was there without the patch, by one that is KLP_PATCHED what is
    there with it; and no func is in transition while a task is neither.

    Source: klp_ftrace_handler(); the comments on memory barriers in klp_init_transition(),
    __klp_enable_patch() and klp_complete_transition() of 6.1.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine, MOMENT)
        offsetof = machine.layouts.offsetof
        self._node = offsetof("klp_func", "stack_node")
        self._transition = offsetof("klp_func", "transition")
        self._func_stack = offsetof("klp_ops", "func_stack")
        self._patch_state = offsetof("task_struct", "patch_state")
        self._moving = machine.symbol("klp_transition_patch")
        self._funcs: set[int] = set()
        self._heads: dict[int, int] = {}  # of func_stacks, by function
        self._links: dict[int, int] = {}  # where the next pointers of func_stacks lie: the function
        self._versions: dict[int, _Versions] = {}  # by function
        machine.events.listen(self._event, EventKind.STORE)

    def _event(self, event: Event) -> None:
        size = len(event.after)
        if size == LINK:
            if event.address == self._moving:
                self._begin()
            elif self._versions:
                self._linked(event.address, int.from_bytes(event.after, "little"))
        elif size == 1:
            if event.address - self._transition in self._funcs:
                self._flagged(event.address - self._transition)
        elif size == 4 and self._versions and event.address - self._patch_state in self._machine.by_struct:
            state = int.from_bytes(event.after, "little")
            if state != KLP_UNDEFINED:
                for function in self._versions:
                    self._judge(function, state)

    def _linked(self, address: int, value: int) -> None:
        """A pointer was stored: a next of a func_stack, or the prev of a func that is first on one."""
        if address in self._links:
            function = self._links[address]
            if value == address == self._heads.get(function):
                del self._heads[function]  # the klp_ops is about to be freed
            self._judge_all(function)
            return
        func = address - LINK - self._node
        if func in self._funcs and value - self._node not in self._funcs and value != LIST_POISON2:
            self._link(self._func(func).old_func, value, func + self._node)

    def _flagged(self, func: int) -> None:
        """A func has come into transition, or is not any more."""
        if not self._versions and func not in self._listed():
            return  # something else lies there now
        view = self._func(func)
        if view.transition:
            self._checks += 1
            if KLP_UNDEFINED in self._states():
                what = "a func comes into transition while a task is neither KLP_PATCHED nor KLP_UNPATCHED"
                self._find(what, func)
        self._judge_all(view.old_func)

    def _judge_all(self, function: int) -> None:
        if function in self._versions:
            for state in self._states():
                self._judge(function, state)

    def _judge(self, function: int, state: int) -> None:
        versions = self._versions[function]
        if state not in (KLP_PATCHED, KLP_UNPATCHED) or not self._is_live(versions.module):
            return
        self._checks += 1
        expected = versions.with_ if state == KLP_PATCHED else versions.without
        found = self._reached(function, state)
        if found != expected:
            describe = self._machine.kallsyms.describe
            version = "KLP_PATCHED" if state == KLP_PATCHED else "KLP_UNPATCHED"
            what = (
                f"a call of {describe(function)} by a task that is {version} would reach {describe(found)} "
                f"now, not {describe(expected)}"
            )
            self._find(what, function)

    def _find(self, what: str, address: int) -> None:
        """Once a step: stores and tasks that see the same are many."""
        finding = Finding(MOMENT, what, address)
        if finding not in self._findings:
            self._findings.append(finding)

    def _reached(self, function: int, state: int) -> int:
        """Where klp_ftrace_handler() would send a call, with the func_stack as it is now."""
        head = self._heads.get(function)
        if head is None:
            return function
        memory = self._machine.space
        node = read_u64(memory, head)
        if node == head:
            return function
        if state == KLP_UNPATCHED and self._func(node - self._node).transition:
            node = read_u64(memory, node)
            if node == head:
                return function
        func = self._func(node - self._node)
        return function if func.nop else int(func.new_func)

    # What there is.

    def _begin(self) -> None:
        """A transition is over, or about to begin: its funcs are not on the func_stacks yet, or still."""
        machine = self._machine
        self._versions, self._heads, self._links = {}, {}, {}
        self._funcs = self._listed()
        moving = read_u64(machine.space, self._moving)
        patches = list(self._patches())
        added = next((each for each in patches if each.address_ == moving), None)
        if added is None:
            return
        for ops in self._entries(machine.symbol("klp_ops"), "klp_ops", "node"):
            head = ops.address_ + self._func_stack
            for func in list_for_each_entry(ops.func_stack, "klp_func", "stack_node"):
                self._link(func.old_func, head, func.address_ + self._node)
        replaces = bool(added.replace) and not added.enabled
        for patch in (each for each in patches if each.enabled or each.address_ == moving):
            self._declare(patch, is_moving=patch.address_ == moving, replaces=replaces)

    def _declare(self, patch: Any, *, is_moving: bool, replaces: bool) -> None:
        """Take in what a patch declares, nops too, of the objects that are there; newer ones come later."""
        for obj in list_for_each_entry(patch.obj_list, "klp_object", "node"):
            module = obj.mod
            if (obj.name and not module) or not self._is_live(module):
                continue
            for func in list_for_each_entry(obj.func_list, "klp_func", "node"):
                function = func.old_func
                new = function if func.nop else func.new_func
                known = self._versions.get(function, _Versions(function, function, module))
                if is_moving:
                    known = replace(known, with_=new)
                else:
                    known = replace(known, without=new, with_=known.with_ if replaces else new)
                self._versions[function] = known

    def _listed(self) -> set[int]:
        """The funcs of all patches, by their addresses."""
        return {
            func.address_
            for patch in self._patches()
            for obj in list_for_each_entry(patch.obj_list, "klp_object", "node")
            for func in list_for_each_entry(obj.func_list, "klp_func", "node")
        }

    def _patches(self) -> Iterator[Any]:
        return self._entries(self._machine.symbol("klp_patches"), "klp_patch", "list")

    def _link(self, function: int, head: int, node: int) -> None:
        self._heads[function] = head
        self._links[head] = self._links[node] = function

    def _is_live(self, module: int) -> bool:
        """Whether its functions can be called: calls of one that comes or goes have nothing to choose."""
        if not module:
            return True
        if all(each.struct != module for each in self._machine.modules.objects.values()):
            return False
        view = self._machine.layouts.view("module", self._machine.space, module)
        return bool(view.state == ModuleState.LIVE)

    def _states(self) -> set[int]:
        """The patch_states that tasks have; who is being forked is none yet."""
        machine = self._machine
        tasks = (*machine.tasks, *(rq.idle for rq in machine.sched.runqueues))
        return {read_u32(machine.space, task.struct + self._patch_state) for task in tasks}

    def _func(self, address: int) -> Any:
        return self._machine.layouts.view("klp_func", self._machine.space, address)

    def _entries(self, head: int, struct: str, member: str) -> Iterator[Any]:
        list_head = self._machine.layouts.view("list_head", self._machine.space, head)
        return list_for_each_entry(list_head, struct, member)
