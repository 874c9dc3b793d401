"""`klpemu explore`: a scenario under all schedules with a bounded number of preemptions."""

import itertools
import sys
import threading
from pathlib import Path
from typing import Any

import click

from elf.errors import KlpemuError
from klpemu.exploration import Explored, Progress, explore, failing_scenario
from klpemu.explorer import Bounds
from klpemu.fixtures import locate, shown
from klpemu.interrupt import INTERRUPTED, say_interrupted, signals
from klpemu.output import Output
from klpemu.report import FINDINGS
from klpemu.scenario_file import read_scenario
from klpemu.scenario_text import scenario_text
from klpemu.verbs.options import output_options

__all__ = ["explore_"]


@click.command("explore", short_help="Run a scenario under all its schedules.")
@click.argument("scenario", type=locate, metavar="SCENARIO.toml")
@click.option(
    "--preemptions",
    type=click.IntRange(0, 8),
    default=2,
    show_default=True,
    metavar="K",
    help="Preemptions in a schedule: switches from a task that could have gone on.",
)
@click.option(
    "--runs",
    type=click.IntRange(min=1),
    metavar="N",
    help="End after N runs, whatever is left; what was run then decides the status.",
)
@click.option(
    "--budget",
    type=click.IntRange(min=1),
    default=Bounds().picks,
    show_default=True,
    metavar="N",
    help="A run in which tasks took N turns does not end: that is a finding.",
)
@click.option("--unreduced", is_flag=True, help="Leave nothing out.")
@click.option(
    "--output",
    "reproducer",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where to write the shortest failing schedule, as a scenario; failing-SCENARIO.toml by default.",
)
@output_options
def explore_(
    scenario: Path,
    preemptions: int,
    runs: int | None,
    budget: int,
    unreduced: bool,
    reproducer: Path | None,
    as_json: bool,
    color: str,
) -> None:
    """Run a scenario under all schedules with at most K preemptions, and check every invariant in each.

    A task can lose its turn wherever another one could tell the difference: at each load and store of shared
    memory, lock, sync and call of a kernel service, and at each instruction of trampolines, handlers and
    entries of functions that can be patched.  Schedules that come to the same as another one are left out.
    Those with fewer preemptions come first, and the first that fails ends the search; it is written as a
    scenario, which `klpemu run` reproduces.

    Exit status: 0 all schedules hold, 1 one does not, 2 the scenario cannot be read.
    """
    output = Output("explore", as_json=as_json, color=color)
    read = read_scenario(scenario)
    path = reproducer or Path(f"failing-{scenario.name}")
    if not path.parent.is_dir():
        raise KlpemuError("no such folder", where=str(path.parent), advice="make it, or name another file")
    bounds = Bounds(preemptions, budget, runs)
    interrupted = threading.Event()
    with signals(lambda *_: interrupted.set()), output.gauge() as show:

        def progress(now: Progress) -> bool:
            show(f"up to {_preemptions(now.preemptions)}, {now.runs:,} runs", now.share)
            return not interrupted.is_set()

        explored = explore(read, bounds, reduce=not unreduced, progress=progress)
    _print(explored, preemptions, path, output)
    if explored.failure is not None:
        _write(explored, path)
    output.finish(_object(explored, shown(scenario), path))
    if explored.failure is not None:
        sys.exit(FINDINGS)
    if interrupted.is_set():
        say_interrupted()
        sys.exit(INTERRUPTED)
    sys.exit(0)


def _write(explored: Explored, path: Path) -> None:
    failure = explored.failure
    assert failure is not None
    comment = [f"Found by klpemu explore, with {_preemptions(failure.preemptions)}:", *failure.findings]
    lines = [line for each in comment for line in each.splitlines()]
    try:
        path.write_text(scenario_text(failing_scenario(explored), lines))
    except OSError as error:
        raise KlpemuError(f"cannot be written: {error.strerror}", where=str(path)) from error


def _print(explored: Explored, preemptions: int, path: Path, output: Output) -> None:
    if explored.scenario.title:
        output.line((explored.scenario.title, "bold"), hang=0)
    for number, count in enumerate(explored.schedules):
        schedules = f"{count:,.0f} schedule{'' if count == 1 else 's'}"
        output.fact("all there are" if not number else "", f"{schedules} with at most {_preemptions(number)}")
    merged = f", {explored.merged:,} of them up to a state seen before" if explored.merged else ""
    output.fact("run", f"{explored.runs + explored.merged:,}{merged}")
    output.line()
    failure = explored.failure
    if failure is not None:
        for finding in failure.findings:
            output.line((finding, "red"))
        step = explored.scenario.steps[failure.step].name
        switches = len(list(itertools.groupby(failure.schedule, lambda turn: turn[0]))) - 1
        output.line(
            (f"does not hold with {_preemptions(failure.preemptions)}", "bold red"), f", in step '{step}'"
        )
        output.line(f"{switches} switches between tasks in all; klpemu run {path}")
    elif explored.stopped:
        output.line((f"stopped: {explored.stopped}; what was run holds", "yellow"))
    else:
        output.line((f"all schedules with at most {_preemptions(preemptions)} hold", "bold green"))


def _preemptions(count: int) -> str:
    return f"{count} preemption{'' if count == 1 else 's'}"


def _object(explored: Explored, file: str, path: Path) -> dict[str, Any]:
    failure = explored.failure
    return {
        "file": file,
        "holds": explored.holds,
        "complete": explored.holds and not explored.stopped,
        "stopped": explored.stopped or None,
        "schedules": [round(each) for each in explored.schedules],
        "runs": explored.runs,
        "merged": explored.merged,
        "left_out": explored.left_out,
        "failure": None
        if failure is None
        else {
            "findings": list(failure.findings),
            "step": explored.scenario.steps[failure.step].name,
            "preemptions": failure.preemptions,
            "schedule": [list(each) for each in failure.schedule],
            "scenario": str(path),
        },
    }
