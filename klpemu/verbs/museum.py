"""`klpemu museum`: bugs that really happened, or could have, and how they are found."""

import sys
from collections.abc import Sequence
from typing import Any

import click

from elf.errors import KlpemuError
from klpemu.fixtures import shown
from klpemu.museum import Shown, museum_scenario, scenario_path, show
from klpemu.output import Output
from klpemu.report import FINDINGS, finding_object, print_findings, step_object
from klpemu.scenario_display import ScenarioDisplay
from klpemu.verbs.options import output_options
from patches.invariants.finding import Report
from patches.museum import NAMES, bug, source, story

__all__ = ["museum"]


@click.group(short_help="Bugs that really happened, and how they are found.", invoke_without_command=True)
@click.pass_context
def museum(context: click.Context) -> None:
    """Show bugs of livepatch, ftrace and text poking, one at a time.

    Each is a small replacement of the code that it breaks, with a story, a scenario that holds without it,
    and the invariant that finds it.  Without a command the list is printed.
    """
    if context.invoked_subcommand is None:
        context.invoke(list_)


@museum.command("list", short_help="All bugs, one line each.")
@output_options
def list_(as_json: bool = False, color: str = "auto") -> None:
    """List the bugs: their name, how far they came, what finds them, and what they are."""
    output = Output("museum list", as_json=as_json, color=color)
    bugs = {name: bug(name) for name in NAMES}
    width = max(map(len, NAMES))
    kinds = max(len(each.kind.value) for each in bugs.values())
    for name, each in bugs.items():
        output.line(
            (f"{name:{width}}", "bold"), f"  {each.kind.value:{kinds}}  {each.title}", hang=width + kinds + 4
        )
        indent = width + kinds + 4
        output.line((each.commit, "dim"), indent=indent)
        output.line(("found by ", "dim"), each.invariant, indent=indent)
    output.finish({"bugs": [_bug_object(name) for name in NAMES]})
    sys.exit(0)


@museum.command("show", short_help="The story of a bug, its scenario and its code.")
@click.argument("name", metavar="BUG")
@output_options
def show_(name: str, as_json: bool, color: str) -> None:
    """Show a bug: what happened, the commit, the scenario that shows it, and the code that has it."""
    output = Output("museum show", as_json=as_json, color=color)
    each = bug(name)
    output.line((each.title, "bold"), hang=0)
    for paragraph in story(name).split("\n\n"):
        output.line(" ".join(paragraph.split()), hang=0)
    output.line()
    for label, text in (
        ("kind", each.kind.value),
        ("commit", each.commit),
        ("breaks", each.breaks),
        ("found by", each.invariant),
        ("scenario", shown(scenario_path(name))),
    ):
        output.fact(label, text)
    for heading, text in (("The scenario", _scenario(name)), ("The code", _code(name))):
        output.heading(heading)
        for line in text.splitlines():
            output.line(line, indent=2, hang=4)
    output.finish(
        {**_bug_object(name), "story": story(name), "scenario": _scenario(name), "code": _code(name)}
    )
    sys.exit(0)


@museum.command("run", short_help="Run the scenario of a bug without it and with it.")
@click.argument("names", nargs=-1, required=True, metavar="BUG...")
@output_options
def run(names: Sequence[str], as_json: bool, color: str) -> None:
    """Run the scenario of a bug on a kernel without it, where all must hold, and on one with it.

    Exit status: 0 if the bug was found, by the invariant that it names, and nothing without it; else 1.
    """
    output = Output("museum run", as_json=as_json, color=color)
    for name in names:
        bug(name)
    runs = [_run(output, name) for name in names]
    output.finish({"holds": all(each["right"] for each in runs), "bugs": runs})
    sys.exit(0 if all(each["right"] for each in runs) else FINDINGS)


def _run(output: Output, name: str) -> dict[str, Any]:
    each = bug(name)
    output.heading(f"{name}, without the bug: {museum_scenario(name).title}")
    without = show(name, broken=False, follow=lambda runner: ScenarioDisplay(output, runner))
    _print_verdict(output, without)
    output.heading(f"{name}, with the bug: {each.breaks}")
    with_bug = show(name, broken=True, follow=lambda runner: ScenarioDisplay(output, runner))
    _print_verdict(output, with_bug)
    right = without.holds and with_bug.found_by(each.invariant)
    output.line()
    if right:
        output.line((f"{each.invariant} finds {name}; nothing is found without it", "green"))
    elif not without.holds:
        output.line((f"the scenario does not hold without {name}", "red"))
    else:
        output.line((f"{each.invariant} does not find {name}", "red"))
    return {
        **_bug_object(name),
        "right": right,
        "without": _shown_object(without),
        "with": _shown_object(with_bug),
    }


def _print_verdict(output: Output, what: Shown) -> None:
    if what.stopped is not None:
        print_findings(output, Report(what.stopped.step, findings=(what.stopped,)))
    left = what.steps + 1 - len(what.results)
    if left:
        output.line((f"{left} step{'s' if left > 1 else ''} left out", "yellow"))


def _bug_object(name: str) -> dict[str, Any]:
    each = bug(name)
    return {
        "name": name,
        "title": each.title,
        "kind": each.kind.value,
        "commit": each.commit,
        "invariant": each.invariant,
        "breaks": each.breaks,
    }


def _shown_object(what: Shown) -> dict[str, Any]:
    return {
        "holds": what.holds,
        "findings": [finding_object(each) for each in what.findings],
        "steps": [step_object(each) for each in what.results],
        "left_out": what.steps + 1 - len(what.results),
    }


def _scenario(name: str) -> str:
    path = scenario_path(name)
    try:
        return path.read_text()
    except OSError as error:
        raise KlpemuError(f"cannot be read: {error.strerror}", where=shown(path)) from error


def _code(name: str) -> str:
    """The exhibit without its story, which is told already."""
    return source(name).split('"""', 2)[2].lstrip()
