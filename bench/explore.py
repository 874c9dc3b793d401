"""Exploring: schedules a second, and how many runs stand for all of them.

A call while a transition is reversed.  All its schedules with at most one preemption are run without
reduction and with it, on one core.
"""

import time
from collections.abc import Iterator
from dataclasses import replace

from bench.measure import Result
from klpemu.exploration import Explored, explore
from klpemu.explorer import Bounds
from klpemu.fixtures import fixture
from klpemu.scenario_file import read_scenario

__all__ = ["run"]

SCENARIO = "explore-reverse.toml"
PREEMPTIONS = 1


def run() -> Iterator[Result]:
    """Runs a second of both sides, and two ratios."""
    every, every_seconds = _timed(reduce=False)
    reduced, seconds = _timed(reduce=True)
    yield Result("explore", "every schedule", every.runs / every_seconds, "runs/s")
    yield Result("explore", "reduced", (reduced.runs + reduced.merged) / seconds, "runs/s")
    runs = (reduced.runs + reduced.merged) / every.runs
    yield Result("explore", "reduced: runs of all schedules", runs, "ratio", goal=0.5)
    yield Result("explore", "reduced: time of all schedules", seconds / every_seconds, "ratio")


def _timed(*, reduce: bool) -> tuple[Explored, float]:
    scenario = replace(read_scenario(fixture(SCENARIO)), title="")
    began = time.perf_counter()
    explored = explore(scenario, Bounds(PREEMPTIONS), reduce=reduce)
    return explored, time.perf_counter() - began
