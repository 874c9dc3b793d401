"""Running a scenario under all schedules with a bounded number of preemptions."""

import gc
import os
import select
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, NoReturn, Protocol

from elf.errors import KlpemuError
from emu.machine import Machine
from klpemu.expectations import SUCCEEDS
from klpemu.explorer import Bounds, Explorer, Failure, Outcome
from klpemu.forked import Forked
from klpemu.kernel import Kernel
from klpemu.scenario import Scenario, Step
from klpemu.step_runner import StepResult, StepRunner
from klpemu.watched_schedule import WatchedSchedule
from patches.variants import variants

__all__ = ["Explored", "Performs", "Progress", "explore", "explored", "failing_scenario"]

POLL_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it has come: with schedules of so many preemptions, the share of them (0 to 1), and runs."""

    preemptions: int
    share: float
    runs: int


@dataclass(frozen=True, slots=True)
class Explored:
    """What an exploration has found.

    `schedules` is how many there are with at most 0, 1, ... preemptions, those that were run and those that
    come to the same as one of them; it is as long as was explored to the end.  `runs` went to the end,
    `merged` up to a state that was known, and `left_out` alternatives were not begun.  `stopped` says why it
    ended early, "" if it did not.
    """

    scenario: Scenario
    schedules: tuple[float, ...]
    runs: int
    merged: int
    left_out: int
    failure: Failure | None = None
    stopped: str = ""
    final_states: frozenset[Any] = frozenset()

    @property
    def holds(self) -> bool:
        """Nothing was found."""
        return self.failure is None


class Performs(Protocol):
    """Whoever performs the steps of a scenario on a kernel (`StepRunner`)."""

    kernel: Kernel

    def perform(self, step: Step) -> StepResult:
        """Perform a step and verify."""
        ...

    def judged(self) -> tuple[object, ...]:
        """What steps are judged by that is neither the kernel nor its log."""
        ...

    def _watched(self) -> None: ...


def explore(
    scenario: Scenario,
    bounds: Bounds = Bounds(),  # noqa: B008  (it is frozen)
    *,
    reduce: bool = True,
    final_state: Callable[[Machine], Any] | None = None,
    progress: Callable[[Progress], bool] = lambda progress: True,
) -> Explored:
    """Run the scenario under all its schedules, those with fewest preemptions first, up to the first failure.

    What the scenario says of schedules is left aside.  `progress` is called now and then; when it returns
    False the exploration stops.  `reduce` False runs every single schedule.  `final_state` collects what all
    runs came to.  Raises KlpemuError if the scenario does not even begin.
    """
    scenario = _unscheduled(scenario)
    with variants(scenario.variants):
        runner = StepRunner(scenario)
        runner.boot()
        machine = runner.kernel.machine
        final = None if final_state is None else partial(final_state, machine)
        return explored(scenario, runner, bounds, reduce=reduce, final_state=final, progress=progress)


def explored(
    scenario: Scenario,
    runner: Performs,
    bounds: Bounds,
    *,
    reduce: bool = True,
    final_state: Callable[[], Any] | None = None,
    progress: Callable[[Progress], bool] = lambda progress: True,
) -> Explored:
    """The same for steps that anybody performs, on a kernel that is there."""
    machine = runner.kernel.machine
    explorer = Explorer(
        machine, (runner,), bounds, reduce=reduce, judged=runner.judged, final_state=final_state
    )
    machine.hub.schedule = WatchedSchedule(explorer, runner._watched)
    return _explore(scenario, runner, explorer, progress)


def failing_scenario(explored: Explored) -> Scenario:
    """The scenario up to the failure, with the schedule that leads there: `klpemu run` reproduces it."""
    failure = explored.failure
    if failure is None:
        raise KlpemuError("all schedules hold", advice="there is nothing to reproduce")
    steps = explored.scenario.steps[: failure.step + 1]
    return replace(explored.scenario, steps=steps, schedule=failure.schedule).anchored()


def _unscheduled(scenario: Scenario) -> Scenario:
    steps = [replace(step, schedule=()) for step in scenario.steps]
    return replace(scenario, seed=None, schedule=(), steps=steps)


def _explore(
    scenario: Scenario, runner: Performs, explorer: Explorer, progress: Callable[[Progress], bool]
) -> Explored:
    counters, bounds = explorer.counters, explorer.bounds
    schedules: list[float] = []
    final_states: frozenset[Any] = frozenset()
    failure, stopped, length = None, "", 0
    gc.collect()
    gc.freeze()  # the processes share all that is there
    for preemptions in range(bounds.preemptions + 1):
        counters["position"] = 0
        forked = Forked()
        if forked.is_child:
            gc.disable()
            explorer.begin(forked, preemptions)
            try:
                _run(scenario, runner, explorer)
            except BaseException:  # in whichever of the processes: none may go on as if it was the first
                traceback.print_exc()
                os._exit(1)
        outcome = _outcome(forked, explorer, partial(_goes_on, explorer, progress, preemptions, length))
        failure = outcome.failure
        if failure is not None or counters["stop"]:
            break
        length = length or counters["position"]
        schedules = outcome.counts
        final_states |= outcome.final_states
    if counters["stop"] and failure is None:
        made = counters["runs"] + counters["merged"]
        stopped = f"after {made:,} runs" if bounds.runs is not None and made >= bounds.runs else "interrupted"
    gc.unfreeze()
    return Explored(
        scenario,
        tuple(schedules),
        counters["runs"],
        counters["merged"],
        counters["left_out"],
        failure,
        stopped,
        final_states,
    )


def _goes_on(explorer: Explorer, progress: Callable[[Progress], bool], preemptions: int, length: int) -> bool:
    counters = explorer.counters
    share = min(1.0, counters["position"] / length) if length else 0.0
    return progress(Progress(preemptions, share, counters["runs"] + counters["merged"]))


def _outcome(forked: Forked, explorer: Explorer, goes_on: Callable[[], bool]) -> Outcome:
    """Wait for the first process of a round."""
    data = bytearray()
    while True:
        if not goes_on():
            explorer.counters["stop"] = 1
        ready, _, _ = select.select([forked.pipe], [], [], POLL_SECONDS)
        if not ready:
            continue
        piece = os.read(forked.pipe, 1 << 16)
        if not piece:
            break
        data += piece
    outcome: Outcome = forked.ended(bytes(data))
    return outcome


def _run(scenario: Scenario, runner: Performs, explorer: Explorer) -> NoReturn:
    """One run of the scenario, in the first process or in any that was forked on the way."""
    for number, step in enumerate(scenario.steps):
        explorer.begin_step(number)
        try:
            result = runner.perform(step)
        except KlpemuError as error:
            explorer.fail([f"{SUCCEEDS}: {step.name}: {error}"])
        if not result.report.holds:
            explorer.fail([str(each) for each in result.report.findings])
    explorer.complete()
