"""The hub: the one place that enters the guest, and that decides who goes on.

A service never runs guest code itself and never waits itself.  At a door (a load or a store of shared memory,
a sync, a call up into guest code) it switches here, and the hub picks what runs next: the same service,
another task's, or a vCPU for some instructions.  So every interleaving can be produced, and nothing nests on
the host's stack.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import greenlet

from elf.errors import KlpemuError
from emu.cpu import Stop, StopKind
from emu.schedules import RunToCompletion, Schedule
from emu.task import Activity, GuestCall, Program, Service, Task
from emu.timer import HZ

if TYPE_CHECKING:
    from emu.sched import Scheduler
    from emu.timer import Timers

__all__ = ["Hub", "RunToCompletion", "Schedule", "Traps"]

# A guest entry that takes longer than this does not end: at 100 million instructions a second that is half a
# second.
INSTRUCTION_BUDGET = 50_000_000
# What leaving the guest is counted as: how many instructions were executed until then is not known, and a
# guest that calls an export for ever has to end, too.
EXIT_COST = 1_000
# What has not come to an end after so many virtual jiffies never will.
PATIENCE = 3600 * HZ


Begun = TypeVar("Begun", bound=Activity)


@dataclass(slots=True)
class _Round:
    """What one call of `run` goes by; `taken` is what a service has learned at its door that ends its turn:
    who goes on, and for how many instructions, or what was raised when that was to be decided.
    """

    until: Callable[[], bool]
    finishing: Task
    deadline: int | None
    taken: tuple[Task, int | None] | BaseException | None = None


class Traps(Protocol):
    """What the hub asks when guest code leaves the guest; the machine answers."""

    def export_at(self, rip: int) -> Callable[[Task], Any] | None:
        """The service of the exit stub whose `hlt` ends at `rip`."""
        ...

    def is_return(self, rip: int) -> bool:
        """`rip` is behind the `hlt` that a call from outside returns to."""
        ...

    def trapped(self, task: Task, address: int) -> None:
        """The task's vCPU has executed the int3 at `address`, and is in the exception now."""
        ...

    def breakpoint(self, task: Task, address: int) -> bool:
        """Ask the list of breakpoint handlers about the int3 at `address`; False if nobody claims it."""
        ...

    def undefined(self, task: Task, address: int) -> bool:
        """A `ud2` at `address`: True if it was a WARN and the guest goes on behind it."""
        ...

    def fault(self, task: Task, call: GuestCall, stop: Stop) -> KlpemuError:
        """The error that ends the call: an exception nobody handles, or a spent budget."""
        ...

    def enter(self, task: Task, call: GuestCall) -> None:
        """Build the stack frame of a call below what the task is doing, and set the registers."""
        ...

    def exit_to_user_mode(self, task: Task) -> None:
        """A user task is about to return to user space (called in a service)."""
        ...

    def exited(self, task: Task) -> None:
        """A task is dead, and its vCPU has gone on to another one."""
        ...

    def abandoned(self, task: Task) -> None:
        """A task was torn out of guest code that will never clean up behind itself."""
        ...

    def entering(self, task: Task, instructions: int) -> None:
        """At most so many instructions are about to run (the flight recorder takes its checkpoint here)."""
        ...


