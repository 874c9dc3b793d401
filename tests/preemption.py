"""Preempting a task at random instructions, and comparing what the unwinder finds with its shadow stack."""

import random
from collections import Counter
from collections.abc import Callable

from shadow_stack import ShadowedTask

from emu.fork import new_task
from emu.machine import Machine
from emu.task import GuestCall

__all__ = ["Preemption", "UnwinderPoints"]

MAX_STRIDE = 12  # instructions between two points
NOT_FIXTURES = {
    "klp_ftrace_handler": "handlers",
    "trace_count": "handlers",
    "arch_ftrace_ops_list_func": "list function",
}


class UnwinderPoints:
    """How many stacks were walked, by the kind of code that they were in, and how many were unreliable."""

    def __init__(self) -> None:
        self.walked: Counter[str] = Counter()
        self.unreliable: Counter[str] = Counter()

    def record(self, kind: str, unreliable: bool) -> None:
        """One more."""
        self.walked[kind] += 1
        self.unreliable[kind] += unreliable

    def update(self, counts: list[tuple[str, int, int]]) -> None:
        """Add what another process has counted."""
        for kind, walked, unreliable in counts:
            self.walked[kind] += walked
            self.unreliable[kind] += unreliable

    def counts(self) -> list[tuple[str, int, int]]:
        """(kind, walked, unreliable), in alphabetical order."""
        return [(kind, self.walked[kind], self.unreliable[kind]) for kind in sorted(self.walked)]

    def line(self) -> str:
        """All of it, in one line."""
        walked, unreliable = self.walked.total(), self.unreliable.total()
        kinds = ", ".join(f"{kind} {bad}/{all_}" for kind, all_, bad in self.counts())
        return f"unwinder: {walked} points, {unreliable} unreliable ({unreliable / walked:.1%}): {kinds}"


class Preemption:
    """A task of its own whose calls are interrupted at random, and walked.

    `unreliable` says where the unwinder must give up, which by default is where a call is being redirected;
    everywhere else it must find the frames.  `meanwhile` is called between two instructions, `wake` when the
    task sleeps and no timer will wake it.  `modules` is what code in modules counts as.
    """

    def __init__(
        self,
        machine: Machine,
        points: UnwinderPoints,
        seed: str,
        *,
        unreliable: Callable[[ShadowedTask], bool] = lambda shadow: shadow.redirected,
        meanwhile: Callable[[], object] = lambda: None,
        wake: Callable[[], object] = lambda: None,
        modules: str = "replacements",
    ) -> None:
        machine.sched.full_preemption = True
        machine.recorder.enabled = False
        self.machine = machine
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.task = new_task(machine, "watched", machine.cpus[-1])
        self.shadow = ShadowedTask(machine, self.task)
        self._points = points
        self._unreliable = unreliable
        self._modules = modules
        self._meanwhile = meanwhile
        self._wake = wake
        self._intruder = new_task(machine, "intruder", machine.cpus[-1])

    @property
    def total(self) -> int:
        """How many points were compared."""
        return self.counts.total()

    def call(self, function: str | int, *arguments: int, until: int | None = None) -> int:
        """Let the task call guest code, and look at its stack again and again on the way.

        Once there are `until` points in all the call is dropped where it is.
        """
        machine, task = self.machine, self.task
        entry = machine.symbol(function) if isinstance(function, str) else function
        call = machine.hub.call(task, entry, arguments)
        left = self.random.randint(1, MAX_STRIDE)
        while not call.finished:
            if until is not None and self.total >= until:
                machine.hub.abandon(task)
                self.shadow.slots.clear()
                return 0
            if not task.running and not task.queued:
                self.look("asleep")
                self._wake_up()
                continue
            self.shadow.step()
            self._meanwhile()
            left -= 1
            due = left <= 0 or self.shadow.last in ("int3", "emulated")
            if due and isinstance(task.top, GuestCall):
                left = self.random.randint(1, MAX_STRIDE)
                self.interrupt()
        if call.error is not None:
            raise call.error
        assert not self.shadow.slots
        return int(call.result)

    def interrupt(self) -> None:
        """Take the vCPU from the task, where an interrupt could, and look; else at the registers it runs
        with.
        """
        machine, task = self.machine, self.task
        rip = task.cpu.registers()["rip"]
        kind = self.kind_of(rip)
        if machine.sched.preemptible(task):
            activity = machine.hub.call(self._intruder, machine.symbol("area_of"), (3, 4))
            while not activity.finished:
                machine.hub.advance(self._intruder)
            assert task.preempted
        self.look(kind)

    def look(self, kind: str) -> None:
        """Walk the stack and compare."""
        machine, task = self.machine, self.task
        expected = self.shadow.frames
        running = task.running and isinstance(task.top, GuestCall)
        if running:
            trace = machine.unwinder.walk(task.cpu.registers())
        else:
            trace = machine.unwinder.walk_task(task.struct)
        found = list(trace.entries)
        where = f"{kind}: {[machine.kallsyms.describe(each) for each in expected]}"
        if self._unreliable(self.shadow):
            assert trace.unreliable, where
            assert found == expected[: len(found)], where
        else:
            assert (found, trace.unreliable) == (expected, ""), where
        self.counts[kind] += 1
        self._points.record(kind, bool(trace.unreliable))

    def kind_of(self, rip: int) -> str:
        """What sort of code an address lies in."""
        machine = self.machine
        top = self.task.top
        if self.shadow.last == "emulated" or (isinstance(top, GuestCall) and top.breakpoint is not None):
            return "breakpoints"
        if machine.symbol("ftrace_caller") <= rip < machine.symbol("arch_ftrace_ops_list_func"):
            return "trampolines"
        symbol = machine.kallsyms.at(rip)
        assert symbol is not None
        if symbol.module:
            return "trampolines" if symbol.module == "__builtin__ftrace" else self._modules
        if symbol.name in NOT_FIXTURES:
            return NOT_FIXTURES[symbol.name]
        entry = machine.vmlinux.entry
        if entry.start <= rip < entry.start + entry.size:
            return "exports"
        return "callbacks" if self.shadow.exports else "fixtures"

    def _wake_up(self) -> None:
        timers = self.machine.timers
        if timers.next_expiry is not None:
            timers.advance_to(timers.next_expiry)
        else:
            self._wake()
        assert self.task.queued
