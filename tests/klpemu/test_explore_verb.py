"""`klpemu explore`."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import klpemu

from klpemu.fixtures import fixture

TWO_TASKS = """
title = "Two tasks"
cpus = 2
[[task]]
name = "one"
cpu = 0
program = ["area_of(1, 2)"]
[[task]]
name = "two"
cpu = 1
program = ["area_of(3, 4)"]
[[step]]
run = "4 ms"
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "two.toml"
    path.write_text(TWO_TASKS)
    return path


def test_it_says_how_many_schedules_there_are_and_that_all_hold(scenario: Path) -> None:
    outcome = klpemu("explore", str(scenario), "--preemptions", "1")
    assert outcome.status == 0
    assert outcome.out.startswith("Two tasks\n")
    assert "all schedules with at most 1 preemption hold" in outcome.out


def test_json_has_the_numbers(scenario: Path) -> None:
    found = klpemu("explore", str(scenario), "--preemptions", "1", "--json").object
    assert (found["verb"], found["holds"], found["complete"]) == ("explore", True, True)
    assert len(found["schedules"]) == 2
    assert found["failure"] is None


def test_a_schedule_that_fails_is_written_as_a_scenario_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "failing.toml"
    scenario = tmp_path / "wrong.toml"
    scenario.write_text(TWO_TASKS + '[[step]]\ncall = "area_of(3, 4)"\nreturns = 12\n')
    outcome = klpemu("explore", str(scenario), "--output", str(path))
    assert outcome.status == 1
    assert "does not hold with 0 preemptions, in step 'call area_of(3, 4)'" in outcome.out
    assert klpemu("run", str(path)).status == 1


def test_a_failing_scenario_finds_its_modules_wherever_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    shutil.copy(fixture("lamp.ko"), tmp_path / "here")
    scenario, path = tmp_path / "here" / "wrong.toml", tmp_path / "there" / "failing.toml"
    steps = '[[step]]\nload = "lamp.ko"\n[[step]]\ncall = "area_of(3, 4)"\nreturns = 12\n'
    scenario.write_text(TWO_TASKS + steps)
    assert klpemu("explore", str(scenario), "--preemptions", "0", "--output", str(path)).status == 1
    outcome = klpemu("run", str(path))
    assert outcome.status == 1, outcome.err


def test_a_folder_that_is_not_there_is_told_before_anything_is_run(scenario: Path, tmp_path: Path) -> None:
    outcome = klpemu("explore", str(scenario), "--output", str(tmp_path / "none" / "failing.toml"))
    assert outcome.status == 2
    assert outcome.err == f"klpemu: {tmp_path / 'none'}: no such folder; make it, or name another file\n"


def test_it_ends_after_as_many_runs_as_are_asked_for(scenario: Path) -> None:
    found = klpemu("explore", str(scenario), "--runs", "3", "--json").object
    assert found["runs"] + found["merged"] <= 4
    assert not found["complete"]


def test_a_scenario_that_cannot_be_read_is_bad_input(tmp_path: Path) -> None:
    outcome = klpemu("explore", str(tmp_path / "none.toml"))
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1


def test_ctrl_c_ends_it_with_what_was_done_so_far() -> None:
    command = [sys.executable, "-m", "klpemu", "explore", "builtin:explore-replace.toml"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        process.stderr.readline()  # the first line of progress
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped: interrupted; what was run holds" in out
    assert err.endswith("klpemu: interrupted\n")
