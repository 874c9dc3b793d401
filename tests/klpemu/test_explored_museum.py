"""Bugs of order that `klpemu explore` finds: with how few preemptions, and that what it writes has them."""

from dataclasses import replace
from pathlib import Path

import pytest
from reproduced import reproduced

from klpemu.exploration import explore
from klpemu.explorer import Bounds
from klpemu.fixtures import fixture
from klpemu.scenario import Scenario
from klpemu.scenario_file import read_scenario

# Where each is found, and with how many preemptions at most.
FAST = {
    "missing-sync": ("explore-enable.toml", 0),
    "plain-store": ("explore-enable.toml", 0),
    "tail-first": ("explore-enable.toml", 0),
    "stale-target": ("explore-enable.toml", 0),
    "empty-reliable-stack": ("explore-reverse.toml", 0),
    "replaced-freed-early": ("explore-replace.toml", 0),
    "immediate-jump": ("museum/immediate-jump.toml", 0),
    "stack-before-transition": ("explore-steps.toml", 0),
    "transition-before-state": ("explore-disable.toml", 0),
    "nops-first": ("explore-replace.toml", 0),
    "ops-freed-early": ("explore-unregister.toml", 0),
    "fork-between": ("explore-fork.toml", 1),
}
SLOW = {
    "shadow-one-look": ("explore-shadow.toml", 1),
    "int3-as-nop": ("explore-tracer.toml", 2),
}
FOUND = FAST | SLOW
EVERY = [*FAST, *(pytest.param(bug, marks=pytest.mark.slow) for bug in SLOW)]


def _scenario(bug: str) -> Scenario:
    return replace(read_scenario(fixture(FOUND[bug][0])), variants=(f"museum:{bug}",))


@pytest.mark.parametrize("bug", EVERY)
def test_a_bug_is_found_and_the_scenario_that_is_written_reproduces_it(bug: str, tmp_path: Path) -> None:
    _, preemptions = FOUND[bug]
    explored = explore(_scenario(bug), Bounds(preemptions))
    assert explored.failure is not None
    assert explored.failure.preemptions <= preemptions
    assert reproduced(explored, tmp_path) == explored.failure.findings


@pytest.mark.parametrize("file", sorted({file for file, _ in FOUND.values()}))
def test_without_a_bug_the_scenario_holds(file: str) -> None:
    assert explore(read_scenario(fixture(file)), Bounds(0)).holds


@pytest.mark.parametrize("bug", ["fork-between", pytest.param("shadow-one-look", marks=pytest.mark.slow)])
def test_no_schedule_with_fewer_preemptions_than_the_one_reported_fails(bug: str) -> None:
    failure = explore(_scenario(bug), Bounds(2)).failure
    assert failure is not None
    assert failure.preemptions > 0
    every = explore(_scenario(bug), Bounds(failure.preemptions - 1), reduce=False)
    assert every.holds
    assert every.runs == sum(every.schedules)
