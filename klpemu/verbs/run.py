"""`klpemu run`: perform scenarios, verifying after each step."""

import sys
from pathlib import Path

import click

from klpemu.fixtures import locate, shown
from klpemu.output import Output
from klpemu.report import FINDINGS, print_verdict, step_object, verdict_object
from klpemu.scenario import Scenario
from klpemu.scenario_display import ScenarioDisplay
from klpemu.scenario_file import read_scenario
from klpemu.step_runner import StepResult, StepRunner
from klpemu.verbs.options import att_option, output_options
from patches.variants import variants

__all__ = ["run"]


@click.command(short_help="Run scenarios, verifying after each step.")
@click.argument("scenarios", nargs=-1, required=True, type=locate, metavar="SCENARIO.toml...")
@att_option
@output_options
def run(scenarios: tuple[Path, ...], att: bool, as_json: bool, color: str) -> None:
    """Perform the steps of a scenario, and check every invariant after each.

    A scenario says which kernel, modules, patches and tasks there are, what is done with them in which order,
    and what is expected; docs/cli.md describes its form.  builtin:demo.toml and builtin:consistency.toml are
    two.

    Exit status: 0 all checks hold, 1 there are findings, 2 a scenario cannot be read, or a step fails that is
    not expected to.
    """
    output = Output("run", as_json=as_json, color=color)
    # All are read before the first is performed: a mistake in the last one costs no time.
    read = [read_scenario(each) for each in scenarios]
    done = [_perform(each, output, att=att) for each in read]
    reports = [result.report for results in done for result in results]
    print_verdict(output, reports)
    output.finish(
        {
            **verdict_object(reports),
            "scenarios": [
                {
                    "file": shown(scenario.path),
                    "title": scenario.title or None,
                    "variants": list(scenario.variants),
                    "steps": [step_object(each) for each in results],
                    "left_out": len(scenario.steps) + 1 - len(results),
                }
                for scenario, results in zip(read, done, strict=True)
            ],
        }
    )
    sys.exit(0 if all(each.holds for each in reports) else FINDINGS)


def _perform(scenario: Scenario, output: Output, *, att: bool) -> list[StepResult]:
    if scenario.title:
        output.line((scenario.title, "bold"), hang=0)
    if scenario.variants:
        output.line(("a variant of the kernel: ", "yellow"), ", ".join(scenario.variants), hang=4)
    with variants(scenario.variants):
        return _steps(scenario, output, att=att)


def _steps(scenario: Scenario, output: Output, *, att: bool) -> list[StepResult]:
    display = ScenarioDisplay(output, StepRunner(scenario, att=att))
    results = [display.boot()]
    for step in scenario.steps:
        result = display.perform(step)
        results.append(result)
        if result.fault is not None:
            output.fault(result.fault)
            break
    left = len(scenario.steps) + 1 - len(results)
    if left:
        output.line((f"{left} step{'s' if left > 1 else ''} left out", "yellow"))
    return results
