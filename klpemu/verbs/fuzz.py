"""`klpemu fuzz`: random sequences of operations, every invariant checked after each step."""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

import click
from rich.progress import BarColumn, Progress, TextColumn

from elf.errors import KlpemuError
from klpemu.fixtures import locate, shown
from klpemu.fuzz.campaign import Campaign, Plan, State
from klpemu.fuzz.corpus import Corpus
from klpemu.fuzz.world import world_of
from klpemu.interrupt import INTERRUPTED, signals
from klpemu.output import Output
from klpemu.report import FINDINGS
from klpemu.verbs.options import image_options, output_options

__all__ = ["fuzz"]

SAYING: Final = 5.0  # seconds between two lines of progress where there is no terminal
_SECONDS: Final = {"s": 1, "min": 60, "h": 3600}


def _seconds(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """A time of the host, `90 s`, `10 min` or `2 h`, in seconds."""
    if value is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h)\s*", value)
    if found is None or not float(found[1]):
        raise click.BadParameter(f"'{value}' is no time; write it like '90 s', '10 min' or '2 h'")
    return float(found[1]) * _SECONDS[found[2]]


@click.command(short_help="Search for sequences of operations after which something does not hold.")
@image_options
@click.option(
    "--module",
    "modules",
    type=locate,
    multiple=True,
    metavar="KO",
    help="A module that comes and goes; may be repeated.",
)
@click.option(
    "--patch", "patches", multiple=True, metavar="PATCH", help="A patch to play with; may be repeated."
)
@click.option(
    "--world", type=locate, metavar="TOML", help="A scenario whose patches, tasks and steps are played with."
)
@click.option(
    "--variant", "variants", multiple=True, metavar="NAME", help="A variant of the kernel, or museum:BUG."
)
@click.option("--runs", type=click.IntRange(min=1), metavar="N", help="Stop after N runs.")
@click.option("--time", "seconds", callback=_seconds, metavar="T", help="Stop after so long, like '10 min'.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, metavar="J", help="Processes; 1 by default.")
@click.option(
    "--seed", type=int, default=0, metavar="S", help="What the random choices come from; 0 by default."
)
@click.option(
    "--corpus",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Where sequences are kept.",
)
@output_options
def fuzz(
    kernel: Path | None,
    handler: str | None,
    cpu: str,
    modules: tuple[Path, ...],
    patches: tuple[str, ...],
    world: Path | None,
    variants: tuple[str, ...],
    runs: int | None,
    seconds: float | None,
    jobs: int,
    seed: int,
    corpus: Path,
    as_json: bool,
    color: str,
) -> None:
    """Run random sequences of operations, and check every invariant after each step.

    Patches are enabled, disabled, replaced, reversed and forced, modules come and go, tasks run, fork, sleep
    and are preempted, tracers are registered, allocations fail.  Without --kernel, --module, --patch and
    --world the built-in kernel is played with.

    What is found is made as small as possible and written to DIR/findings: a scenario for `klpemu run`, and a
    test for pytest.  Sequences that reach something new stay in DIR/entries, and the next start goes on from
    there.  Ctrl-C ends the search with its summary.

    Exit status: 0 nothing was found, 1 something was, 2 bad usage or bad input.
    """
    output = Output("fuzz", as_json=as_json, color=color)
    what = world_of(world, kernel, handler, cpu, modules, patches, variants)
    before = {*Corpus(corpus).findings()}
    campaign = Campaign(Plan(what, corpus, seed, jobs, runs, seconds))
    interrupted = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        campaign.stop()

    with _progress(campaign.plan) as watch, signals(stop):
        state = campaign.run(watch)
    found = [each for each in Corpus(corpus).findings() if each not in before]
    if state.refused and not state.runs:
        raise KlpemuError(state.refused)
    _summary(output, state, found, sorted(before))
    output.finish(_payload(state, found, sorted(before)))
    if state.refused:
        raise KlpemuError(state.refused)
    sys.exit(INTERRUPTED if interrupted else FINDINGS if found or state.lost else 0)


@contextmanager
def _progress(plan: Plan) -> Iterator[Callable[[State], None]]:
    """Show how far the campaign is on standard error: a bar on a terminal, a line now and then elsewhere."""
    if not sys.stderr.isatty():
        said = time.monotonic()

        def say(state: State) -> None:
            nonlocal said
            if time.monotonic() - said >= SAYING:
                said = time.monotonic()
                sys.stderr.write(f"{_line(state)}\n")
                sys.stderr.flush()

        yield say
        return
    with Progress(BarColumn(), TextColumn("{task.description}"), transient=True) as bar:
        task = bar.add_task("starting", total=plan.runs or plan.seconds)

        def draw(state: State) -> None:
            done = state.runs if plan.runs else state.seconds
            bar.update(task, completed=done, description=_line(state))

        yield draw


def _line(state: State) -> str:
    return (
        f"{state.runs} runs, {state.rate:.0f} a second, {len(state.found)} found, "
        f"{state.states} states, {state.edges} edges, {state.entries} kept"
    )


def _summary(output: Output, state: State, found: list[Path], before: list[Path]) -> None:
    output.line(f"{_line(state)}, in {state.seconds:.0f} s")
    if state.runs:
        output.line(
            f"{state.steps / state.runs:.1f} steps a run, "
            f"{state.executed / state.runs:.1f} of them executed, "
            "the others shared with other runs"
        )
    for each in state.found:
        output.line()
        for line in each.what.splitlines():
            output.line((line, "red"))
        count = len(each.scenario.steps)
        output.line(f"found by run {each.runs}, shown in {count} step{'' if count == 1 else 's'}", indent=2)
    for path in found:
        output.line(f"klpemu run {shown(path)}", indent=2)
    for lost in state.lost:
        output.line((lost, "red"))
    if before:
        output.line(f"{len(before)} found before: {', '.join(each.stem for each in before)}")
    if not found and not state.lost:
        output.line(("nothing was found", "green"))


def _payload(state: State, found: list[Path], before: list[Path]) -> dict[str, Any]:
    return {
        "runs": state.runs,
        "steps": state.steps,
        "executed": state.executed,
        "seconds": round(state.seconds, 3),
        "states": state.states,
        "edges": state.edges,
        "covered": state.covered,
        "entries": state.entries,
        "findings": [
            {
                "invariant": each.signature,
                "what": each.what.splitlines(),
                "runs": each.runs,
                "steps": len(each.scenario.steps),
            }
            for each in state.found
        ],
        "scenarios": [str(each) for each in found],
        "found_before": [str(each) for each in before],
        "lost": state.lost,
    }
