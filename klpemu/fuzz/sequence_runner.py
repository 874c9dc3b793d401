"""Performing sequences one after the other on one booted kernel, each from the same restore point.

What a step does is what `klpemu.step_runner` does; what is shown of it there is left out here.  An errno is
an answer, not a failure, and stands in the step that was performed as what it expects: so performing the
steps of a run with `klpemu run` gives the same once more.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from elf.errors import KlpemuError, SymbolError
from emu.errno import KernelErrno
from emu.ftrace_rec import FtraceBug
from emu.restore_point import RestorePoint, Suspended
from emu.schedules import Directed
from emu.traps import GuestFault
from klpemu.expectations import SUCCEEDS, Expectations
from klpemu.file_steps import LOOKS, contents_of
from klpemu.fuzz.answers import ANSWER, Answers
from klpemu.fuzz.bounds import BOUND, Bounds, Limit, OutOfBounds
from klpemu.fuzz.changes import Changes
from klpemu.fuzz.coverage import Coverage
from klpemu.scenario import Scenario, Step
from klpemu.step_runner import StepRunner
from klpemu.tasks import Stuck
from klpemu.watched_schedule import WatchedSchedule
from patches.invariants.before_and_after import state_of
from patches.invariants.finding import Finding, Report

__all__ = ["Prefix", "Run", "SequenceRunner", "Stepper", "forgive_forced", "judged"]

# A random sequence leaves variables behind, as no module's exit function runs that would free them.
NOT_JUDGED: Final = ("no_shadow_variable_remains",)


@dataclass(frozen=True, slots=True)
class Run:
    """One performed sequence: its steps with their answers, up to the one with findings if there is one.

    `covered` are the numbers of what was reached, in order (klpemu/fuzz/coverage.py).
    """

    steps: tuple[Step, ...]
    findings: tuple[Finding, ...]
    covered: tuple[int, ...]

    @property
    def signature(self) -> str:
        """What tells this run's finding from others: which invariant it is that does not hold."""
        return self.findings[0].invariant if self.findings else ""

    def shows(self, signature: str) -> bool:
        """One of the findings is of that invariant."""
        return any(each.invariant == signature for each in self.findings)


class Stepper(StepRunner):
    """Performs single steps; all that changes with them hangs on this object."""

    def __init__(self, world: Scenario, bounds: Bounds) -> None:
        super().__init__(world)
        self.coverage = Coverage(self.kernel)
        self.watch = Limit(self.kernel.machine, bounds).check
        self._changes = Changes(self.kernel.machine)
        self._answers = Answers(self)
        forgive_forced(self)
        self._state = state_of(self.kernel.remembering(self.kernel.subject()))

    def attempt(self, step: Step, *, thorough: bool) -> tuple[Step, tuple[Finding, ...]]:
        """Perform a step; returns it with its answer, and what does not hold afterwards.

        What is checked on a state is not checked again on one that no service has changed since, unless
        `thorough` asks for it.
        """
        machine, hub = self.kernel.machine, self.kernel.machine.hub
        warned, schedule, before = len(machine.warnings), hub.schedule, self._state
        asked = self._answers.before(step)
        if step.fail_alloc:
            machine.slab.fails = lambda tag: step.fail_alloc in tag
        if step.schedule:
            hub.schedule = WatchedSchedule(Directed(step.schedule), self._watched)
        error = self._error_of(step)
        machine.slab.fails = lambda tag: False
        hub.schedule = schedule
        unsettled = self._caught(self._settle)
        error = error or unsettled
        performed = replace(step, error=_answer(error))
        expectations = Expectations(performed)
        self._say(performed, error, expectations)
        wrong = self._answers.judge(step, asked, error)
        if wrong is not None:
            performed = replace(performed, error=wrong.right)
            expectations.fails(ANSWER, wrong.what)
        reports = [self._warnings(step, warned), expectations.report()]
        if thorough or self._changes.any_since():
            subject = self.kernel.subject()
            reports.append(self.kernel.verify_what_changed(step.name, subject))
            subject = self.kernel.remembering(subject)
            reports.append(self._compared(performed, before, error, subject))
            self._state = state_of(subject)
        else:
            reports.append(self.kernel.witnessed(step.name))
        self.coverage.note(performed)
        return performed, judged(Report.merged(reports).findings)

    def _error_of(self, step: Step) -> KlpemuError | None:
        if step.call is not None:
            return self._caught(lambda: self._call(step))
        if step.action in LOOKS:
            return self._caught(lambda: contents_of(self.kernel, step))
        return self._caught(lambda: self._operations[step.action](self, step))

    def _caught(self, body: Callable[[], object]) -> KlpemuError | None:
        try:
            body()
        except KlpemuError as error:
            return error
        except Exception as error:  # a defect of klpemu: the search goes on, and somebody reads the scenario
            return KlpemuError(f"internal error: {type(error).__name__}: {error}")
        return None

    def _say(self, step: Step, error: KlpemuError | None, expectations: Expectations) -> None:
        """What is no answer is a finding."""
        if error is None or step.error:
            return
        if isinstance(error, OutOfBounds):
            expectations.fails(BOUND, error.what.removeprefix(f"{BOUND}: "))
        elif isinstance(error, Stuck | GuestFault | FtraceBug):
            self._judge(step, error, expectations)
        else:
            expectations.fails(SUCCEEDS, str(error))


def forgive_forced(runner: StepRunner) -> None:
    """A task that is forced may mix versions: that is what a force gives up."""
    if runner.kernel.consistency is not None:
        runner.kernel.consistency.forgives = True


def judged(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The findings without those that a right kernel has, too."""
    return tuple(each for each in findings if each.invariant not in NOT_JUDGED)


def _answer(error: KlpemuError | None) -> str:
    """How a refusal is expected in a scenario; "" for what is none."""
    if isinstance(error, KernelErrno) and not isinstance(error, FtraceBug):
        return error.name
    return error.what if isinstance(error, SymbolError) else ""


class Prefix:
    """Steps that were performed without a finding, and the restore point behind them."""

    def __init__(self, point: RestorePoint, steps: tuple[Step, ...]) -> None:
        self.point = point
        self.steps = steps

    @property
    def size(self) -> int:
        """Bytes of guest memory that are kept."""
        return self.point.size


class SequenceRunner:
    """Runs sequences in one world.  Nothing that one has done is there in the next."""

    def __init__(self, world: Scenario, bounds: Bounds = Bounds()) -> None:  # noqa: B008  (frozen)
        self.world = world
        self._stepper = Stepper(replace(world, steps=()), bounds)
        self._start = Prefix(RestorePoint(self._stepper.kernel.machine, self._stepper), ())

    def run(self, steps: Sequence[Step], after: Prefix | None = None, *, thorough: bool = False) -> Run:
        """Perform the steps behind a prefix, by default behind the boot, up to the first finding.

        All is checked behind the last step; behind the others, if they are not all to be `thorough`, what the
        step can have changed.
        """
        prefix = after or self._start
        prefix.point.restore()
        performed = list(prefix.steps)
        findings: tuple[Finding, ...] = ()
        for number, step in enumerate(steps, 1):
            done, findings = self._stepper.attempt(step, thorough=thorough or number == len(steps))
            performed.append(done)
            if findings:
                break
        return Run(tuple(performed), findings, tuple(self._stepper.coverage.reached))

    def here(self, run: Run) -> Prefix | None:
        """A restore point behind a run that has just ended; None if a service is under way then."""
        try:
            return Prefix(RestorePoint(self._stepper.kernel.machine, self._stepper), run.steps)
        except Suspended:
            return None
