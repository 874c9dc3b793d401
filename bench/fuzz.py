"""What a campaign costs and finds: runs a second, two cores, beside Hypothesis, and the museum's bugs.

`python -m bench.fuzz` prints the table of bugs.
"""

import gc
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.measure import Result
from klpemu.fuzz.bounds import Bounds
from klpemu.fuzz.campaign import Campaign, Plan
from klpemu.fuzz.corpus import Corpus
from klpemu.fuzz.grammar import LENGTH, Grammar
from klpemu.fuzz.search import Found, Search
from klpemu.fuzz.sequence_runner import Stepper
from klpemu.fuzz.world import world_of
from klpemu.scenario import Scenario, Step
from patches.museum import NAMES
from patches.variants import variants

__all__ = ["bug_row", "found_in", "run"]

SECONDS = 20.0  # of CPU time, for each side of a comparison
SEEDS = 5
ROUND = 10  # runs that Hypothesis makes between two looks at the clock
RATE, SPEED_UP = 300.0, 1.8  # goals: runs a second on one core, and how many times as many on two
GOAL = 60.0  # CPU seconds in which a bug is to be found, median over the seeds
# Those that take longest to find (docs/museum.md): any search finds the others at once.
COMPARED = (
    "ops-per-func",
    "relocations-left",
    "sympos-zero-one",
    "shadow-one-look",
    "nops-for-ever",
    "nops-first",
    "replaced-freed-early",
    "int3-as-nop",
    "fork-between",
)


def run() -> Iterator[Result]:
    """Runs a second on one core, the speed-up on two, and a plain state machine beside it."""
    search, seconds = _searched(_world(), SECONDS, 0)
    tally = search.tally
    yield Result("fuzz", "runs a second on one core", tally.runs / seconds, "runs/s")
    yield Result("fuzz", "steps of a run", tally.steps / tally.runs, "steps")
    yield Result("fuzz", "steps of a run that were not shared", tally.executed / tally.runs, "steps")
    yield Result("fuzz", "time of a run", 1e3 * seconds / tally.runs, "ms", goal=1e3 / RATE)
    began = time.process_time()
    plain, _ = _plain(_world(), SECONDS)
    rate = plain / (time.process_time() - began)
    yield Result("fuzz", "the same by Hypothesis' RuleBasedStateMachine", rate, "runs/s")
    one, two = (_campaign(jobs) for jobs in (1, 2))
    yield Result("fuzz", "time of a run on two cores, of that on one", one / two, "ratio", goal=1 / SPEED_UP)
    ours = sum(found_in(bug, SECONDS, 0) is not None for bug in COMPARED)
    theirs = sum(_plain_finds(bug) for bug in COMPARED)
    yield Result("fuzz", f"of {len(COMPARED)} bugs found in {SECONDS:.0f} s each", ours, "bugs")
    yield Result("fuzz", "of these by the state machine", theirs, "bugs")


def found_in(bug: str, seconds: float, seed: int) -> tuple[Found, float] | None:
    """The first finding of one process from an empty corpus, and after how many CPU seconds it came."""
    world = _world(f"museum:{bug}")
    with variants(world.variants), tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        search = Search(world, Corpus(Path(folder)), seed)
        while time.process_time() - began < seconds:
            found = search.advance()
            if found is not None:
                return found, time.process_time() - began
    return None


def bug_row(bug: str, seconds: float = 4 * GOAL, seeds: int = SEEDS) -> str:
    """One line of the table: how many seeds found the bug, and medians, to which a seed that did not find it
    counts as one that would have taken for ever.
    """
    tried = [found_in(bug, seconds, seed) for seed in range(seeds)]
    found = [each for each in tried if each is not None]
    counted = f"{bug:24} {len(found)} of {seeds}"
    never = [math.inf] * (seeds - len(found))
    runs = statistics.median([*(each.runs for each, _ in found), *never])
    took = statistics.median([*(seconds for _, seconds in found), *never])
    if math.isinf(took):
        return counted
    steps = statistics.median(len(each.scenario.steps) for each, _ in found)
    names = ", ".join(sorted({each.signature for each, _ in found}))
    return f"{counted} {runs:8.0f} runs {took:8.1f} s {steps:4.0f} steps  {names}"


def _world(*bugs: str) -> Scenario:
    return world_of(None, None, None, "qemu64", (), (), bugs)


def _searched(world: Scenario, seconds: float, seed: int) -> tuple[Search, float]:
    """A search without bugs, and the CPU seconds that it took."""
    with tempfile.TemporaryDirectory() as folder:
        search = Search(world, Corpus(Path(folder)), seed)
        gc.collect()  # from here on as in a process of a campaign
        gc.disable()
        began = time.process_time()
        while time.process_time() - began < seconds:
            search.advance()
        took = time.process_time() - began
        gc.enable()
        return search, took


def _campaign(jobs: int) -> float:
    """Runs a second of a campaign of so many processes."""
    with tempfile.TemporaryDirectory() as folder:
        return Campaign(Plan(_world(), Path(folder), jobs=jobs, seconds=SECONDS)).run().rate


class _Over(Exception):  # noqa: N818
    """Something was found."""


def _plain(world: Scenario, seconds: float) -> tuple[int, bool]:
    """Runs of a RuleBasedStateMachine over the same operations and checks in so many CPU seconds, and whether
    one of them has found something, with which it ends.

    A run boots a kernel of its own, as one writes it without restore points.
    """
    from hypothesis import HealthCheck, Phase, settings  # only here: what is measured does not need it
    from hypothesis import strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

    grammar, began, runs = Grammar(world), time.process_time(), 0

    class Sequences(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            nonlocal runs
            runs += 1
            self.stepper = Stepper(world, Bounds())
            self.steps: list[Step] = []

        @rule(number=st.integers(0, 1 << 32))
        def step(self, number: int) -> None:
            done, findings = self.stepper.attempt(
                grammar.step(random.Random(number), self.steps), thorough=True
            )
            self.steps.append(done)
            if findings:
                raise _Over

    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    options = settings(
        max_examples=ROUND,
        stateful_step_count=LENGTH,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=checks,
        report_multiple_bugs=False,
    )
    try:
        while time.process_time() - began < seconds:
            run_state_machine_as_test(Sequences, settings=options)
    except _Over:
        return runs, True
    return runs, False


def _plain_finds(bug: str) -> bool:
    world = _world(f"museum:{bug}")
    with variants(world.variants):
        return _plain(world, SECONDS)[1]


def main() -> None:
    """Print the table, of the named bugs or of all."""
    for bug in sys.argv[1:] or NAMES:
        print(bug_row(bug), flush=True)


if __name__ == "__main__":
    main()
