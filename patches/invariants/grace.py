"""Grace periods, judged at each free, whether somebody happens to be in the way at that moment or not."""

from typing import Final

from emu.events import Event, EventKind
from emu.ftrace_ops import FtraceOpsFl
from emu.machine import Machine
from emu.memory import read_u64
from patches.invariants.finding import Finding
from patches.invariants.witness import Witness

__all__ = ["GRACE", "GracePeriods"]

GRACE: Final = "ops_are_freed_after_a_grace_period"
OF_TASKS: Final = ("synchronize_rcu_tasks", "synchronize_rcu_tasks_rude")
POINTER: Final = 8


class GracePeriods(Witness):
    """ops_are_freed_after_a_grace_period: Between taking an ops off ftrace_ops_list and freeing it a grace
    period of tasks passes: a task in the list function or in a trampoline may still hold it.

    Source: the comment on synchronize_rcu_tasks() in ftrace_shutdown() of kernel/trace/ftrace.c, 6.1;
    0e792b89e680 ("ftrace: Fix use-after-free for dynamic ftrace_ops").  An ops that ftrace_startup() takes
    off again, as it fails, waits for nothing there.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine, GRACE)
        self._head = machine.symbol("ftrace_ops_list")
        self._next = machine.layouts.offsetof("ftrace_ops", "next")
        self._flags = machine.layouts.offsetof("ftrace_ops", "flags")
        self._on: set[int] = set()
        self._off: dict[int, bool] = {}  # what was taken off: whether a grace period has passed since
        machine.events.listen(self._stored, EventKind.STORE)
        machine.events.listen(self._synchronized, EventKind.SYNC)
        machine.slab.freeing.append(self._freed)

    def _stored(self, event: Event) -> None:
        if len(event.after) != POINTER:
            return
        if event.address != self._head and event.address - self._next not in self._on:
            return
        memory = self._machine.space
        before, after = (int.from_bytes(each, "little") for each in (event.before, event.after))
        if before in self._on and after == read_u64(memory, before + self._next):
            self._on.discard(before)
            if not read_u64(memory, before + self._flags) & FtraceOpsFl.ADDING:
                self._off[before] = False
        elif event.address == self._head:
            self._on.add(after)
            self._off.pop(after, None)

    def _synchronized(self, event: Event) -> None:
        if event.note in OF_TASKS:
            for each in self._off:
                self._off[each] = True

    def _freed(self, start: int, size: int, tag: str) -> None:
        for ops in [each for each in self._off if start <= each < start + size]:
            self._checks += 1
            if not self._off.pop(ops):
                what = f"{tag} is freed with no grace period since its ops was taken off ftrace_ops_list"
                self._findings.append(Finding(GRACE, what, start))
