"""The consistency model, judged by what tasks really executed and not by what their patch_state says.

For every task, between two switch points, all calls of functions of one patch go to one version set.  A
switch point is where the kernel allows a task to change: the return to user space, the idle loop, and the
moment at which another task finds none of the functions that change on its stack
(Documentation/livepatch/livepatch.rst, "Consistency model").

A task that was forced gets other functions in the middle of something: that is what a force gives up.  Who
searches for bugs forgives that: then such a task is judged again from its next switch point on, and what it
was in the middle of may stay on its stack until it leaves it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from elf.unwind_row import FrameBase
from emu.events import Event, EventKind
from emu.machine import Machine
from emu.memory import read_u64
from emu.observer import Observer
from emu.task import Task
from emu.view import list_for_each_entry
from patches.invariants.finding import Finding, Report

__all__ = ["Consistency", "Versions"]

UNPATCHED, PATCHED = 0, 1
MIXED = "versions_are_never_mixed"
LEFT = "switched_tasks_have_left_what_changes"
FREED = "nobody_runs_what_is_freed"
_UNDEFINED = (-1).to_bytes(4, "little", signed=True)  # KLP_UNDEFINED as a patch_state


@dataclass(frozen=True)
class Versions:
    """What a patch changes: by function address, UNPATCHED for what it takes over from, PATCHED for its own.

    The original function stands for a nop func.
    """

    patch: str
    of: dict[int, int]


@dataclass
class _Stretch:
    """What one task has executed since its last switch point, and where that was; or since it was forced."""

    since: str = "its start"
    forced: bool = False
    executed: dict[int, None] = field(default_factory=dict)


class Consistency:
    """Follows one machine from now on; `report` gives what was found since the last report.

    With `forgives` what comes of a force is not found.
    """

    def __init__(self, machine: Machine) -> None:
        self.forgives = False
        self._machine = machine
        self._versions: dict[int, Versions] = {}  # by address of the klp_patch
        self._stretches: dict[int, _Stretch] = {}  # by address of the task_struct
        # The functions that a task was in the middle of when it was forced, or entered soon after.
        self._excused: dict[int, set[int]] = {}
        self._stored_by_another = 0  # address of the task_struct whose patch_state was stored a moment ago
        self._patch_state = machine.layouts.offsetof("task_struct", "patch_state")
        self._checks: dict[str, int] = {}
        self._findings: list[Finding] = []
        self._transition_patch = machine.symbol("klp_transition_patch")
        self._target_state = machine.symbol("klp_target_state")
        self.observer = Observer(machine, self._executed)
        machine.events.listeners.append(self._event)

    def watch(self, functions: Iterable[int]) -> None:
        """Functions that may be patched, or replacements."""
        location = self._machine.ftrace.ftrace_location
        for function in functions:
            site = location(function)
            self.observer.watch(function, site or None)

    def forget_patch(self, patch: int) -> None:
        """A patch is gone: what was its own means nothing any more."""
        self._versions.pop(patch, None)

    def about_to_free(self, start: int, end: int, what: str) -> None:
        """nobody_runs_what_is_freed: When code is freed no task runs it or will return into it.

        Source: klp_free_patch_finish(), and klp_force_transition(), after which nothing is freed;
        "Consistency model" in Documentation/livepatch/livepatch.rst.
        """
        for task in self._machine.tasks:
            self._checks[FREED] = self._checks.get(FREED, 0) + 1
            for address in self._reachable(task):
                if start <= address < end:
                    text = f"{self._name(task)} still has {self._describe(address)} of '{what}' on its stack"
                    self._findings.append(Finding(FREED, text, address))
                    break
        self.observer.forget(start, end)

    def report(self, step: str) -> Report:
        """What was checked and found since the last report."""
        checks, self._checks = self._checks, {}
        found, self._findings = self._findings, []
        return Report(
            step, checks, tuple(Finding(each.invariant, each.what, each.address, step=step) for each in found)
        )

    # What happens.

    def _executed(self, task: Task, function: int) -> None:
        """versions_are_never_mixed: Between two of its switch points a task calls functions of one version of
        a patch only, the old ones or the new ones.

        Source: "Consistency model" in Documentation/livepatch/livepatch.rst.
        """
        self._was_forced()
        stretch = self._stretches.setdefault(task.struct, _Stretch())
        if stretch.forced:
            self._excused[task.struct].add(function)
            return
        stretch.executed[function] = None
        for versions in self._versions.values():
            version = versions.of.get(function)
            if version is None:
                continue
            self._checks[MIXED] = self._checks.get(MIXED, 0) + 1
            other = next(
                (each for each in stretch.executed if versions.of.get(each, version) != version), None
            )
            if other is not None:
                text = (
                    f"{self._name(task)} called {self._version(versions, other)} and then "
                    f"{self._version(versions, function)} of '{versions.patch}', with no switch point "
                    f"between them; the last one was {stretch.since}"
                )
                self._findings.append(Finding(MIXED, text, function))
                # One finding a stretch is enough: what follows is judged by the version that came last.
                stretch.executed = {function: None}

    def _event(self, event: Event) -> None:
        if event.kind is EventKind.SWITCH_POINT:
            if event.address == self._stored_by_another:
                self._stored_by_another = 0
            self._stretches[event.address] = _Stretch(event.note)
            if event.note == "stack check":
                self._switched(event.address)
            elif event.address in self._excused:  # it has left everything
                del self._excused[event.address]
            return
        self._was_forced()
        if event.kind is not EventKind.STORE:
            return
        if event.address == self._transition_patch and any(event.after):
            patch = int.from_bytes(event.after, "little")
            self._versions[patch] = self._versions_of(patch)
            return
        struct = event.address - self._patch_state
        if struct in self._machine.by_struct and _UNDEFINED not in (event.before, event.after):
            hub = self._machine.hub
            if event.before != event.after and hub.in_service and hub.current.struct != struct:
                self._stored_by_another = struct

    def _was_forced(self) -> None:
        """What another task has stored, and no switch point followed: klp_force_transition()."""
        if not self._stored_by_another:  # nearly always: a store here would tie every event to the others
            return
        struct, self._stored_by_another = self._stored_by_another, 0
        if self.forgives:
            task = self._machine.by_struct[struct]
            self._stretches[struct] = _Stretch("a force", forced=True)
            self._excused[struct] = {each.function for each in self.observer.activations(task)}

    def _switched(self, struct: int) -> None:
        """switched_tasks_have_left_what_changes: A task that is switched by a stack check has no function on
        its stack that the transition changes.

        Source: klp_check_stack() of kernel/livepatch/transition.c.
        """
        patch = read_u64(self._machine.space, self._transition_patch)
        versions = self._versions.get(patch)
        task = self._machine.by_struct.get(struct)
        if versions is None or task is None:
            return
        self._checks[LEFT] = self._checks.get(LEFT, 0) + 1
        target = self._machine.space.read(self._target_state, 1)[0]
        activations = self.observer.activations(task)
        excused = self._excused.pop(struct, set()) & {each.function for each in activations}
        if excused:
            self._excused[struct] = excused
        for activation in activations:
            if activation.function not in excused and versions.of.get(activation.function, target) != target:
                text = (
                    f"{self._name(task)} was switched while {self._describe(activation.function)} "
                    f"is on its stack, which '{versions.patch}' changes"
                )
                self._findings.append(Finding(LEFT, text, activation.function))

    def _versions_of(self, patch: int) -> Versions:
        """What guest memory says the patch changes, at the moment its transition begins.

        Everything below on a func_stack is old: nobody may be in the middle of any of it.
        """
        guest = self._view("klp_patch", patch)
        found: dict[int, int] = {}
        for obj in list_for_each_entry(guest.obj_list, "klp_object", "node"):
            for func in list_for_each_entry(obj.func_list, "klp_func", "node"):
                if not func.old_func:
                    continue
                old = [func.old_func if each.nop else each.new_func for each in self._below(func)]
                old.append(func.old_func)
                new = func.old_func if func.nop else func.new_func
                if old[0] != new:
                    found |= {**dict.fromkeys(old, UNPATCHED), new: PATCHED}
        name: bytes = guest.follow_("mod").name
        return Versions(name.split(b"\0")[0].decode("ascii", "backslashreplace"), found)

    def _below(self, func: Any) -> list[Any]:
        """The funcs that are, or will be, below this one on the func_stack, newest first."""
        head = self._view("list_head", self._machine.symbol("klp_ops"))
        for ops in list_for_each_entry(head, "klp_ops", "node"):
            stack = list(list_for_each_entry(ops.func_stack, "klp_func", "stack_node"))
            if stack and stack[0].old_func == func.old_func:
                return stack[stack.index(func) + 1 :] if func in stack else stack
        return []

    def _reachable(self, task: Task) -> list[int]:
        """The addresses at which a task executes, or will when something returns."""
        machine = self._machine
        if not task.in_guest:
            return []
        if task.context is not None and task.preempted:
            registers = machine.frames.resumed(task)
        elif task.context is not None or not task.running:
            return list(machine.unwinder.walk_task(task.struct).entries)
        else:
            registers = task.cpu.registers()
        return [*machine.unwinder.walk(registers).entries, *self._decided(registers["rip"], registers["rsp"])]

    def _decided(self, ip: int, sp: int) -> list[int]:
        """Where the trampoline that is being executed will return to: pt_regs.ip, once the handler is called.

        No return address says so before the trampoline has stored it in the caller's slot.
        """
        machine = self._machine
        layouts, row_at = machine.layouts, machine.unwinder.row_at
        call = machine.symbol("ftrace_call") - machine.symbol("ftrace_caller")
        interrupted = True
        while (symbol := machine.kallsyms.at(ip)) is not None:
            row = row_at(ip if interrupted else ip - 1)
            if row is None or row.base is not FrameBase.SP:
                break
            caller = sp + row.offset
            if symbol.module == "__builtin__ftrace" and ip - symbol.address > call:
                regs = caller - 8 - layouts.sizeof("pt_regs")
                return [read_u64(machine.space, regs + layouts.offsetof("pt_regs", "ip"))]
            if symbol.name not in ("klp_ftrace_handler", "arch_ftrace_ops_list_func"):
                break
            ip, sp, interrupted = read_u64(machine.space, caller - 8), caller, False
        return []

    # Words.

    def _view(self, struct: str, address: int) -> Any:
        return self._machine.layouts.view(struct, self._machine.space, address)

    def _describe(self, address: int) -> str:
        return self._machine.kallsyms.describe(address).split("+")[0]

    def _version(self, versions: Versions, function: int) -> str:
        return f"{'the new' if versions.of[function] else 'the old'} {self._describe(function)}"

    def _name(self, task: Task) -> str:
        return f"{task.name}:{self._machine.pid_of(task)}"
