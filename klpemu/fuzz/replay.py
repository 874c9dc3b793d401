"""Performing the scenario of a finding as `klpemu run` does."""

from pathlib import Path

from elf.errors import KlpemuError
from klpemu.fuzz.bounds import Bounds, Limit
from klpemu.fuzz.sequence_runner import SUCCEEDS, judged
from klpemu.scenario import Action, Scenario
from klpemu.scenario_file import read_scenario
from klpemu.step_runner import StepRunner
from patches.variants import variants

__all__ = ["replay", "replayed"]


def replay(path: Path) -> list[str]:
    """What does not hold in the scenario of a file, in words."""
    return replayed(read_scenario(path))


def replayed(scenario: Scenario, bounds: Bounds = Bounds()) -> list[str]:  # noqa: B008  (frozen)
    """What does not hold in a scenario, in words; a step that fails without being expected to is the last."""
    found: list[str] = []
    forced = False
    with variants(scenario.variants):
        runner = StepRunner(scenario)
        runner.watch = Limit(runner.kernel.machine, bounds).check
        found += [str(each) for each in judged(runner.boot().report.findings, forced=False)]
        for step in scenario.steps:
            try:
                result = runner.perform(step)
            except KlpemuError as error:
                found.append(f"klpemu: {step.name}: {SUCCEEDS}: {error}")
                break
            forced |= step.action is Action.FORCE and not step.error
            found += [str(each) for each in judged(result.report.findings, forced=forced)]
            if result.fault is not None:
                break
    return found
