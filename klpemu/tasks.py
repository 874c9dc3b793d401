"""The tasks of a kernel: starting them, letting time go by, and saying what each is doing and why."""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from elf.errors import KlpemuError
from emu.fork import new_task
from emu.hub import RunToCompletion
from emu.program import Operation, TaskProgram, start
from emu.schedules import RoundRobin
from emu.task import Service, Task
from emu.thread_info import TIF_PATCH_PENDING
from emu.timer import HZ
from emu.unwind import StackTrace
from klpemu.call_expression import CallExpression, parse_call
from patches.handler import KLP_PATCHED, KLP_UNDEFINED
from patches.stack_check import StackCheck

if TYPE_CHECKING:
    from klpemu.kernel import Kernel

__all__ = ["Deadlock", "Stuck", "TaskState", "Tasks", "TransitionStuck", "parse_operation"]

# Virtual milliseconds in which no task has switched, after which a transition counts as one that never ends:
# signals go out after 15 s.
PATIENCE: Final = 60_000
STACK_SHOWN: Final = 12
_TIMED: Final = re.compile(r"(sleep|user)\s*\(\s*(\d+)\s*\)")
_READ: Final = re.compile(r"read\s*\(\s*(/[^\s()]+)\s*\)")
_PLAIN: Final = re.compile(r"(pause|yield|fork|exit)(\s*\(\s*\))?")
_WORDS: Final = {"sleep": "sleep(MS)", "user": "user(MS)", "read": "read(/PATH)"} | {
    word: word for word in ("pause", "yield", "fork", "exit")
}
_USER_SPACE: Final = ("user", "pause", "fork")


@dataclass(frozen=True, slots=True)
class TaskState:
    """One task as it is now.

    `version` is "patched" or "unpatched" in a transition and "" without one, `doing` what it does or waits
    for, `stack` the functions on its stack, innermost first, and `why` what keeps it from switching.
    """

    name: str
    pid: int
    cpu: int
    kind: str
    state: str
    version: str
    pending: bool
    doing: str
    stack: tuple[str, ...] = ()
    why: str = ""
    returned: tuple[tuple[str, int], ...] = ()


class Stuck(KlpemuError):  # noqa: N818  (said of the tasks, not of an error)
    """Something that cannot end; `tasks` are those in the way, as they stood then."""

    def __init__(self, what: str, tasks: Sequence[TaskState], *, advice: str = "") -> None:
        self.tasks = tuple(tasks)
        super().__init__(what, advice=advice)

    def report(self) -> str:
        """The error in one line, and the stack of each task in the way."""
        lines = [str(self)]
        for task in self.tasks:
            lines.append(f"  {task.name}:{task.pid} on CPU {task.cpu}, {task.state}, {task.doing}")
            lines += [f"    {each}" for each in task.stack]
        return "\n".join(lines)


class Deadlock(Stuck):
    """All tasks are blocked and no timer is armed, or what the host asked for has no end."""


class TransitionStuck(Stuck):
    """A transition that does not end, or not in time; `how` says which."""

    def __init__(self, patch: str, how: str, tasks: Sequence[TaskState]) -> None:
        names = ", ".join(f"{each.name}:{each.pid} {each.why}".rstrip() for each in tasks)
        super().__init__(
            f"the transition of '{patch}' {how}; {names}",
            tasks,
            advice="let these tasks leave those functions, reverse the transition, or force it",
        )


