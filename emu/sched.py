"""Which task runs on which vCPU: run queues, switching, sleeping, waking up (kernel/sched/core.c).

Who goes on is not decided here: `candidates` says who could, a schedule picks.  A task stays on its vCPU.  It
is taken off only where it gives the vCPU up, unless `full_preemption` is on (preempt=full): then between any
two instructions of guest code, if neither __preempt_count nor an exception forbids it.  Kernel services are
not taken off between their doors.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from elf.errors import KlpemuError
from emu.cpu import VCpu
from emu.events import EventKind
from emu.memory import read_u32, read_u64
from emu.switch_to import StackFrames
from emu.task import Context, GuestCall, Service, Task
from emu.thread_info import (
    TASK_INTERRUPTIBLE,
    TASK_NORMAL,
    TASK_RUNNING,
    TASK_UNINTERRUPTIBLE,
    TIF_NOTIFY_SIGNAL,
    TIF_PATCH_PENDING,
    TIF_SIGPENDING,
)

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["RunQueue", "Scheduler"]

PREEMPT_ENABLED = 0x8000_0000
SIGNALS = TIF_SIGPENDING | TIF_NOTIFY_SIGNAL


class RunQueue:
    """One vCPU's tasks: `curr` has its registers, `queue` are those that would run, in order of arrival.

    `need_resched`: somebody waits for work that he has queued on this vCPU (schedule_on_each_cpu()); its
    kworker, which is not modelled, runs as soon as `curr` goes through schedule().
    """

    def __init__(self, cpu: VCpu, idle: Task) -> None:
        self.cpu = cpu
        self.idle = idle
        self.curr = idle
        self.queue: deque[Task] = deque()
        self.nr_switches = 0
        self.online = True
        self.need_resched = False

    @property
    def is_idle(self) -> bool:
        """Nothing runs here (idle_cpu()): the idle task is current, or becomes it before anything else."""
        return not self.curr.running or (self.curr is self.idle and not self.idle.activities)


class Scheduler:
    """The run queues of one machine."""

    def __init__(self, machine: "Machine", idle_tasks: Iterable[Task]) -> None:
        self._machine = machine
        self.runqueues = [RunQueue(task.cpu, task) for task in idle_tasks]
        self.frames: StackFrames = machine.frames
        self.full_preemption = False
        # The workqueue's part when a task goes to sleep.
        self.wq_worker_sleeping: Callable[[Task], None] = lambda task: None
        self._sleepers: list[Task] = []  # those that wait for a predicate
        self._locked: list[Task] = []
        symbols, offsetof = machine.vmlinux.symbols, machine.layouts.offsetof
        self._preempt_count = symbols["__preempt_count"]
        self._current_task = symbols["current_task"]
        self._top_of_stack = symbols["cpu_current_top_of_stack"]
        self._canary = symbols["fixed_percpu_data"] + offsetof("fixed_percpu_data", "stack_canary")
        names = ("__state", "on_cpu", "on_rq", "nvcsw", "nivcsw", "stack_canary", "thread_info.flags")
        self._at = {name: offsetof("task_struct", name) for name in names}
        for rq in self.runqueues:
            self.set_current(rq, rq.idle)

    # Looking.

    def rq_of(self, task: Task) -> RunQueue:
        """The run queue of a task's vCPU."""
        return self.runqueues[task.cpu.number]

    def task_of(self, task_struct: int) -> Task:
        """The task whose task_struct a pointer in guest memory points to; raises KlpemuError if none does."""
        task = self._machine.by_struct.get(task_struct)
        if task is None:
            raise KlpemuError("a pointer to no task_struct", where=f"{task_struct:#018x}")
        return task

    def task_curr(self, task: Task) -> bool:
        """The task is being executed by its vCPU."""
        rq = self.rq_of(task)
        return not rq.curr.running or rq.curr is task if task is rq.idle else rq.curr is task and task.running

    def candidates(self) -> list[Task]:
        """The tasks of which each could go on now, in order of their vCPUs; one without any goes idle."""
        if self._sleepers:
            self._wake_sleepers()
        found: list[Task] = []
        for rq in self.runqueues:
            curr = rq.curr
            if not curr.running:
                if not rq.queue and curr is not rq.idle:
                    self._context_switch(rq, rq.idle)
                if rq.idle.activities:
                    found.append(rq.idle)
                elif rq.queue:
                    found += rq.queue
                continue
            activities = curr.activities
            top = activities[-1] if activities else None
            if isinstance(top, Service):
                if not top.spins or curr.runnable:
                    found.append(curr)
                continue
            found.append(curr)
            if rq.queue and self.preemptible(curr):
                found += rq.queue
        if self._locked:
            # One that runs goes on: it may be the one that holds the lock, about to switch itself.
            found = [each for each in found if each.running or each not in self._locked]
        return found

    @contextmanager
    def task_rq_locked(self, task: Task) -> Iterator[None]:
        """Hold the locks that a context switch takes (task_call_func()): the task does not start to run."""
        self._locked.append(task)
        try:
            yield
        finally:
            self._locked.remove(task)

    def preemptible(self, task: Task) -> bool:
        """An interrupt at this moment could take the vCPU from the task that runs on it."""
        top = task.top
        if not self.full_preemption or not isinstance(top, GuestCall) or not top.started:
            return False
        if top.breakpoint is not None:
            return False
        count = read_u32(self._machine.space, task.cpu.gs_base + self._preempt_count)
        return count & ~PREEMPT_ENABLED == 0

    # Waking.

    def enqueue(self, task: Task) -> None:
        """The task has something to do: it runs when it is picked."""
        if not task.running and not task.queued:
            self._store(task, "__state", TASK_RUNNING)
            self._put_in_queue(task)

    def try_to_wake_up(self, task: Task, state: int = TASK_NORMAL) -> bool:
        """Make a task run if it sleeps in one of the states; False if it does not."""
        if not self._state(task) & state:
            return False
        if task.running or task.queued:  # it has set its state and is on its way to schedule()
            self._store(task, "__state", TASK_RUNNING)
        else:
            self.enqueue(task)
        return True

    def wake_up_if_idle(self, rq: RunQueue) -> None:
        """Make an idle vCPU go through its idle loop once."""
        if rq.is_idle and rq.idle.top is None:
            self._machine.hub.serve(rq.idle, "do_idle", lambda: self._do_idle(rq.idle))

    # Giving the vCPU up; called inside of services.

    def schedule(self, what: str = "schedule") -> None:
        """schedule(): the current task stays in the queue if its state is TASK_RUNNING, and sleeps if not.

        Nor does it sleep in TASK_INTERRUPTIBLE while there is a signal (signal_pending_state()).
        """
        task = self._machine.hub.current
        if self._state(task) & TASK_INTERRUPTIBLE and self._flags(task) & SIGNALS:
            self._store(task, "__state", TASK_RUNNING)
        if self._state(task) == TASK_RUNNING:
            self.preempt_schedule(what)
            return
        self._off(task, what)
        self._store(task, "on_rq", 0)
        self.wq_worker_sleeping(task)
        self._machine.hub.leave("schedule")

    def preempt_schedule(self, what: str) -> None:
        """preempt_schedule_common(): the current task stays in the queue, whatever state it has set."""
        task = self._machine.hub.current
        self._off(task, what)
        self._put_in_queue(task)
        self._machine.hub.leave("schedule")

    def sleep_until(self, task: Task, what: str) -> None:
        """The task sleeps in a service until the predicate that this waits for holds."""
        self._off(task, what)
        self._store(task, "__state", TASK_UNINTERRUPTIBLE)
        self._store(task, "on_rq", 0)
        self._sleepers.append(task)
        self.wq_worker_sleeping(task)

    def rest(self, task: Task) -> None:
        """The task has nothing more to do until somebody asks it to."""
        if task.running:
            task.running = False
            task.context = None
            if not task.idle:
                self._store(task, "__state", TASK_INTERRUPTIBLE)
                self._store(task, "on_rq", 0)
            self.frames.rest(task)

    # Switching.

    def switch_to(self, task: Task) -> None:
        """Let the task run on its vCPU, whoever ran there before."""
        rq = self.rq_of(task)
        if task.queued:
            rq.queue.remove(task)
            task.queued = False
        if self._sleepers and task in self._sleepers:
            self._sleepers.remove(task)
            self._store(task, "__state", TASK_RUNNING)
        if rq.curr is not task:
            self._context_switch(rq, task)
        task.running = True

    def abandon(self, task: Task) -> None:
        """All that the task was doing is dropped: it is on no queue and waits for nothing."""
        rq = self.rq_of(task)
        if task.queued:
            rq.queue.remove(task)
        if task in self._sleepers:
            self._sleepers.remove(task)
        task.running, task.queued, task.preempted, task.context = True, False, False, None
        self.rest(task)
        self.forget_preempt_count(task)

    def forget_preempt_count(self, task: Task) -> None:
        """Whoever has raised the vCPU's __preempt_count will not lower it any more (make_task_dead())."""
        if self.rq_of(task).curr is task:
            at = task.cpu.gs_base + self._preempt_count
            self._machine.space.write(at, PREEMPT_ENABLED.to_bytes(4, "little"))

    def exit(self, task: Task) -> None:
        """The last that a task does: its vCPU goes on without it."""
        self.abandon(task)
        rq = self.rq_of(task)
        if rq.curr is task:
            self._context_switch(rq, rq.idle)

    def _context_switch(self, rq: RunQueue, task: Task) -> None:
        prev = rq.curr
        prev.preempted = prev.running
        if prev.preempted:
            registers = prev.cpu.registers()
            self.frames.interrupt(prev, registers)
            prev.context = Context(registers, prev.cpu.vectors())
            prev.running = False
            self._put_in_queue(prev)  # in whatever state: it may be on its way to schedule()
        elif prev.in_guest:
            prev.context = Context(prev.cpu.registers(), prev.cpu.vectors())
        self._count(prev, "nivcsw" if prev.preempted else "nvcsw")
        self._store(prev, "on_cpu", 0)
        self._store(task, "on_cpu", 1)
        self.set_current(rq, task)
        if task.context is not None:
            task.cpu.set_registers(self.frames.resumed(task))
            task.cpu.set_vectors(task.context.vectors)
            task.context, task.preempted = None, False
        rq.curr = task
        rq.need_resched = False
        rq.nr_switches += 1
        self._machine.events.record(EventKind.SWITCH, task.struct, note=f"{prev.name} -> {task.name}")
        if task is rq.idle and self._flags(task) & TIF_PATCH_PENDING:
            self.wake_up_if_idle(rq)

    def set_current(self, rq: RunQueue, task: Task) -> None:
        """What a vCPU's own variables say about the task that it executes."""
        space, base = self._machine.space, rq.cpu.gs_base
        space.write(base + self._current_task, task.struct.to_bytes(8, "little"))
        space.write(base + self._top_of_stack, task.stack_top.to_bytes(8, "little"))
        space.write(base + self._canary, space.read(task.struct + self._at["stack_canary"], 8))

    def _put_in_queue(self, task: Task) -> None:
        task.queued = not task.idle
        self._store(task, "on_rq", 1)
        if task.queued:
            self.rq_of(task).queue.append(task)

    def _off(self, task: Task, what: str) -> None:
        service, rq = task.top, self.rq_of(task)
        assert isinstance(service, Service)
        service.waiting_for = what
        self.frames.sleep(task)
        task.running = False
        if rq.need_resched:
            rq.need_resched = False
            rq.nr_switches += 1

    def _wake_sleepers(self) -> None:
        for task in [each for each in self._sleepers if each.runnable]:
            self._sleepers.remove(task)
            self.enqueue(task)

    def _do_idle(self, idle: Task) -> None:
        """The end of a round of do_idle() (kernel/sched/idle.c)."""
        if self._flags(idle) & TIF_PATCH_PENDING:
            self._machine.klp_update_patch_state(idle.struct)
        self._machine.events.record(EventKind.SWITCH_POINT, idle.struct, note="idle loop")

    # Members of task_struct.

    def _state(self, task: Task) -> int:
        return read_u32(self._machine.space, task.struct + self._at["__state"])

    def _flags(self, task: Task) -> int:
        return read_u64(self._machine.space, task.struct + self._at["thread_info.flags"])

    def _store(self, task: Task, member: str, value: int) -> None:
        self._machine.space.write(task.struct + self._at[member], value.to_bytes(4, "little"))

    def _count(self, task: Task, member: str) -> None:
        at = task.struct + self._at[member]
        self._machine.space.write(at, (read_u64(self._machine.space, at) + 1).to_bytes(8, "little"))
