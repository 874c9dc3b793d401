"""docs/explore.md: its tables are what explorations come to.

After a change that is meant, this file run with KLPEMU_UPDATE_DOCS=1 writes the tables anew.  The last
column, CPU seconds of all processes, is written and never compared.
"""

import os
import re
from dataclasses import replace

import pytest
from command_line import ROOT
from test_explored_museum import FOUND

from klpemu.exploration import Explored, explore
from klpemu.explorer import Bounds
from klpemu.fixtures import fixture
from klpemu.scenario_file import read_scenario

DOCUMENT = ROOT / "docs" / "explore.md"
SCENARIOS = ("enable", "disable", "replace", "reverse", "steps", "shadow")


def _explored(file: str, preemptions: int, *variants: str) -> tuple[Explored, float]:
    before = sum(os.times()[:4])
    scenario = replace(read_scenario(fixture(file)), variants=variants)
    explored = explore(scenario, Bounds(preemptions))
    return explored, sum(os.times()[:4]) - before


def _compare(key: str, numbers: tuple[int, ...], seconds: float) -> None:
    """The row that begins with `key` has these numbers."""
    row = f"{key} {' | '.join(f'{each:,}' for each in numbers)} |"
    text = DOCUMENT.read_text()
    found = re.search(rf"^{re.escape(key)}.*$", text, re.MULTILINE)
    assert found is not None, f"docs/explore.md has no row {key}"
    if os.environ.get("KLPEMU_UPDATE_DOCS"):
        DOCUMENT.write_text(text.replace(found[0], f"{row} {seconds:.1f} |"))
    else:
        assert found[0].rsplit(" ", 2)[0] == row


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_row_of_a_scenario_is_what_its_exploration_comes_to(name: str) -> None:
    explored, seconds = _explored(f"explore-{name}.toml", 1)
    assert explored.holds
    numbers = (round(explored.schedules[-1]), explored.runs, explored.merged, explored.left_out)
    _compare(f"| `explore-{name}.toml` | 1 |", numbers, seconds)


@pytest.mark.slow
@pytest.mark.parametrize("bug", FOUND)
def test_the_row_of_a_bug_is_what_finds_it(bug: str) -> None:
    file, preemptions = FOUND[bug]
    explored, seconds = _explored(file, preemptions, f"museum:{bug}")
    assert explored.failure is not None
    numbers = (explored.failure.preemptions, explored.runs + explored.merged)
    _compare(f"| `{bug}` | `{file}` |", numbers, seconds)


def test_every_scenario_and_every_bug_that_was_explored_has_a_row() -> None:
    text = DOCUMENT.read_text()
    for name in (*(f"explore-{each}.toml" for each in SCENARIOS), *FOUND):
        assert f"| `{name}` |" in text
