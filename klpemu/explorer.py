"""All schedules with a bounded number of preemptions, one process for each way to go on.

The explorer is a schedule: it lets a task go on until that waits or is done, and forks where another one
could go on.  The child takes the other way and runs to the end of the scenario; then the parent goes on with
what the child has found.  So nothing is ever executed twice.

A preemption is a switch from a task that could have gone on.  Who follows one that waits, or is done, is free
to choose: that costs none.

Left out is what comes to the same as something else:

- The alternative of a point, if the same one was explored at an earlier point of the same uninterrupted run
  of a task, and all that the task has done since commutes with everything that the others did in the
  alternative before the task went on.
- What follows a state that was reached before with as many preemptions left (emu/same_state.py).

Virtual time passes with every step.  As long as no jiffy ends on the way, or nobody looks, that does not
matter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NoReturn

from elf.errors import KlpemuError
from emu.footprint import Footprint, Recorder
from emu.happens_before import HappensBefore
from emu.machine import Machine
from emu.same_state import SameState
from emu.task import Activity, GuestCall, Service, Task
from emu.timer import JIFFY_INSTRUCTIONS
from emu.tracked import Tracking
from klpemu.explored_states import Counters, ExploredStates
from klpemu.forked import Forked

__all__ = ["COUNTED", "Bounds", "Explorer", "Failure", "Outcome"]

# What is counted: runs to the end, those that ended in a known state, alternatives left out, picks; how far
# the first run has come; 1 to stop.
COUNTED: Final = ("runs", "merged", "left_out", "picks", "position", "stop")
# A task that does not end must not keep the others away: so many picks, and it is the next one's turn.
PATIENCE: Final = JIFFY_INSTRUCTIONS
# A task that is alone looks so often, in turns of its own, whether another run has been here.
LOOKS_EVERY: Final = 8
# Guest code in which each instruction is a point, beside trampolines and entries of functions with a site.
REDIRECTING: Final = ("klp_ftrace_handler", "arch_ftrace_ops_list_func")


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where an exploration ends: preemptions in a schedule, picks in a run, runs of any kind (None: all)."""

    preemptions: int = 2
    picks: int = 500_000
    runs: int | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A schedule after which something does not hold: what, in which of the steps (from 0), and who went on
    (task name, instructions).
    """

    findings: tuple[str, ...]
    step: int
    schedule: tuple[tuple[str, int], ...]
    preemptions: int


@dataclass
class Outcome:
    """What one process has to say at its end.

    `counts` is how many schedules go on from where it began, with at most 0, 1, ... preemptions; `intervals`
    are those that were open then, in order.
    """

    counts: list[float]
    intervals: list["Interval"] = field(default_factory=list)
    failure: Failure | None = None
    final_states: frozenset[Any] = frozenset()


@dataclass
class Interval:
    """What the others do from a point at which a task could have gone on until it does.

    `spent` is how many instructions that takes at most, `counts` how many schedules begin with it.  It has
    `began` when so many had been executed, and somebody has `looked_at_time` since.
    """

    footprint: Footprint
    spent: int = 0
    is_open: bool = True
    counts: list[float] = field(default_factory=list)
    began: int = 0
    looked_at_time: bool = False


@dataclass
class _Branch:
    """A point of the way: its state, and how many schedules its alternatives have."""

    state: int
    preempting: list[float]
    free: list[float]


class Explorer:
    """The schedule, in each of the processes.

    `roots` are what services share, beside the machine, and `judged` gives what the host goes by beyond that.
    With `reduce` False nothing is left out.
    `final_state` says what a run has come to; what it has returned comes with the outcome.
    """

    interleaves = True

    def __init__(
        self,
        machine: Machine,
        roots: Sequence[object],
        bounds: Bounds,
        *,
        reduce: bool = True,
        judged: Callable[[], Any] = lambda: None,
        final_state: Callable[[], Any] | None = None,
    ) -> None:
        self.bounds = bounds
        self.counters = Counters(*COUNTED)
        self.states = ExploredStates(bounds.preemptions)
        self._machine = machine
        self._reduce = reduce
        self._final_state = final_state
        self._final_states: set[Any] = set()
        self._forked: Forked | None = None
        self._left = 0
        self._used = 0
        self._is_first = False
        self._step_number = 0
        self._schedule: list[tuple[str, int]] = []
        self._branches: list[_Branch] = []
        self._intervals: list[tuple[Task, Interval]] = []
        self._inherited = 0
        self._asleep: dict[Task, Interval] = {}
        self._candidates: list[Task] = []
        self._last: Task | None = None
        self._turns: dict[Task, int] = {}
        self._in_a_row = 0
        self._order = HappensBefore()
        self._step: Footprint | None = None
        self._clock = machine.timers.executed
        self._same: SameState | None = None
        self._service: Service | None = None
        self._host = 0  # where the host stands that drives the hub, and what it has seen
        if reduce:
            self._record(roots, judged)

    def _record(self, roots: Sequence[object], judged: Callable[[], Any]) -> None:
        """Record what each step touches, and what is looked at to see who can go on behind it."""
        machine = self._machine
        recorder = Recorder(machine)
        tracking = Tracking(recorder)
        for root in (machine, *roots):
            tracking.track(root)
        self._same = same = SameState(machine, recorder, tracking, judged)
        advance, candidates = machine.hub.advance, machine.sched.candidates
        run, finish = machine.hub.run, machine.hub.finish

        def recorded_advance(task: Task, instructions: int | None = None) -> None:
            top = task.top
            self._service = top if isinstance(top, Service) else None
            self._step = Footprint()
            self._step.seen = same.seen(self._service)
            with recorder.into(self._step):
                advance(task, instructions)

        def known_run(until: Callable[[], bool], finishing: Task, deadline: int | None = None) -> None:
            self._host = hash((self._host, "run", deadline, machine.timers.now))
            run(until, finishing, deadline)

        def known_finish(task: Task, activity: Activity) -> Any:
            try:
                result = finish(task, activity)
            except KlpemuError as error:
                self._host = hash((self._host, str(error)))
                raise
            self._host = hash((self._host, repr(result)))
            return result

        def recorded_candidates() -> list[Task]:
            step = self._step
            if step is None or not self._is_awaited():
                return candidates()
            with recorder.into(step):
                return candidates()

        machine.hub.__dict__["advance"] = recorded_advance
        machine.hub.__dict__["run"] = known_run
        machine.hub.__dict__["finish"] = known_finish
        machine.sched.__dict__["candidates"] = recorded_candidates

    def _is_awaited(self) -> bool:
        """Looking who can go on matters: somebody waits for something to hold, or a vCPU goes idle."""
        for rq in self._machine.sched.runqueues:
            if not rq.curr.running and rq.curr is not rq.idle and not rq.queue:
                return True
        for task in self._machine.tasks:
            if task.activities and isinstance(top := task.activities[-1], Service) and top.waiting:
                return True
        return False

    # The run.

    def begin(self, forked: Forked, preemptions: int) -> None:
        """This process makes the first run, with so many preemptions to be tried."""
        self._forked, self._left, self._is_first = forked, preemptions, True
        if self._same is not None:  # never in the process that was asked: this stays
            self._same.returned_calls.install()

    def begin_step(self, number: int) -> None:
        """A step of the scenario begins: what was before is judged, and that looks at everything."""
        self._finish_pick()
        self._step_number = number
        machine = self._machine
        self._host = hash((number, len(machine.log.lines), len(machine.warnings), machine.timers.now))
        self._order.barrier(("step", number))
        self._touch_everything()

    def complete(self) -> NoReturn:
        """The scenario is over, and all holds."""
        self._finish_pick()
        self.counters["runs"] += 1
        if self._final_state is not None:
            self._final_states.add(self._final_state())
        self._end([1.0] * (self._left + 1))

    def fail(self, findings: Sequence[str]) -> NoReturn:
        """Something does not hold."""
        self._finish_pick()
        self.counters["runs"] += 1
        failure = Failure(tuple(findings), self._step_number, merged(self._schedule), self._used)
        self._reply(Outcome([], failure=failure))

    # The schedule.

    def pick(self, tasks: Sequence[Task], finishing: Task) -> tuple[Task, int | None]:
        """Who goes on.  Returns once in each process that begins here."""
        self._finish_pick()
        self._check_bounds()
        last = self._last
        goes_on = last is not None and last in tasks
        if goes_on and self._in_a_row >= PATIENCE and len(tasks) > 1:
            at = [*tasks].index(last) + 1  # type: ignore[arg-type]  # it goes on, so it is a task
            return self._take(tasks[at % len(tasks)], tasks)
        default = last if goes_on and last is not None else finishing if finishing in tasks else tasks[0]
        if [*tasks] != self._candidates:
            self._candidates = [*tasks]
            self._asleep.clear()
        if len(tasks) > 1 and (not goes_on or self._is_point(default)):
            return self._take(self._branch(tasks, default, goes_on), tasks)
        # Where a run looks must not depend on the way that it has come.
        if len(tasks) == 1 and not self._turns.get(default, 0) % LOOKS_EVERY:
            self._branches.append(self._here())
        return self._take(default, tasks)

    def _take(self, task: Task, tasks: Sequence[Task]) -> tuple[Task, int | None]:
        if task is not self._last:
            self._asleep.clear()
            self._in_a_row = 0
        self._in_a_row += 1
        self._turns[task] = self._turns.get(task, 0) + 1
        self._last = task
        number = [each for each in tasks if each.name == task.name].index(task) + 1
        name = task.name if number == 1 else f"{task.name}#{number}"
        # Until it is known how far it went: a service to its next door, or guest code that left the guest.
        self._schedule.append((name, JIFFY_INSTRUCTIONS if _is_at_door(task) else 1))
        self._clock = self._machine.timers.executed
        self.counters["picks"] += 1
        if self._is_first:
            self.counters["position"] = len(self._schedule)
        return task, 1

    def _is_point(self, task: Task) -> bool:
        """Another task can be let on here: at a door, between two calls, and where calls are redirected."""
        top = task.top
        if not isinstance(top, GuestCall) or not top.started or top.breakpoint is not None:
            return True
        rip = task.cpu.registers()["rip"]
        symbol = self._machine.kallsyms.at(rip)
        if symbol is None or symbol.module == "__builtin__ftrace" or symbol.name in REDIRECTING:
            return True
        if symbol.name.startswith("ftrace_"):
            return True
        site = self._machine.ftrace.ftrace_location(symbol.address)
        return bool(site) and symbol.address <= rip <= site

    def _here(self) -> _Branch:
        """The state, without number if nobody looks; this does not return if it was explored before."""
        # While a task is preempted it is not known yet what the others will have touched until it goes on.
        if self._same is None or any(each.is_open for _, each in self._intervals):
            return _Branch(0, [0.0] * (self._left + 1), [0.0] * (self._left + 1))
        state = hash((self._same.number(), self._host, _key(self._last))) & (1 << 64) - 1
        known = self.states.find(state, self._left)
        if known is not None:
            self.counters["merged"] += 1
            self._end(known)
        return _Branch(state, [0.0] * (self._left + 1), [0.0] * (self._left + 1))

    def _branch(self, tasks: Sequence[Task], default: Task, goes_on: bool) -> Task:
        """Let others go the other ways; returns which way this process goes."""
        self._branches.append(branch := self._here())
        if goes_on and not self._left:
            return default
        for task in tasks:
            if task is default:
                continue
            asleep = self._asleep.get(task)
            if asleep is not None and self._time_is_no_matter(asleep):
                self.counters["left_out"] += 1
                _add(branch.preempting, asleep.counts)
                continue
            outcome = self._explore(task, goes_on)
            if outcome is None:
                return task
            if goes_on:
                counts = [0.0, *outcome.counts]
                _add(branch.preempting, counts)
                if self._reduce:
                    interval = outcome.intervals[-1]
                    self._asleep[task] = replace(
                        interval, counts=counts, began=self._clock, looked_at_time=interval.footprint.time
                    )
            else:
                _add(branch.free, outcome.counts)
        return default

    def _time_is_no_matter(self, asleep: Interval) -> bool:
        """What the task has done since, and what the others would do, can change places in time."""
        timers = self._machine.timers
        end = timers.executed + asleep.spent
        if timers.next_expiry is not None and timers.next_expiry <= end // JIFFY_INSTRUCTIONS:
            return False
        return not asleep.looked_at_time or asleep.began // JIFFY_INSTRUCTIONS == end // JIFFY_INSTRUCTIONS

    def _explore(self, task: Task, preempting: bool) -> Outcome | None:
        """Let a process of its own go on with the task; None in that process."""
        forked = Forked()
        if not forked.is_child:
            outcome: Outcome = forked.answer()
            if outcome.failure is not None or self.counters["stop"]:
                self._reply(outcome)
            self._final_states |= outcome.final_states
            for (_, mine), its in zip(self._intervals, outcome.intervals, strict=False):
                mine.footprint.add(its.footprint)
                mine.spent = max(mine.spent, its.spent)
            return outcome
        self._forked, self._is_first = forked, False
        self._branches, self._final_states = [], set()
        if preempting:
            assert self._last is not None
            self._left -= 1
            self._used += 1
            if self._reduce:
                self._intervals.append((self._last, Interval(Footprint())))
        self._inherited = len(self._intervals)
        return None

    def _finish_pick(self) -> None:
        """What the last pick has done."""
        task, step = self._last, self._step
        if not self._schedule or task is None:
            return
        self._step = None
        spent = self._machine.timers.executed - self._clock
        name, instructions = self._schedule[-1]
        if instructions == 1 and spent != 1:
            self._schedule[-1] = (name, -1)  # it left the guest
        self._clock += spent
        if step is None:
            return
        number = self._order.step(_key(task), step, self._machine.timers.now)
        assert self._same is not None
        self._same.step(number, step, self._service)
        for preempted, interval in self._intervals:
            if preempted is task:
                interval.is_open = False
            elif interval.is_open:
                interval.footprint.add(step)
                interval.spent += spent
        for other, interval in [*self._asleep.items()]:
            interval.looked_at_time |= step.time
            if not step.commutes_with(interval.footprint):
                del self._asleep[other]

    def _touch_everything(self) -> None:
        for _, interval in self._intervals:
            interval.footprint.everything |= interval.is_open
        self._asleep.clear()

    # The end.

    def _check_bounds(self) -> None:
        counters, bounds = self.counters, self.bounds
        if bounds.runs is not None and counters["runs"] + counters["merged"] >= bounds.runs:
            counters["stop"] = 1
        if counters["stop"]:
            self._reply(Outcome([0.0] * (self._left + 1)))
        if len(self._schedule) >= bounds.picks:
            self.fail([f"the_run_ends: no end within {bounds.picks:,} turns of its tasks"])

    def _end(self, counts: list[float]) -> NoReturn:
        """From here on there are so many schedules, all of which hold."""
        self._touch_everything()
        for branch in reversed(self._branches):
            counts = [a + b + c for a, b, c in zip(counts, branch.preempting, branch.free, strict=True)]
            if branch.state:
                self.states.store(branch.state, counts)
        intervals = [interval for _, interval in self._intervals[: self._inherited]]
        self._reply(Outcome(counts, intervals, final_states=frozenset(self._final_states)))

    def _reply(self, outcome: Outcome) -> NoReturn:
        assert self._forked is not None
        self._forked.reply(outcome)


def _key(task: Task | None) -> tuple[str, int] | None:
    return None if task is None else (task.name, task.struct)


def _is_at_door(task: Task) -> bool:
    top = task.top
    return not isinstance(top, GuestCall) or top.breakpoint is not None


def _add(into: list[float], counts: Sequence[float]) -> None:
    into[:] = [a + b for a, b in zip(into, counts, strict=True)]


def merged(schedule: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """The same schedule with fewer entries: instructions in a row of one task that stayed in the guest."""
    found: list[tuple[str, int]] = []
    in_guest = False
    for name, instructions in schedule:
        if in_guest and instructions == 1 and found[-1][0] == name:
            found[-1] = (name, found[-1][1] + 1)
        else:
            found.append((name, abs(instructions)))
        in_guest = instructions == 1
    return tuple(found)