class Hub:
    """Runs the tasks' activities, one step at a time."""

    sched: "Scheduler"
    timers: "Timers"

    def __init__(self, traps: Traps) -> None:
        self.tasks: list[Task] = []
        self.schedule: Schedule = RunToCompletion()
        self.instruction_budget = INSTRUCTION_BUDGET
        # The error when nobody can go on; the rooms above may say more, while the tasks still stand there.
        self.stuck: Callable[[str], KlpemuError] = KlpemuError
        self._traps = traps
        self._greenlet = greenlet.getcurrent()
        self._running: Service | None = None
        self._current: Task | None = None
        self._failures: deque[BaseException] = deque()
        self._round: _Round | None = None

    @property
    def current(self) -> Task:
        """The task on whose behalf the running service runs."""
        if self._current is None:
            raise KlpemuError("kernel services run on behalf of a task", advice="start them through the hub")
        return self._current

    @property
    def in_service(self) -> bool:
        """A service is running right now, so there is a task on whose behalf."""
        return self._running is not None

    def call(self, task: Task, entry: int, arguments: Sequence[int] = (), **registers: int) -> GuestCall:
        """Let `task` call guest code next; `registers` are set beside the arguments."""
        call = GuestCall(entry=entry, arguments=tuple(arguments), registers=registers)
        call.budget = self.instruction_budget
        return self._begin(task, call)

    def serve(self, task: Task, name: str, body: Callable[[], Any]) -> Service:
        """Let `task` run a service next."""
        return self._begin(task, Service(name=name, body=body))

    def finish(self, task: Task, activity: Activity) -> Any:
        """Run until `activity`, which is the task's, is done; returns its result or raises its error."""
        if self._running is not None:
            task.activities.remove(activity)
            raise KlpemuError("a service waits at its door, it does not drive the hub")
        try:
            limit = self.timers.now + PATIENCE
            self.run(lambda: activity.finished or self.timers.now >= limit, task)
        except BaseException:
            self.abandon(task)
            raise
        if not activity.finished:
            stuck = self.stuck(f"no end in {PATIENCE // HZ} virtual seconds: {self._blocked()}")
            self.abandon(task)
            self._raise_failure()
            raise stuck
        if activity.error is not None:
            raise activity.error
        self._raise_failure()
        return activity.result

    def failed(self, error: BaseException) -> None:
        """Something went wrong that nobody waits for: whoever drives the hub is told.

        What is being finished is brought to its end first: half of an enabled patch helps nobody.
        """
        self._failures.append(error)

    def run(self, until: Callable[[], bool], finishing: Task, deadline: int | None = None) -> None:
        """Let everybody go on until the predicate holds, or until jiffy `deadline` (counted from boot).

        When all vCPUs are idle, time goes on to the next timer.  Raises KlpemuError for a deadlock, and what
        went wrong in a task that nobody waits for.
        """
        self._greenlet = greenlet.getcurrent()
        outer, this = self._round, _Round(until, finishing, deadline)
        # Whoever replaces `advance` sees each step.
        self._round = None if "advance" in self.__dict__ else this
        try:
            while (taken := this.taken) is not None or not until():
                this.taken = None
                if isinstance(taken, BaseException):
                    raise taken
                if not self._go_on(this, taken):
                    return
        finally:
            self._round = outer

    def _go_on(self, this: _Round, taken: tuple[Task, int | None] | None) -> bool:
        """One step of the task that was `taken`, or that the schedule picks; False at the deadline."""
        timers = self.timers
        if taken is None:
            if this.deadline is not None and timers.now >= this.deadline:
                return False
            tasks = self.sched.candidates()
            if not tasks:
                self._let_time_pass(this.deadline)
                return True
            taken = self.schedule.pick(tasks, this.finishing)
        task, instructions = taken
        try:
            self.advance(task, instructions)
        except BaseException:
            self.abandon(task)
            raise
        if self._failures and not this.finishing.activities:
            self._raise_failure()
        return True

    def _let_time_pass(self, deadline: int | None) -> None:
        """All vCPUs are idle."""
        expiry = self.timers.next_expiry
        if expiry is None and deadline is None:
            self._raise_failure()
            raise self.stuck(f"deadlock: {self._blocked()}")
        self.timers.advance_to(min(each for each in (expiry, deadline) if each is not None))

    def advance(self, task: Task, instructions: int | None = None) -> None:
        """One step of one task: a service up to its next door, or guest code for some instructions."""
        if not task.running:
            self.sched.switch_to(task)
        match task.top:
            case GuestCall() as call:
                self._advance_guest(task, call, instructions)
            case Service() as service:
                self._advance_service(task, service)
            case Program() as program:
                self._advance_program(task, program)
        if not task.activities:
            if task.dead:
                self.sched.exit(task)
                self._traps.exited(task)
            else:
                self.sched.rest(task)

    def abandon(self, task: Task) -> None:
        """Drop all that a task was doing, after an error that nothing can go on from."""
        torn = task.in_guest
        self.drop_services(task)
        if torn:
            self._traps.abandoned(task)
        self.sched.abandon(task)

    def drop_services(self, task: Task) -> None:
        """Drop what the task is doing; its services end where they wait."""
        abandoned, task.activities = task.activities, []
        for activity in reversed(abandoned):
            if isinstance(activity, Service) and activity.coroutine:
                # What the service does on its way out (it releases a mutex) is done; what fails there is
                # lost.
                self._current = task
                with suppress(KlpemuError):
                    activity.coroutine.throw(greenlet.GreenletExit)
                self._current = None

    # Doors, called from inside a service.

    def door(self, kind: str, address: int = 0) -> None:
        """Somebody else may go on here, if the schedule wants that; outside of services this does nothing."""
        if self._running is not None and self.schedule.interleaves and not self._keeps_its_turn():
            self._greenlet.switch()

    def _keeps_its_turn(self) -> bool:
        """Decide at a door what the hub would decide behind it; if the same service goes on, there is no need
        to switch there and back.
        """
        this, service, task = self._round, self._running, self._current
        if this is None or self._failures:
            return False
        self._running = self._current = None  # nobody runs while that is decided
        try:
            if this.until() or (this.deadline is not None and self.timers.now >= this.deadline):
                return False
            tasks = self.sched.candidates()
            if not tasks:
                return False
            taken = self.schedule.pick(tasks, this.finishing)
        except BaseException as error:
            this.taken = error
            return False
        if taken[0] is task and task.running:
            self._running, self._current = service, task
            return True
        this.taken = taken
        return False

    def wait(self, holds: Callable[[], bool], what: str, *, spins: bool = False) -> None:
        """Wait until a predicate holds, asleep or spinning on the vCPU; outside of services this does
        nothing.
        """
        service = self._running
        if service is None or (not self.schedule.interleaves and holds()):
            return
        task = self.current
        service.waiting, service.waiting_for, service.spins = holds, what, spins
        while True:
            if not spins:
                self.sched.sleep_until(task, what)
            self._greenlet.switch()
            if holds():
                break
        service.waiting, service.spins = None, False

    def leave(self, kind: str) -> None:
        """The current task has given its vCPU up; this returns when it has it again."""
        self._greenlet.switch()

    def call_guest(self, entry: int, *arguments: int) -> int:
        """Call guest code on the current task's own stack; returns RAX."""
        if self._running is None:
            raise KlpemuError("only a service can call up into guest code")
        task = self.current
        self.call(task, entry, arguments)
        return int(self._greenlet.switch())

    # Steps.

    def _begin(self, task: Task, activity: Begun) -> Begun:
        task.activities.append(activity)
        if not task.running:
            self.sched.enqueue(task)
        return activity

    def _advance_program(self, task: Task, program: Program) -> None:
        if task.dead:
            self._done(task, program, program.result, None)
        elif program.in_kernel and not task.kthread:
            program.in_kernel = False
            self.serve(task, "exit_to_user_mode", lambda: self._traps.exit_to_user_mode(task))
        elif program.next_call(task):
            program.in_kernel = True
            self.timers.spend(EXIT_COST)  # a kernel thread's calls may all return without leaving the guest
        else:
            self._done(task, program, program.result, None)

    def _advance_service(self, task: Task, service: Service) -> None:
        if service.coroutine is None:
            body = service.body
            assert body is not None
            service.coroutine = greenlet.greenlet(body, parent=self._greenlet)
            self.timers.spend(EXIT_COST)
        self._running, self._current = service, task
        try:
            if service.inbox_error is not None:
                error, service.inbox_error = service.inbox_error, None
                answer = service.coroutine.throw(error)
            else:
                answer = service.coroutine.switch(*(() if service.inbox is None else (service.inbox,)))
            service.inbox = None
        except KlpemuError as error:
            self._done(task, service, None, error)
            return
        except BaseException:
            # The coroutine is dead, and nothing below it will get an answer.
            self._running = self._current = None
            self.abandon(task)
            raise
        finally:
            self._running = self._current = None
        if service.coroutine.dead:
            self._done(task, service, answer, None)

    def _advance_guest(self, task: Task, call: GuestCall, instructions: int | None) -> None:
        if call.breakpoint is not None:
            address, call.breakpoint = call.breakpoint, None
            if not self._traps.breakpoint(task, address):
                stop = Stop(StopKind.BREAKPOINT, address, 3)
                self._done(task, call, None, self._traps.fault(task, call, stop))
            return
        if not call.started:
            call.started = True
            self._traps.enter(task, call)
        share = max(1, call.budget if instructions is None else min(instructions, call.budget))
        self._traps.entering(task, share)
        stop = task.cpu.run(share)
        call.budget -= share
        if stop.kind is StopKind.BUDGET:
            if self._traps.is_return(stop.rip):
                result = task.cpu.registers()["rax"]
                self._done(task, call, result, None)
                return
            export = self._traps.export_at(stop.rip)
            if export is not None:
                call.budget += share - EXIT_COST
                self.serve(task, "export", lambda: export(task))
                return
            self.timers.spend(share)
            if call.budget > 0:
                return
        elif stop.kind is StopKind.BREAKPOINT:
            call.breakpoint = stop.rip - 1
            self._traps.trapped(task, call.breakpoint)
            call.budget += share - EXIT_COST
            return
        elif stop.kind is StopKind.UNDEFINED and self._traps.undefined(task, stop.rip):
            call.budget += share - EXIT_COST
            return
        self._done(task, call, None, self._traps.fault(task, call, stop))

    def _done(self, task: Task, activity: Activity, result: Any, error: BaseException | None) -> None:
        """Pop a finished activity and hand its result, or its error, to the one below."""
        activity.finished, activity.result, activity.error = True, result, error
        task.activities.pop()
        below = task.top
        if isinstance(activity, GuestCall) and activity.saved is not None:
            task.cpu.set_registers(activity.saved)
        if isinstance(below, Service):
            below.inbox, below.inbox_error = result, error
        elif isinstance(below, Program):
            if isinstance(activity, GuestCall):
                below.result = result
            if error is not None:
                self._done(task, below, None, error)
        elif isinstance(below, GuestCall):
            if error is not None:
                self._done(task, below, None, error)
            elif isinstance(activity, Service):
                task.cpu.set_registers({"rax": result or 0})
        elif error is not None:
            self.sched.forget_preempt_count(task)
            if isinstance(activity, Program):
                self.failed(error)

    def _raise_failure(self) -> None:
        if self._failures:
            raise self._failures.popleft()

    def _blocked(self) -> str:
        waiting = [
            f"{task.name} waits for {top.waiting_for}"
            for task in self.tasks
            if isinstance(top := task.top, Service) and (top.spins or not task.running)
        ]
        return ", ".join(waiting) or "no task has anything to do"
