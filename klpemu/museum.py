"""Showing a bug of the museum: its scenario without the bug, where all must hold, and with it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from elf.errors import KlpemuError
from klpemu.expectations import SUCCEEDS
from klpemu.fixtures import fixture, shown
from klpemu.scenario import Scenario, Step
from klpemu.scenario_file import read_scenario
from klpemu.step_runner import StepResult, StepRunner
from patches.invariants.finding import Finding
from patches.museum import bug
from patches.variants import variants

__all__ = [
    "Performer",
    "Shown",
    "museum_scenario",
    "scenario_path",
    "show",
]


class Performer(Protocol):
    """What performs the steps of a scenario."""

    def boot(self) -> StepResult:
        """Verify the kernel before anything is done to it."""
        ...

    def perform(self, step: Step) -> StepResult:
        """Perform a step and verify."""
        ...


@dataclass(frozen=True)
class Shown:
    """One run of a bug's scenario: what each step came to, and all that was found.

    A step that fails without being expected to ends the run: `stopped`, which is one of the findings.
    """

    results: tuple[StepResult, ...]
    findings: tuple[Finding, ...]
    steps: int
    stopped: Finding | None = None

    @property
    def holds(self) -> bool:
        """Nothing was found, and every step was performed."""
        return not self.findings and len(self.results) == self.steps + 1

    def found_by(self, invariant: str) -> bool:
        """One of the findings is that invariant's."""
        return any(each.invariant == invariant for each in self.findings)


def scenario_path(name: str) -> Path:
    """The file of the scenario that shows a bug."""
    return fixture(f"museum/{name}.toml")


def museum_scenario(name: str) -> Scenario:
    """That scenario, read."""
    return read_scenario(scenario_path(name))


def show(
    name: str,
    *,
    broken: bool,
    scenario: Scenario | None = None,
    follow: Callable[[StepRunner], Performer] = lambda runner: runner,
) -> Shown:
    """Run the scenario of a bug, or another one, on the kernel that has the bug or on the one that has not.

    `follow` says who performs the steps with the runner: whoever prints them, for one.
    """
    exhibit = bug(name)
    chosen = scenario or museum_scenario(name)
    kernel: AbstractContextManager[None] = exhibit.bug() if broken else exhibit.fixed()
    stopped: Finding | None = None
    with kernel, variants(chosen.variants):
        performer = follow(StepRunner(chosen))
        results = [performer.boot()]
        for step in chosen.steps:
            try:
                result = performer.perform(step)
            except KlpemuError as error:
                stopped = Finding(SUCCEEDS, shown(error), step=step.name)
                break
            results.append(result)
            if result.fault is not None:
                break
    findings = [each for result in results for each in result.report.findings]
    findings += [] if stopped is None else [stopped]
    return Shown(tuple(results), tuple(findings), len(chosen.steps), stopped)
