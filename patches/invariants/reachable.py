"""What is freed cannot be reached any more: from a list, from a trampoline, from a task."""

import bisect
from collections.abc import Iterator

from emu.machine import Machine
from emu.memory import MemoryFault
from emu.slab import PAGE_OFFSET
from emu.task import Task
from patches.invariants.finding import Finding
from patches.invariants.subject import Subject
from patches.invariants.walk import entries
from patches.invariants.witness import Witness

__all__ = ["IN_USE", "FreedObjects", "nothing_freed_is_reachable"]

IN_USE = "nothing_freed_is_in_use"
HEAP = range(PAGE_OFFSET, 0xFFFF_C000_0000_0000)
# What livepatch and ftrace allocate, by the beginnings of the allocations' tags.
REDIRECTING = ("klp_ops", "ftrace_ops", "nop klp_func", "ftrace_hash")
TRAMPOLINE = "ftrace_trampoline"


def nothing_freed_is_reachable(subject: Subject) -> Iterator[Finding | None]:
    """Whatever the lists of livepatch and ftrace lead to is allocated, and every trampoline is mapped.

    Source: Documentation/RCU/whatisRCU.rst, removal before reclamation; ftrace_shutdown() of
    kernel/trace/ftrace.c.
    """
    if subject.slab is None:
        return
    live = sorted((start, start + size) for start, (size, _) in subject.slab.live.items())
    for what, address in _reached(subject):
        at = bisect.bisect_right(live, (address, 1 << 64)) - 1
        if address in HEAP and not (at >= 0 and live[at][0] <= address < live[at][1]):
            yield Finding("nothing_freed_is_reachable", f"{what} is not allocated", address)
        else:
            yield None
    for each in subject.ftrace.ops:
        trampoline = each.ops.trampoline
        try:
            subject.memory.read(trampoline, 1) if trampoline else b""
            yield None
        except MemoryFault:
            what = "the trampoline of a registered ops is not mapped"
            yield Finding("nothing_freed_is_reachable", what, trampoline)


def _reached(subject: Subject) -> Iterator[tuple[str, int]]:
    symbols, offsetof = subject.symbols, subject.layouts.offsetof
    for patch in entries(subject, symbols["klp_patches"], "klp_patch", "list"):
        yield "a patch of klp_patches", patch
        for obj in entries(subject, patch + offsetof("klp_patch", "obj_list"), "klp_object", "node"):
            yield "an object of a patch", obj
            for func in entries(subject, obj + offsetof("klp_object", "func_list"), "klp_func", "node"):
                yield "a func of an object", func
    for ops in entries(subject, symbols["klp_ops"], "klp_ops", "node"):
        yield "a klp_ops", ops
        for func in entries(subject, ops + offsetof("klp_ops", "func_stack"), "klp_func", "stack_node"):
            yield "a func on a func_stack", func
    for each in subject.ftrace.ops:
        yield "an ops of ftrace_ops_list", each.ops.address_


class FreedObjects(Witness):
    """nothing_freed_is_in_use: When an ops, a klp_ops, a nop func or a trampoline is freed, no task is in the
    code that redirects calls with a pointer to it in a register, and none is in the trampoline or returns
    into it.

    Source: 0e792b89e680 ("ftrace: Fix use-after-free for dynamic ftrace_ops"); the comment on
    synchronize_rcu_tasks() in ftrace_shutdown().
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine, IN_USE)
        symbols = machine.vmlinux.symbols
        self._code = [
            range(symbols[first], symbols[last])
            for first, last in (
                ("ftrace_caller", "ftrace_caller_end"),
                ("ftrace_regs_caller", "ftrace_regs_caller_end"),
            )
        ]
        machine.slab.freeing.append(self._object_freed)
        machine.area.freeing.append(self._area_freed)

    def _object_freed(self, start: int, size: int, tag: str) -> None:
        if not tag.startswith(REDIRECTING):
            return
        self._checks += 1
        for task in self._in_guest():
            registers = self._registers(task)
            if not self._redirects(registers["rip"]):
                continue
            held = [name for name, value in registers.items() if start <= value < start + size]
            if held:
                where = self._machine.kallsyms.describe(registers["rip"])
                what = f"{tag} is freed while {task.name} is at {where} with its address in {held[0]}"
                self._findings.append(Finding(IN_USE, what, start))

    def _area_freed(self, start: int, size: int, tag: str) -> None:
        if not tag.startswith(TRAMPOLINE):
            return
        self._checks += 1
        for task in self._in_guest():
            registers = self._registers(task)
            addresses = (registers["rip"], *self._machine.unwinder.walk(registers).entries)
            if any(start <= each < start + size for each in addresses):
                self._findings.append(
                    Finding(IN_USE, f"a trampoline is freed while {task.name} is in it", start)
                )

    def _in_guest(self) -> list[Task]:
        """Tasks in guest code that run, or that were preempted there."""
        return [
            task
            for task in self._machine.tasks
            if task.in_guest and (task.running or (task.context is not None and task.preempted))
        ]

    def _registers(self, task: Task) -> dict[str, int]:
        return task.cpu.registers() if task.context is None else self._machine.frames.resumed(task)

    def _redirects(self, rip: int) -> bool:
        """The code that redirects calls: a trampoline, the list function, a handler."""
        if any(rip in code for code in self._code):
            return True
        symbol = self._machine.kallsyms.at(rip)
        names = ("ftrace_trampoline", "arch_ftrace_ops_list_func", "klp_ftrace_handler")
        return symbol is not None and symbol.name in names
