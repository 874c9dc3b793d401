"""docs/explore.md: its tables are what explorations come to.

After a change that is meant, this file run with KLPEMU_UPDATE_DOCS=1 writes the tables anew.
"""

import os
import re
from dataclasses import replace

import pytest
from command_line import ROOT

from klpemu.exploration import Explored, explore
from klpemu.explorer import Bounds
from klpemu.fixtures import fixture
from klpemu.scenario_file import read_scenario

DOCUMENT = ROOT / "docs" / "explore.md"
SCENARIOS = ("enable", "disable", "replace", "reverse", "steps", "shadow")
BUGS = {
    "fork-between": "fork",
    "shadow-one-look": "shadow",
    "stack-before-transition": "steps",
    "transition-before-state": "disable",
    "int3-as-nop": "tracer",
}


def _explored(name: str, preemptions: int, *variants: str) -> Explored:
    scenario = read_scenario(fixture(f"explore-{name}.toml"))
    return explore(replace(scenario, variants=variants), Bounds(preemptions))


def _compare(name: str, row: str) -> None:
    """The row of the table that begins with `name` is this one."""
    text = DOCUMENT.read_text()
    found = re.search(rf"^\| `{re.escape(name)}` \|.*$", text, re.MULTILINE)
    if os.environ.get("KLPEMU_UPDATE_DOCS"):
        if found is None:
            head = "| scenario | sch" if name.endswith(".toml") else "| bug | sc"
            place = text.index("|\n", text.index("\n", text.index(head)) + 1) + 2
            text = text[:place] + row + "\n" + text[place:]
        else:
            text = text.replace(found[0], row)
        DOCUMENT.write_text(text)
        return
    assert found is not None
    assert found[0] == row


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_row_of_a_scenario_is_what_its_exploration_comes_to(name: str) -> None:
    explored = _explored(name, 1)
    assert explored.holds
    numbers = (round(explored.schedules[-1]), explored.runs, explored.merged, explored.left_out)
    file = f"explore-{name}.toml"
    _compare(file, f"| `{file}` | {' | '.join(f'{each:,}' for each in numbers)} |")


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_the_row_of_a_bug_is_what_finds_it(bug: str) -> None:
    name = BUGS[bug]
    failure = (explored := _explored(name, 2, f"museum:{bug}")).failure
    assert failure is not None
    runs = explored.runs + explored.merged
    _compare(bug, f"| `{bug}` | `explore-{name}.toml` | {failure.preemptions} | {runs:,} |")


def test_every_scenario_and_every_bug_that_was_explored_has_a_row() -> None:
    text = DOCUMENT.read_text()
    for name in (*(f"explore-{each}.toml" for each in SCENARIOS), *BUGS):
        assert f"| `{name}` |" in text
