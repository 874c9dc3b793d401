"""Campaigns of several processes."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from elf.errors import KlpemuError
from klpemu.fuzz.campaign import Campaign, Plan, State
from klpemu.fuzz.corpus import Corpus
from klpemu.fuzz.world import world_of
from klpemu.scenario_file import read_scenario


def plan(folder: Path, *bugs: str, runs: int | None = None, jobs: int = 1) -> Plan:
    world = world_of(None, None, None, "qemu64", (), (), bugs)
    return Plan(world, folder, runs=runs, jobs=jobs)


def test_the_jobs_do_the_runs_together(tmp_path: Path) -> None:
    state = Campaign(plan(tmp_path, runs=7, jobs=2)).run()
    assert state.runs == 7
    assert state.steps >= state.executed > 0
    assert state.covered > state.states + state.edges
    assert state.states > 0
    assert state.edges > 0
    assert not state.found
    assert not state.lost


def test_what_a_job_finds_the_campaign_tells(tmp_path: Path) -> None:
    state = Campaign(plan(tmp_path, "museum:missing-sync", runs=10)).run()
    assert [each.signature for each in state.found] == ["every_fetch_is_an_instruction"]


def test_a_campaign_can_be_stopped(tmp_path: Path) -> None:
    campaign = Campaign(plan(tmp_path, jobs=2))

    def watch(state: State) -> None:
        if state.runs:
            campaign.stop()

    state = campaign.run(watch)
    assert state.runs
    assert not state.lost


def test_what_a_process_was_performing_when_it_died_is_a_finding(tmp_path: Path) -> None:
    campaign = Campaign(plan(tmp_path))

    def watch(state: State) -> None:
        if state.runs:
            for each in multiprocessing.active_children():
                os.kill(each.pid or 0, signal.SIGSEGV)

    state = campaign.run(watch)
    assert state.lost == ["the_process_survives: a process ended with status -11"]
    (path,) = Corpus(tmp_path).findings()
    assert path.stem == "the_process_survives"
    assert read_scenario(path).steps


def test_what_is_wrong_with_a_world_is_told(tmp_path: Path) -> None:
    with pytest.raises(KlpemuError, match="no variant is called"):
        plan(tmp_path, "no_such_variant")
