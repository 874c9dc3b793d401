"""A scenario under all its schedules: nothing is missed by what is left out, and bugs are found."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reproduced import reproduced

from emu.machine import Machine
from klpemu.exploration import Progress, explore
from klpemu.explorer import Bounds
from klpemu.fixtures import fixture
from klpemu.scenario import Scenario
from klpemu.scenario_file import read_scenario

TWO_TASKS = """
cpus = 2
[[task]]
name = "one"
cpu = 0
program = ["nap(1)", "area_of(1, 2)"]
[[task]]
name = "two"
cpu = 1
program = ["area_of(3, 4)", "nap(2)"]
[[step]]
run = "12 ms"
"""


def _scenario(name: str, *variant: str) -> Scenario:
    return replace(read_scenario(fixture(f"explore-{name}.toml")), variants=variant)


@pytest.fixture
def two_tasks(tmp_path: Path) -> Scenario:
    path = tmp_path / "two.toml"
    path.write_text(TWO_TASKS)
    return read_scenario(path)


def memory_and_log(machine: Machine) -> Any:
    memory = b"".join(machine.space.arena.bytes[at.start : at.stop] for at in machine.space.arena.in_use())
    return hashlib.sha256(memory).hexdigest(), tuple(machine.log.lines)


def test_with_and_without_reduction_runs_come_to_the_same(two_tasks: Scenario) -> None:
    reduced = explore(two_tasks, Bounds(1), final_state=memory_and_log)
    every = explore(two_tasks, Bounds(1), reduce=False, final_state=memory_and_log)
    assert reduced.final_states == every.final_states
    assert len(every.final_states) > 1
    assert reduced.schedules == every.schedules
    assert reduced.runs < every.runs == sum(every.schedules)


@pytest.mark.slow
def test_with_two_preemptions_too_runs_come_to_the_same(two_tasks: Scenario) -> None:
    reduced = explore(two_tasks, Bounds(2), final_state=memory_and_log)
    every = explore(two_tasks, Bounds(2), reduce=False, final_state=memory_and_log)
    assert reduced.final_states == every.final_states
    assert reduced.schedules == every.schedules
    assert reduced.runs < every.runs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shadow", "reverse"])
def test_with_and_without_reduction_scenarios_come_to_the_same(name: str) -> None:
    reduced = explore(_scenario(name), Bounds(1), final_state=memory_and_log)
    every = explore(_scenario(name), Bounds(1), reduce=False, final_state=memory_and_log)
    assert reduced.final_states == every.final_states
    assert reduced.runs < every.runs
    assert reduced.holds
    assert every.holds


def test_what_an_exploration_finds_is_the_same_each_time(two_tasks: Scenario) -> None:
    assert explore(two_tasks, Bounds(1)) == explore(two_tasks, Bounds(1))


def test_a_fork_between_flag_and_state_is_found_with_one_preemption(tmp_path: Path) -> None:
    explored = explore(_scenario("fork", "museum:fork-between"), Bounds(2))
    assert explored.failure is not None
    assert explored.failure.preemptions == 1
    assert "tasks_are_settled" in explored.failure.findings[0]
    assert reproduced(explored, tmp_path) == explored.failure.findings


@pytest.mark.slow
def test_a_shadow_variable_allocated_twice_is_found_with_one_preemption(tmp_path: Path) -> None:
    explored = explore(_scenario("shadow", "museum:shadow-one-look"), Bounds(2))
    assert explored.failure is not None
    assert explored.failure.preemptions == 1
    assert reproduced(explored, tmp_path) == explored.failure.findings


def test_a_run_that_does_not_end_is_a_finding(two_tasks: Scenario) -> None:
    explored = explore(two_tasks, Bounds(0, picks=20))
    assert explored.failure is not None
    assert explored.failure.findings[0].startswith("the_run_ends")


def test_a_step_that_fails_is_a_finding(tmp_path: Path) -> None:
    path = tmp_path / "fails.toml"
    path.write_text(TWO_TASKS + '[[step]]\nforce = "none"\n')
    with pytest.raises(Exception, match="none"):
        read_scenario(path)
    path.write_text(TWO_TASKS + '[[step]]\ncall = "no_such_function()"\n')
    explored = explore(read_scenario(path), Bounds(0))
    assert explored.failure is not None
    assert explored.failure.findings[0].startswith("the_step_succeeds: call no_such_function()")


def test_an_exploration_ends_after_as_many_runs_as_it_may_make(two_tasks: Scenario) -> None:
    explored = explore(two_tasks, Bounds(1, runs=5))
    assert (explored.runs + explored.merged, explored.stopped) == (5, "after 5 runs")
    assert explored.holds
    assert len(explored.schedules) == 1  # those with a preemption were not explored to the end


def test_an_exploration_that_is_told_to_stop_says_what_it_has_done(two_tasks: Scenario) -> None:
    seen: list[Progress] = []

    def progress(now: Progress) -> bool:
        seen.append(now)
        return now.runs < 4

    explored = explore(two_tasks, Bounds(1), progress=progress)
    assert explored.stopped == "interrupted"
    assert 4 <= explored.runs + explored.merged < 40
    assert seen[0].runs == 0
