"""`klpemu trace`: the executed instruction stream of one call."""

import sys
from pathlib import Path

import click

from klpemu.call_expression import CallExpression, parse_argument
from klpemu.output import Output
from klpemu.patch_argument import parse_patches
from klpemu.report import FINDINGS, fault_object, print_findings, print_trace, trace_object, verdict_object
from klpemu.scenario import Action, Scenario, Step
from klpemu.step_runner import StepRunner
from klpemu.verbs.options import att_option, budget_option, kernel_options, output_options

__all__ = ["trace"]


@click.command(
    short_help="The executed instructions of one call.", context_settings={"ignore_unknown_options": True}
)
@click.argument("symbol")
@click.argument("arguments", nargs=-1, metavar="[ARG]...")
@kernel_options
@click.option(
    "--patch", "patches", multiple=True, metavar="PATCH", help="Enable a patch first; may be repeated."
)
@budget_option
@att_option
@output_options
def trace(
    symbol: str,
    arguments: tuple[str, ...],
    kernel: Path | None,
    handler: str | None,
    cpu: str,
    system_map: Path | None,
    modules: tuple[Path, ...],
    patches: tuple[str, ...],
    budget: int | None,
    att: bool,
    as_json: bool,
    color: str,
) -> None:
    """Call SYMBOL and show every instruction that is executed, through trampoline and handler.

    SYMBOL is a function's name, module:name, or name,2 for the second of that name.  ARG is decimal, 0x
    hexadecimal, or a symbol's name for its address.  PATCH is as in `klpemu verify`.

    \b
    klpemu trace --patch builtin:fix_area.o:area_of=fixed_area_of area_of 3 4

    Exit status: 0, or 1 if the guest fails, 2 if a file, a patch or a symbol is refused.
    """
    output = Output("trace", as_json=as_json, color=color)
    declared = parse_patches(patches)
    call = CallExpression(symbol, tuple(parse_argument(each) for each in arguments))
    runner = StepRunner(
        Scenario(
            kernel=kernel,
            handler=handler,
            cpu=cpu,
            system_map=system_map,
            modules=modules,
            patches=declared,
            budget=budget or 0,
        ),
        att=att,
    )
    steps = [Step(Action.ENABLE, name) for name in declared]
    results = [runner.boot(), *(runner.perform(step) for step in steps)]
    traced = runner.perform(Step(Action.TRACE, str(call), call))
    reports = [*(each.report for each in results), traced.report]
    if traced.trace is not None:
        print_trace(output, traced.trace)
    for report in reports:
        print_findings(output, report)
    if traced.fault is not None:
        output.fault(traced.fault)
    output.finish(
        {
            **verdict_object(reports),
            "call": str(call),
            "patches": list(declared),
            "trace": trace_object(traced.trace) if traced.trace is not None else None,
            "fault": fault_object(traced.fault) if traced.fault is not None else None,
        }
    )
    sys.exit(0 if all(each.holds for each in reports) else FINDINGS)
