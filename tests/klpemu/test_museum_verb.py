"""`klpemu museum`, and docs/museum.md, whose table is what the exhibits say.

After a change that is meant, this file run with KLPEMU_UPDATE_DOCS=1 writes the table anew.
"""

import os
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
from command_line import ROOT, klpemu

from klpemu import museum
from patches.museum import NAMES, Bug, bug

DOCUMENT = ROOT / "docs" / "museum.md"
HEAD = r"^\| bug \| what it is \| how far \| commit \| found by \|\n\|---\|---\|---\|---\|---\|\n"
TABLE = re.compile(f"(?<={HEAD.removeprefix('^')})(?:\\|.*\n)+")


def row(name: str) -> str:
    each = bug(name)
    return f"| `{name}` | {each.title} | {each.kind.value} | {each.commit} | `{each.invariant}` |\n"


def test_the_table_in_the_documentation_is_that_of_the_exhibits() -> None:
    text, table = DOCUMENT.read_text(), "".join(map(row, NAMES))
    if os.environ.get("KLPEMU_UPDATE_DOCS"):
        DOCUMENT.write_text(TABLE.sub(lambda _: table, text))
        return
    found = TABLE.search(text)
    assert found is not None
    assert found[0] == table


@pytest.mark.parametrize("arguments", [("museum",), ("museum", "list")])
def test_the_list_has_every_bug_with_its_commit_and_its_invariant(arguments: tuple[str, ...]) -> None:
    outcome = klpemu(*arguments)
    assert outcome.status == 0
    for name in NAMES:
        for text in (name, bug(name).title, bug(name).commit, bug(name).invariant):
            assert text in outcome.out


def test_the_list_as_json() -> None:
    listed = klpemu("museum", "list", "--json").object
    assert (listed["schema"], listed["verb"]) == (1, "museum list")
    assert [each["name"] for each in listed["bugs"]] == list(NAMES)
    assert set(listed["bugs"][0]) == {"name", "title", "kind", "commit", "invariant", "breaks"}


def test_a_bug_is_shown_with_its_story_its_scenario_and_its_code() -> None:
    outcome = klpemu("museum", "show", "fork-between")
    assert outcome.status == 0
    for text in (
        "A child could have the flag of one moment",
        '747f7a290117 ("livepatch: fix race between fork and KLP transition") (in v6.1)',
        "builtin:museum/fork-between.toml",
        'schedule = ["parent*3", "init*5000"]',
        "def klp_copy_process(klp: Klp, child: int, parent: int) -> None:",
    ):
        assert text in outcome.out
    shown = klpemu("museum", "show", "fork-between", "--json").object
    assert shown["story"].startswith("A child could have the flag")
    assert shown["scenario"].startswith("# The parent has copied")
    assert "klp_copy_process" in shown["code"]


def test_a_run_shows_both_and_is_right_if_only_the_one_with_the_bug_finds_it() -> None:
    outcome = klpemu("museum", "run", "nops-for-ever")
    assert outcome.status == 0, outcome.err
    without, with_bug = outcome.out.split("nops-for-ever, with the bug")
    assert "klpemu:" not in without
    assert "func_stack is [nop], expected []" in with_bug
    assert with_bug.endswith(
        "func_stacks_hold_the_patches finds nops-for-ever; nothing is found without it\n"
    )


def test_a_run_as_json() -> None:
    ran = klpemu("museum", "run", "--json", "ops-per-func").object
    (each,) = ran["bugs"]
    assert (ran["holds"], each["right"], each["without"]["holds"]) == (True, True, True)
    assert not each["with"]["holds"]
    assert each["with"]["left_out"] == 4
    assert [finding["invariant"] for finding in each["with"]["findings"]] == ["the_step_succeeds"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bug": nullcontext}, "func_stacks_hold_the_patches does not find nops-for-ever"),
        ({"invariant": "heap_is_intact"}, "heap_is_intact does not find nops-for-ever"),
        ({"fixed": bug("nops-for-ever").bug}, "the scenario does not hold without nops-for-ever"),
    ],
)
def test_a_museum_that_is_wrong_is_reported(
    change: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(name: str) -> Bug:
        return replace(bug(name), **change)  # type: ignore[arg-type]  # one field, of its own type

    monkeypatch.setattr(museum, "bug", changed)
    monkeypatch.setattr("klpemu.verbs.museum.bug", changed)
    outcome = klpemu("museum", "run", "nops-for-ever")
    assert outcome.status == 1
    assert outcome.out.endswith(f"{said}\n")


def test_a_bug_that_does_not_exist_is_bad_usage() -> None:
    outcome = klpemu("museum", "run", "nops-forever")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err == "klpemu: the museum has no bug 'nops-forever'; did you mean nops-for-ever?\n"
