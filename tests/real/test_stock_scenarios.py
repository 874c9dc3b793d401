"""Scenarios on the kernel that people run, redirected by its own code and by ours: both must agree."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from klpemu.boot_machine import HANDLERS
from klpemu.livepatch_modules import LivepatchModules
from klpemu.scenario import Action
from klpemu.scenario_file import read_scenario
from klpemu.step_runner import StepResult, StepRunner

SCENARIOS = sorted((Path(__file__).parents[2] / "fixtures" / "scenarios" / "stock").glob("*.toml"))
KERNEL, OWN = HANDLERS


def performed(path: Path, handler: str) -> list[StepResult]:
    scenario = replace(read_scenario(path), handler=handler)
    runner = StepRunner(scenario)
    return [runner.boot(), *(runner.perform(step) for step in scenario.steps)]


def outcome(result: StepResult) -> tuple[object, ...]:
    """What a step did, seen from outside: the handlers may differ in instructions only."""
    timeline = [(each.seconds, each.text) for each in result.timeline or ()]
    return (result.step.name, result.log, result.returned, result.contents, result.error, timeline)


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_both_handlers_do_the_same_and_every_check_holds(
    livepatch_modules: LivepatchModules, path: Path, record_property: Callable[[str, object], None]
) -> None:
    by_handler = {handler: performed(path, handler) for handler in HANDLERS}
    for handler, results in by_handler.items():
        findings = [finding for result in results for finding in result.report.findings]
        assert findings == [], (handler, findings)
    assert [outcome(each) for each in by_handler[KERNEL]] == [outcome(each) for each in by_handler[OWN]]
    for theirs, ours in zip(by_handler[KERNEL], by_handler[OWN], strict=True):
        if theirs.step.action is Action.TRACE:
            counts = {
                handler: len(result.trace.instructions)
                for handler, result in ((KERNEL, theirs), (OWN, ours))
                if result.trace is not None
            }
            record_property(theirs.step.name, counts)
            print(f"{path.stem}: {theirs.step.name}: {counts} instructions")
            assert counts[OWN] <= counts[KERNEL]


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 4
