"""`klpemu verify`: enable each patch in turn, check everything after each, remove them all."""

from collections.abc import Iterator
from pathlib import Path

import click

from elf.errors import KlpemuError
from klpemu.call_expression import CallExpression, parse_call
from klpemu.output import Output
from klpemu.patch_argument import parse_patches
from klpemu.report import conclude, print_step
from klpemu.scenario import Action, Scenario, Step
from klpemu.step_runner import StepResult, StepRunner
from klpemu.verbs.options import att_option, budget_option, kernel_options, output_options

__all__ = ["verify"]


@click.command(short_help="Enable patches, check everything, remove them all.")
@click.argument("patches", nargs=-1, required=True, metavar="PATCH...")
@kernel_options
@click.option(
    "--call",
    "calls",
    multiple=True,
    metavar="CALL[=VALUE]",
    help="Call it at every stage, as in 'area_of(3, 4)=12'; VALUE is expected once all patches are on.",
)
@budget_option
@att_option
@output_options
def verify(
    patches: tuple[str, ...],
    kernel: Path | None,
    handler: str | None,
    cpu: str,
    system_map: Path | None,
    modules: tuple[Path, ...],
    calls: tuple[str, ...],
    budget: int | None,
    att: bool,
    as_json: bool,
    color: str,
) -> None:
    """Enable each PATCH in turn, check every byte and stream after each, then remove them all, newest first.

    PATCH is FILE:PAIR[,PAIR]...[,replace] with PAIR = [OBJECT:]OLD[,SYMPOS]=NEW, or a livepatch module (.ko)
    alone. FILE may be builtin:NAME.  `replace` makes the patch atomically replace those before it.

    \b
    klpemu verify builtin:fix_area.o:area_of=fixed_area_of
    klpemu verify --module libarc4.ko fix.o:libarc4:arc4_crypt=fixed_arc4_crypt

    Exit status: 0 all checks hold, 1 there are findings, 2 a file or a patch is refused.
    """
    output = Output("verify", as_json=as_json, color=color)
    declared = parse_patches(patches)
    wanted = [_parse_call(each) for each in calls]
    scenario = Scenario(
        kernel=kernel,
        handler=handler,
        cpu=cpu,
        system_map=system_map,
        modules=modules,
        patches=declared,
        budget=budget or 0,
    )
    runner = StepRunner(scenario, att=att)
    results = []
    for result in _stages(runner, list(declared), wanted):
        results.append(result)
        print_step(output, result)
        if result.fault is not None:
            output.fault(result.fault)
            break
    conclude(output, results)


def _stages(
    runner: StepRunner, patches: list[str], calls: list[tuple[CallExpression, int | None]]
) -> Iterator[StepResult]:
    def made(*, complete: bool = False) -> Iterator[StepResult]:
        for call, value in calls:
            yield runner.perform(Step(Action.CALL, str(call), call, returns=value if complete else None))

    yield runner.boot()
    yield from made()
    for name in patches:
        yield runner.perform(Step(Action.ENABLE, name))
        yield from made(complete=name == patches[-1])
    while runner.kernel.enabled:
        yield runner.perform(Step(Action.DISABLE, runner.kernel.enabled[-1].patch.name))
        yield from made()


def _parse_call(text: str) -> tuple[CallExpression, int | None]:
    call, equals, value = text.rpartition("=")
    if not equals:
        return parse_call(text), None
    try:
        return parse_call(call), int(value, 0)
    except ValueError:
        raise KlpemuError(f"'{value}' is no value to expect", where=f"--call '{text}'") from None