class Tasks:
    """The tasks of one kernel beside the one that does what the host asks for."""

    def __init__(self, kernel: "Kernel") -> None:
        self._kernel = kernel
        self._machine = kernel.machine
        self._machine.hub.stuck = self._deadlock

    def spawn(
        self,
        name: str,
        program: Sequence[str],
        *,
        kthread: bool = False,
        cpu: int | None = None,
        repeat: int | None = 1,
    ) -> Task:
        """Start a task that runs `program`: calls like "area_of(3, 4)", or "sleep(MS)", "user(MS)",
        "read(/PATH)", "pause", "yield", "fork", "exit".

        It runs the program `repeat` times (None: for ever) and exits.  Without `cpu` the vCPUs take turns.
        """
        machine = self._machine
        if cpu is None:
            cpu = machine.last_pid % len(machine.cpus)
        if not 0 <= cpu < len(machine.cpus):
            raise KlpemuError(f"there is no vCPU {cpu}", advice=f"there are {len(machine.cpus)}, from 0")
        operations = [self._operation(text, kthread) for text in program]
        if isinstance(machine.hub.schedule, RunToCompletion):
            machine.hub.schedule = RoundRobin()
        task = new_task(machine, name, machine.cpus[cpu], kthread=kthread)
        start(machine, task, TaskProgram(machine, operations, repeat=repeat))
        return task

    def run(self, msecs: int, until: Callable[[], bool] = lambda: False) -> bool:
        """Let so much virtual time go by, or less if the predicate comes to hold; does it?"""
        return self._machine.run(until, -(-msecs * HZ // 1000))

    def wait_for_transition(
        self, watch: Callable[[], None] = lambda: None, *, within: int | None = None
    ) -> None:
        """Let time go by until no transition is on; `watch` is called after each virtual second.

        Raises `TransitionStuck` when `within` milliseconds are over; without it once no task has switched for
        a minute.
        """
        kernel, timers = self._kernel, self._machine.timers
        left, since, start = self._left(), timers.now, timers.now
        while patch := kernel.in_transition:
            passed = (timers.now - start) * 1000 // HZ
            if within is not None and passed >= within:
                raise TransitionStuck(
                    patch, f"is not over after {within / 1000:g} virtual seconds", self._in_the_way()
                )
            self.run(1000 if within is None else min(1000, within - passed), lambda: not kernel.in_transition)
            watch()
            now = self._left()
            if now != left:
                left, since = now, timers.now
            elif within is None and (timers.now - since) * 1000 // HZ >= PATIENCE:
                seconds = (timers.now - since) / HZ
                how = f"does not end: in {seconds:g} virtual seconds no task switched"
                raise TransitionStuck(patch, how, self._in_the_way())
        self._machine.run(lambda: self._machine.workqueue.is_empty)

    def named(self, name: str) -> list[Task]:
        """All tasks of that name: a task's children have it, too."""
        return [task for task in self._machine.tasks if task.name == name]

    def states(self) -> list[TaskState]:
        """All tasks, the idle ones last."""
        idle = [rq.idle for rq in self._machine.sched.runqueues]
        check = StackCheck(self._kernel.klp) if self._kernel.in_transition else None
        return [self.state_of(task, check) for task in (*self._machine.tasks, *idle)]

    def state_of(self, task: Task, check: StackCheck | None = None) -> TaskState:
        """What one task is doing, and why it has not switched; `check` spares the work of making one."""
        machine = self._machine
        struct = machine.layouts.view("task_struct", machine.space, task.struct)
        version = {KLP_UNDEFINED: "", KLP_PATCHED: "patched"}.get(struct.patch_state, "unpatched")
        pending = bool(struct.thread_info.flags & TIF_PATCH_PENDING)
        trace = self._stack(task)
        stack = tuple(machine.kallsyms.describe(each) for each in trace.entries[:STACK_SHOWN])
        if trace.unreliable:
            stack += (f"({trace.unreliable})",)
        return TaskState(
            name=task.name,
            pid=struct.pid,
            cpu=task.cpu.number,
            kind="idle" if task.idle else "kthread" if task.kthread else "user",
            state=self._running(task),
            version=version,
            pending=pending,
            doing=_doing(task),
            stack=stack,
            why=self._why(task, trace, check) if pending else "",
            returned=tuple(task.program.results) if task.program is not None else (),
        )

    def _running(self, task: Task) -> str:
        if self._machine.sched.task_curr(task):
            return "in user space" if task.quiescent and not task.idle else "running"
        if task.queued:
            return "preempted" if task.preempted else "runnable"
        return "sleeping" if task.activities else "idle"

    def _stack(self, task: Task) -> StackTrace:
        """The stack of a task, from the registers if it runs."""
        machine = self._machine
        if machine.sched.task_curr(task) and task.in_guest:
            return machine.unwinder.walk(task.cpu.registers())
        return machine.unwinder.walk_task(task.struct)

    def _why(self, task: Task, trace: StackTrace, check: StackCheck | None) -> str:
        """What klp_try_switch_task() would find now."""
        if self._machine.sched.task_curr(task):
            return "is running"
        if trace.unreliable:
            return "has an unreliable stack"
        function = (check or StackCheck(self._kernel.klp)).first_on(trace.entries)
        return f"is sleeping on function {function.old_name}" if function is not None else ""

    def _in_the_way(self) -> list[TaskState]:
        return [each for each in self.states() if each.pending]

    def _deadlock(self, what: str) -> Deadlock:
        return Deadlock(what, [self.state_of(task) for task in self._machine.tasks if task.activities])

    def _left(self) -> tuple[str, int]:
        pending: Any = sum(
            bool(
                self._machine.layouts.view("task_struct", self._machine.space, task.struct).thread_info.flags
                & TIF_PATCH_PENDING
            )
            for task in self._machine.by_struct.values()
        )
        return self._kernel.in_transition, int(pending)

    def _operation(self, text: str, kthread: bool) -> Operation:
        operation = parse_operation(text, kthread=kthread)
        if isinstance(operation, Operation):
            return operation
        entry = self._kernel.address_of(operation.function)
        return Operation(text, "call", entry, tuple(operation.values(self._kernel)))


def parse_operation(text: str, *, kthread: bool = False) -> Operation | CallExpression:
    """One step of a program, a call unless it is one of the other words; raises `KlpemuError`."""
    text = text.strip()
    if timed := _TIMED.fullmatch(text):
        if int(timed[2]) >= 1 << 31:
            raise KlpemuError(f"'{text}' is too long", advice="write milliseconds, fewer than 2147483648")
        operation = Operation(text, timed[1], msecs=int(timed[2]))
    elif read := _READ.fullmatch(text):
        operation = Operation(text, "read", path=read[1])
    elif plain := _PLAIN.fullmatch(text):
        operation = Operation(text, plain[1])
    else:
        word, bracket, _ = text.partition("(")
        close = difflib.get_close_matches(word.strip(), _WORDS, 1)
        if word.strip() in _WORDS or (close and not bracket):
            raise KlpemuError(
                f"'{text}' is nothing that a task can do", advice=f"did you mean {_WORDS[close[0]]}?"
            )
        return parse_call(text)
    if kthread and operation.verb in _USER_SPACE:
        raise KlpemuError(
            f"a kernel thread cannot {operation.text!r}", advice="it has no user space; sleep, or call"
        )
    return operation


def _doing(task: Task) -> str:
    top = task.top
    program = task.program.now if task.program is not None else ""
    if isinstance(top, Service) and top.waiting_for and not task.running and not task.queued:
        return f"{program}: {top.waiting_for}" if program else top.waiting_for
    return program or (top.name if isinstance(top, Service) else "")
