"""What a task does by itself: a sequence of system calls, or of a kernel thread's steps.

User space is not executed.  A user task's program is what it asks of the kernel: guest functions that it
calls, sleeps, forks, time spent in user space.  After each it returns to user space.  A system call that ends
with one of the restart codes is made again, as after a signal without a handler.
"""

import copy
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

from emu.entry import exit_to_user_mode_loop, exit_work, signal_pending
from emu.fork import copy_process, do_exit
from emu.sleep import schedule_timeout_in, set_current_state
from emu.task import GuestCall, Program, Service, Task
from emu.thread_info import TASK_INTERRUPTIBLE, TASK_RUNNING
from emu.timer import MAX_SCHEDULE_TIMEOUT, msecs_to_jiffies

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["Operation", "TaskProgram", "start"]

# include/linux/errno.h: what a signal makes of a system call that is to be made again.
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND = 512, 513, 514
RESTARTS = {(1 << 64) - number for number in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND)}
RESULTS_KEPT = 64
ENDLESS = 1 << 62  # instructions: a kernel thread may work for as long as the scenario lasts


@dataclass(frozen=True, slots=True)
class Operation:
    """One step of a program.

    `verb` is "call" (a guest function at `entry`), "sleep" and "user" (for `msecs`), "read" (the file at
    `path`), "pause", "yield", "fork" or "exit"; `text` is how the scenario writes it.
    """

    text: str
    verb: str
    entry: int = 0
    arguments: tuple[int, ...] = ()
    msecs: int = 0
    path: str = ""


class TaskProgram:
    """The program of one task; it begins again `repeat` - 1 times (None: for ever), and then the task exits.

    `results` are the last results, with the text of the operation that gave them.
    """

    def __init__(
        self, machine: "Machine", operations: Sequence[Operation], *, repeat: int | None = 1
    ) -> None:
        self.operations = tuple(operations)
        self.repeat = repeat
        self.results: deque[tuple[str, int]] = deque(maxlen=RESULTS_KEPT)
        self.now = ""
        self._machine = machine
        self._position = 0
        self._round = 1
        self._ends: int | None = None  # when a sleep that a signal has interrupted is over
        self._activity = Program(next_call=self._next_call)
        self._calling: Operation | None = None
        self._exited = False

    def _next_call(self, task: Task) -> bool:
        self._take_result(task)
        if self._exited:
            return False
        if self._position == len(self.operations):
            self._position = 0
            if self._round == self.repeat or not self.operations:
                self._exit(task)
                return True
            self._round += 1
        operation = self.operations[self._position]
        self._position += 1
        self._calling, self.now = operation, operation.text
        getattr(self, f"_{operation.verb}")(task, operation)
        return True

    def _take_result(self, task: Task) -> None:
        """What the operation that has just ended came to; a restart code makes it the next one again."""
        done, self._calling = self._calling, None
        if done is None or done.verb not in ("call", "sleep", "pause"):
            return
        result = self._activity.result
        if result in RESTARTS and not task.kthread:
            self._position -= 1
        elif done.verb == "call":
            self.results.append((done.text, result))

    def _serve(self, task: Task, operation: Operation, body: Callable[[], object]) -> None:
        self._machine.hub.serve(task, operation.verb, body)

    def _call(self, task: Task, operation: Operation) -> None:
        call: GuestCall = self._machine.hub.call(task, operation.entry, operation.arguments)
        call.budget = ENDLESS

    def _sleep(self, task: Task, operation: Operation) -> None:
        self._serve(task, operation, partial(self._nanosleep, task, operation))

    def _nanosleep(self, task: Task, operation: Operation) -> None:
        timers = self._machine.timers
        if self._ends is None:
            self._ends = timers.now + msecs_to_jiffies(operation.msecs)
        while timers.now < self._ends:
            if not task.kthread and signal_pending(self._machine, task):
                self._activity.result = (1 << 64) - ERESTARTNOHAND
                return
            set_current_state(self._machine, TASK_INTERRUPTIBLE)
            schedule_timeout_in(self._machine, self._ends - timers.now, "nanosleep")
        self._ends = None
        self._activity.result = 0

    def _pause(self, task: Task, operation: Operation) -> None:
        def body() -> None:
            set_current_state(self._machine, TASK_INTERRUPTIBLE)
            if not signal_pending(self._machine, task):
                schedule_timeout_in(self._machine, MAX_SCHEDULE_TIMEOUT, "pause")
            set_current_state(self._machine, TASK_RUNNING)
            self._activity.result = (1 << 64) - ERESTARTNOHAND

        self._serve(task, operation, body)

    def _user(self, task: Task, operation: Operation) -> None:
        """Compute in user space; an interrupt's way back does the pending work.

        User space is preempted in every preemption model.  Those who compute there at the same time do so in
        turn, which is not modelled: their time passes together.
        """
        machine = self._machine
        queue = machine.sched.rq_of(task).queue

        def others() -> bool:
            return any(not (isinstance(each.top, Service) and each.top.in_user_space) for each in queue)

        def body() -> None:
            over = False
            service = cast(Service, task.top)

            def ring() -> None:
                nonlocal over
                over, service.in_user_space = True, False

            machine.timers.add_timer(msecs_to_jiffies(operation.msecs), ring, "user space")
            while not over:
                service.in_user_space = True
                machine.hub.wait(
                    lambda: over or others() or exit_work(machine, task), "user space", spins=True
                )
                if others():
                    machine.sched.preempt_schedule("user space")
                    continue
                service.in_user_space = False
                exit_to_user_mode_loop(machine, task)

        self._serve(task, operation, body)

    def _read(self, task: Task, operation: Operation) -> None:
        self._serve(task, operation, lambda: self._machine.kernfs.read(operation.path))

    def _yield(self, task: Task, operation: Operation) -> None:
        self._serve(task, operation, lambda: self._machine.sched.schedule("sched_yield"))

    def _fork(self, task: Task, operation: Operation) -> None:
        """The child goes on behind the fork, and does what is left once."""

        def body() -> None:
            child = copy_process(self._machine, task)
            program = copy.copy(self)
            program.results = deque(maxlen=RESULTS_KEPT)
            program.repeat = program._round
            program._calling = None
            program._activity = Program(next_call=program._next_call, in_kernel=True)
            start(self._machine, child, program)

        self._serve(task, operation, body)

    def _exit(self, task: Task, operation: Operation | None = None) -> None:
        self.now, self._exited = "exit", True
        self._machine.hub.serve(task, "do_exit", partial(do_exit, self._machine, task))


def start(machine: "Machine", task: Task, program: TaskProgram) -> None:
    """Let a new task run its program (wake_up_new_task())."""
    task.program = program
    task.activities.append(program._activity)
    machine.sched.enqueue(task)
