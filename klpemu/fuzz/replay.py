"""Performing the scenario of a finding as `klpemu run` does."""

from dataclasses import replace
from pathlib import Path

from emu.errno import KernelErrno
from klpemu.expectations import ERROR, SUCCEEDS
from klpemu.fuzz.answers import ANSWER, Answers
from klpemu.fuzz.bounds import Bounds, Limit
from klpemu.fuzz.sequence_runner import forgive_forced, judged
from klpemu.scenario import Scenario
from klpemu.scenario_file import read_scenario
from klpemu.step_runner import StepRunner
from patches.invariants.finding import Finding
from patches.variants import variants

__all__ = ["replay", "replayed"]


def replay(path: Path) -> list[str]:
    """What does not hold in the scenario of a file, in words."""
    return replayed(read_scenario(path))


def replayed(scenario: Scenario, bounds: Bounds = Bounds()) -> list[str]:  # noqa: B008  (frozen)
    """What does not hold in a scenario, in words; a step that fails without being expected to is the last."""
    found: list[str] = []
    with variants(scenario.variants):
        runner = StepRunner(scenario)
        forgive_forced(runner)
        runner.watch = Limit(runner.kernel.machine, bounds).check
        found += [str(each) for each in judged(runner.boot().report.findings)]
        answers = Answers(runner)
        for step in scenario.steps:
            before = answers.before(step)
            try:
                result = runner.perform(step)
            except Exception as error:  # one that is not ours is a defect, which somebody has to see
                refusal = error.__cause__
                wrong = isinstance(refusal, KernelErrno) and answers.judge(step, before, refusal)
                found.append(f"klpemu: {step.name}: {ANSWER if wrong else SUCCEEDS}: {error}")
                break
            findings = judged(result.report.findings)
            found += [str(_answered(each)) for each in findings]
            if result.fault is not None:
                break
    return found


def _answered(finding: Finding) -> Finding:
    """A step that is not refused as it has to be is a wrong answer."""
    return replace(finding, invariant=ANSWER) if finding.invariant == ERROR else finding
