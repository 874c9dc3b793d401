"""What the search finds, and that it finds nothing where nothing is wrong."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from klpemu.fuzz.corpus import Corpus
from klpemu.fuzz.replay import replay, replayed
from klpemu.fuzz.search import Found, Search
from klpemu.fuzz.shrink import preemptions
from klpemu.fuzz.world import world_of
from klpemu.scenario import Action, Scenario, Step
from klpemu.step_runner import StepRunner
from patches.museum import NAMES
from patches.variants import variants


def search(folder: Path, bug: str, runs: int, seed: int = 1) -> Found | None:
    """The first finding of one process from an empty corpus."""
    world = world_of(None, None, None, "qemu64", (), (), [bug] if bug else [])
    with variants(world.variants):
        found = Search(world, Corpus(folder), seed)
        for _ in range(runs):
            each = found.advance()
            if each is not None:
                return each
    return None


def without_one(scenario: Scenario) -> list[Scenario]:
    """The scenario without one step, or without one preemption, for each of them."""
    steps = list(scenario.steps)
    fewer = [[*steps[:at], *steps[at + 1 :]] for at in range(len(steps))]
    for at, step in enumerate(steps):
        groups = preemptions(step)
        for left_out in range(len(groups)):
            turns = [
                turn for index, (turn, times) in enumerate(groups) if index != left_out for _ in range(times)
            ]
            fewer.append([*steps[:at], replace(step, schedule=tuple(turns)), *steps[at + 1 :]])
    return [replace(scenario, steps=tuple(replace(each, error="") for each in rest)) for rest in fewer]


EASY = ["missing-sync", "plain-store", "tail-first", "return-not-rebased"]
RACES = ["shadow-one-look", "int3-as-nop"]


@pytest.mark.parametrize("bug", [*EASY, *RACES])
def test_the_search_finds_a_bug_and_its_reproducer_is_minimal(bug: str, tmp_path: Path) -> None:
    for seed in (3, 1, 2):  # a race is a matter of luck, which changes with every rule of the grammar
        found = search(tmp_path / str(seed), f"museum:{bug}", 1500, seed)
        if found is not None:
            break
    assert found is not None
    (path,) = Corpus(tmp_path / str(seed)).findings()
    shown = replay(path)
    assert any(f" {found.signature}: " in each for each in shown)
    for fewer in without_one(found.scenario):
        assert not any(f" {found.signature}: " in each for each in replayed(fewer))
    assert replayed(replace(found.scenario, variants=())) == []


def test_the_test_beside_a_finding_fails(tmp_path: Path) -> None:
    assert search(tmp_path, "museum:missing-sync", 20) is not None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    result = subprocess.run(
        [*command, str(tmp_path / "findings")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1, result.stdout
    assert "1 failed" in result.stdout
    assert "every_fetch_is_an_instruction" in result.stdout


@pytest.mark.parametrize("seed", [2, 3])
def test_without_a_bug_nothing_is_found_in_minutes(seed: int, tmp_path: Path) -> None:
    """Together the runs of three minutes, at fifty a second."""
    assert search(tmp_path, "", 4500, seed) is None


WORLD_WITH_A_TASK_FROM_THE_START = """
cpus = 2
modules = ["builtin:shadow.o"]
[[patch]]
name = "fix_area"
code = "builtin:fix_area.o"
objects.vmlinux = [{ old = "area_of", new = "fixed_area_of" }]
[[task]]
name = "attacher"
program = ["attach(8, 7)"]
[[step]]
call = "measure(3, 4)"
returns = 99
"""


def test_what_a_task_needs_is_not_left_out_of_a_finding(tmp_path: Path) -> None:
    """A smaller scenario that does not even boot shows nothing."""
    path = tmp_path / "world.toml"
    path.write_text(WORLD_WITH_A_TASK_FROM_THE_START)
    world = world_of(path, None, None, "qemu64", (), (), ["museum:missing-sync"])
    with variants(world.variants):
        found_ = Search(world, Corpus(tmp_path / "corpus"), 1)
        found = next(each for each in (found_.advance() for _ in range(20)) if each is not None)
    assert found.scenario.modules
    assert any(" every_fetch_is_an_instruction: " in each for each in replayed(found.scenario))


def test_what_a_world_expects_of_its_steps_is_not_expected_in_a_sequence(tmp_path: Path) -> None:
    path = tmp_path / "world.toml"
    path.write_text(WORLD_WITH_A_TASK_FROM_THE_START)
    world = world_of(path, None, None, "qemu64", (), (), [])
    searched = Search(world, Corpus(tmp_path / "corpus"), 1)
    assert all(searched.advance() is None for _ in range(20))
    for entry in (tmp_path / "corpus" / "entries").glob("*.toml"):
        assert replay(entry) == []


def test_a_defect_of_klpemu_is_a_finding_with_its_scenario(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(runner: StepRunner, step: Step) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setitem(StepRunner._operations, Action.FORCE, defect)
    searched = Search(world_of(None, None, None, "qemu64", (), (), []), Corpus(tmp_path), 1)
    runs = (searched.advance() for _ in range(200))
    found = next((each for each in runs if each is not None), None)
    assert found is not None
    assert found.signature == "the_step_succeeds"
    assert "ZeroDivisionError: a defect" in found.what


def test_a_finding_that_is_known_is_not_reported_again(tmp_path: Path) -> None:
    assert search(tmp_path, "museum:plain-store", 20) is not None
    assert search(tmp_path, "museum:plain-store", 5) is None


def test_the_next_start_goes_on_where_the_last_one_was(tmp_path: Path) -> None:
    world = world_of(None, None, None, "qemu64", (), (), [])
    first = Search(world, Corpus(tmp_path), 3)
    for _ in range(4):
        first.advance()
    first.note_runs()
    entries = {path.name for path in (tmp_path / "entries").iterdir()}
    assert entries
    second = Search(world, Corpus(tmp_path), 3)
    assert second.tally.reached == first.tally.reached
    second.advance()
    second.note_runs()
    assert Corpus(tmp_path).runs_of("3-0") == 5


def test_an_entry_of_ones_own_is_performed_to_know_what_it_reaches(tmp_path: Path) -> None:
    world = world_of(None, None, None, "qemu64", (), (), [])
    first = Search(world, Corpus(tmp_path), 3)
    for _ in range(4):
        first.advance()
    for each in (tmp_path / "entries").glob("*.reached"):
        each.unlink()
    second = Search(world, Corpus(tmp_path), 3)
    assert second.tally.reached == first.tally.reached


@pytest.mark.slow
@pytest.mark.parametrize("bug", NAMES)
def test_bugs_of_the_museum_are_found_from_an_empty_corpus(bug: str, tmp_path: Path) -> None:
    """With three of five seeds, at the least; python -m bench.fuzz says how long it takes."""
    found = [search(tmp_path / str(seed), f"museum:{bug}", 5000, seed) for seed in range(5)]
    assert sum(each is not None for each in found) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 12))
def test_without_a_bug_nothing_is_found_in_an_hour(seed: int, tmp_path: Path) -> None:
    """Together the runs of an hour, at fifty a second."""
    assert search(tmp_path, "", 22_500, seed) is None
