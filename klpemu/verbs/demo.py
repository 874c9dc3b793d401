"""`klpemu demo`: the main job on the built-in fixtures, told stage by stage."""

import click

from klpemu.fixtures import locate
from klpemu.output import Output
from klpemu.report import conclude, print_findings, print_function
from klpemu.scenario import Action
from klpemu.scenario_file import read_scenario
from klpemu.step_runner import StepResult, StepRunner
from klpemu.verbs.options import att_option, output_options

__all__ = ["DEMO", "demo"]

DEMO = "builtin:demo.toml"


@click.command(short_help="The main job on the built-in fixtures, told stage by stage.")
@att_option
@output_options
def demo(att: bool, as_json: bool, color: str) -> None:
    """Patch one function of a small kernel, patch it again, replace both, and restore it.

    Everything shown is executed x86-64 machine code, and everything is checked after each step.  It is the
    scenario builtin:demo.toml; `klpemu run` performs it too, and your own.

    Exit status: 0 all checks hold, 1 there are findings.
    """
    output = Output("demo", as_json=as_json, color=color)
    scenario = read_scenario(locate(DEMO))
    runner = StepRunner(scenario, att=att)
    output.line((scenario.title, "bold"), hang=0)
    results = [runner.boot()]
    stage = 0
    for step in scenario.steps:
        result = runner.perform(step)
        results.append(result)
        if step.stage:
            stage += 1
            output.heading(f"{stage}. {step.stage}")
            output.line(step.note, hang=0)
        if step.action is Action.TRACE:
            # A stage is one trace, and what came before it: the boot or the step that changed something.
            _print_stage(output, results[-2:])
        if result.fault is not None:
            output.fault(result.fault)
            break
    conclude(output, results)


def _print_stage(output: Output, results: list[StepResult]) -> None:
    """The traced function as it stands, where the call went, and the checks of the stage's steps."""
    traced = results[-1]
    for function in traced.functions:
        print_function(output, function)
    if traced.trace is not None:
        output.fact("a call passes", " -> ".join(traced.trace.functions))
        output.fact("", f"{len(traced.trace.instructions)} instructions executed")
        output.fact("and returns", (f"{traced.step.target} = {traced.returned}", "bold"))
    for each in results:
        print_findings(output, each.report)
    if all(each.report.holds for each in results):
        output.fact("checked", (f"{sum(each.report.total for each in results)} checks hold", "green"))
