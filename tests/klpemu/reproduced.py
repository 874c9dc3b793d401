"""Running the scenario that an exploration has written."""

from pathlib import Path

from klpemu.exploration import Explored, failing_scenario
from klpemu.scenario_file import read_scenario
from klpemu.scenario_text import scenario_text
from klpemu.step_runner import StepRunner
from patches.variants import variants


def reproduced(explored: Explored, directory: Path) -> tuple[str, ...]:
    """What is found in the last step when the failing scenario is read and run; the others hold."""
    path = directory / "failing.toml"
    path.write_text(scenario_text(failing_scenario(explored)))
    scenario = read_scenario(path)
    with variants(scenario.variants):
        runner = StepRunner(scenario)
        runner.boot()
        reports = [runner.perform(step).report for step in scenario.steps]
    assert all(report.holds for report in reports[:-1])
    return tuple(str(finding) for finding in reports[-1].findings)
