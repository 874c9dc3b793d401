"""What a step is expected to do, compared with what it did; each comparison counts as a check.

A word about a task is one of `TASK_WORDS`: "patched" and "unpatched" are its version in a transition, "in
FUNCTION" says that the function is on its stack, "exited" that no task of the name is left.  It must be true
of every task of the name: a task's children have it, too.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final

from elf.errors import KlpemuError
from emu.errno import KernelErrno
from klpemu.call_trace import CallTrace
from klpemu.fixtures import shown
from klpemu.scenario import Step
from klpemu.tasks import TaskState
from patches.invariants.before_and_after import RESTORES, failures_leave_the_state_before
from patches.invariants.consistency import FREED, LEFT, MIXED
from patches.invariants.fetches import FETCH
from patches.invariants.finding import Finding, Report
from patches.invariants.forced import PINS
from patches.invariants.grace import GRACE
from patches.invariants.moments import MOMENT
from patches.invariants.reachable import IN_USE
from patches.invariants.replacement import STAY
from patches.invariants.verify import INVARIANTS as OF_ONE_STATE

__all__ = ["ERROR", "INVARIANTS", "SUCCEEDS", "TASK_WORDS", "Expectations", "is_task_word"]

UNCHANGED: Final = failures_leave_the_state_before.__name__
WARNS: Final = "the_kernel_does_not_warn"
ERROR: Final = "error_is_the_expected_one"
SUCCEEDS: Final = "the_step_succeeds"  # said where a step that fails does not end everything
_OF_A_TIME: Final = (
    *(MIXED, LEFT, FREED, FETCH, MOMENT, GRACE),
    *(STAY, PINS, IN_USE, WARNS, UNCHANGED, RESTORES),
)
INVARIANTS: Final = (*(each.__name__ for each in OF_ONE_STATE), *_OF_A_TIME)
TASK_WORDS: Final = ("patched", "unpatched", "in FUNCTION", "exited")
_IN: Final = re.compile(r"in ([\w.$]+)")


def is_task_word(word: str) -> bool:
    """Whether a task can be expected to be so."""
    return word in TASK_WORDS or _IN.fullmatch(word) is not None


class Expectations:
    """The expectations of one step; `report` has the checks and findings that came of them."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._checks: dict[str, int] = {}
        self._findings: list[Finding] = []

    def fails(self, invariant: str, what: str) -> None:
        """Something that nobody has to expect does not hold."""
        self._findings.append(Finding(invariant, what, step=self._step.name))

    def compare(
        self,
        error: KlpemuError | None,
        log: tuple[str, ...],
        returned: int | None,
        trace: CallTrace | None,
        contents: tuple[str, ...] | None = None,
    ) -> None:
        """Compare what the step itself came to."""
        step = self._step
        if step.error:
            found = "nothing failed" if error is None else shown(error)
            self._check(ERROR, _is_expected(error, step.error), found, step.error)
        if step.log is not None:
            self._check("log_is_the_expected_one", step.log == log, list(log), list(step.log))
        if error is not None:
            return
        if step.contents is not None and contents is not None:
            self._check(
                "contents_are_the_expected_ones",
                step.contents == contents,
                list(contents),
                list(step.contents),
            )
        if step.returns is not None and returned is not None:
            same = _same(step.returns, returned)
            self._check("call_returns_the_expected_value", same, f"{returned} ({returned:#x})", step.returns)
        if step.through is not None and trace is not None:
            self._check(
                "call_passes_the_expected_functions",
                step.through == trace.functions,
                list(trace.functions),
                list(step.through),
            )
        if step.executed is not None and trace is not None:
            executed = len(trace.instructions)
            self._check("call_executes_as_many", step.executed == executed, executed, step.executed)

    def compare_tasks(
        self, transition: str, states: Sequence[TaskState], returned: Mapping[str, Sequence[Sequence[int]]]
    ) -> None:
        """Compare the patch in transition, the tasks as they stand, and what the calls of all tasks that ever
        were have returned, by name.
        """
        if self._step.transition is not None:
            expected = self._step.transition
            self._check(
                "transition_is_the_expected_one",
                transition == expected,
                transition or "no transition",
                expected or "none",
            )
        for name, words in self._step.tasks.items():
            named = [each for each in states if each.name == name]
            for word in words:
                self._compare_task(name, named, word)
        for name, values in self._step.returned.items():
            calls = [each for each in returned.get(name, ()) if each]
            if not calls:
                self._check("tasks_return_the_expected_values", False, f"no call of {name}", _hex(values))
            for each in calls:
                found = each[-len(values) :]
                same = len(found) == len(values) and all(map(_same, values, found))
                self._check("tasks_return_the_expected_values", same, f"{name}: {_hex(found)}", _hex(values))

    def expected_findings(self, report: Report) -> tuple[Report, tuple[Finding, ...]]:
        """The report without the findings that the step expects, and those."""
        expected = tuple(each for each in report.findings if each.invariant in self._step.findings)
        for name in self._step.findings:
            came = any(each.invariant == name for each in expected)
            self._check("finding_is_the_expected_one", came, "nothing", name)
        others = tuple(each for each in report.findings if each not in expected)
        return Report(report.step, report.checks, others), expected

    def report(self) -> Report:
        """The checks that were made, and what was found."""
        return Report(self._step.name, self._checks, tuple(self._findings))

    def _compare_task(self, name: str, tasks: Sequence[TaskState], word: str) -> None:
        invariant = "tasks_stand_as_expected"
        if word == "exited":
            self._check(invariant, not tasks, ", ".join(map(_stands, tasks)), f"{name} {word}")
        elif not tasks:
            self._check(invariant, False, f"no task {name}", f"{name} {word}")
        for each in tasks if word != "exited" else ():
            self._check(invariant, _is(each, word), _stands(each), f"{name} {word}")

    def _check(self, invariant: str, holds: bool, found: object, expected: object) -> None:
        if holds:
            self._checks[invariant] = self._checks.get(invariant, 0) + 1
        else:
            self.fails(invariant, f"found {found}, expected {expected}")


def _is_expected(error: KlpemuError | None, wanted: str) -> bool:
    if error is None:
        return False
    return (isinstance(error, KernelErrno) and error.name == wanted) or (
        wanted in str(error) and not wanted.isupper()
    )


def _is(task: TaskState, word: str) -> bool:
    if found := _IN.fullmatch(word):
        return any(place.partition("+")[0] == found[1] for place in task.stack)
    return task.version == word


def _stands(task: TaskState) -> str:
    """A task as findings name it: `sleeper:4 unpatched in msleep, nap`."""
    functions = ", ".join(place.partition("+")[0] for place in task.stack)
    return f"{task.name}:{task.pid} {task.version}".rstrip() + (f" in {functions}" if functions else "")


def _same(expected: int, found: int) -> bool:
    """Equal as 64 bits: an expected value may be negative."""
    return (expected - found) % (1 << 64) == 0


def _hex(values: Sequence[int]) -> str:
    return " ".join(f"{each:#x}" for each in values) or "nothing"
