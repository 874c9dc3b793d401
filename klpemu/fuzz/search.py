"""One process's part of a campaign: sequences made, performed, kept if they reach something new, and shrunk.

The sequences are a tree.  Most of them go a step or two on from a restore point, behind which several ways to
go on are tried; the last one is the trunk of the next branches.  Where a run reaches something new, a restore
point stays, and the search comes back to it.  Some sequences are made from nothing, and some vary an older
one in the middle: these are performed from the boot.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from elf.errors import KlpemuError
from klpemu.fuzz.corpus import Corpus
from klpemu.fuzz.coverage import OPERATION, STATE, counted
from klpemu.fuzz.grammar import LENGTH, Grammar
from klpemu.fuzz.points import Points
from klpemu.fuzz.replay import replayed
from klpemu.fuzz.sequence_runner import Prefix, Run, SequenceRunner
from klpemu.fuzz.shrink import shrunk
from klpemu.scenario import Action, Scenario, Step

__all__ = ["Found", "Search", "Tally", "name_of", "scenario_of"]

# Of the steps that are executed, those of sequences from nothing, and of variations of older sequences.
FRESH, VARIED = 0.4, 0.1
BRANCHES = 8  # sequences that go on from one restore point
# How often these are one operation under as many schedules: with tasks beside it, and without.
RACES, ALONE = 0.5, 0.1
LONGER = 0.25  # of them, how many take one more step, and of these how many another one
POINTS = 256 << 20  # bytes of guest memory in restore points
SHRINKING = 4000  # runs, at most, to make one sequence small


@dataclass(frozen=True, slots=True)
class Found:
    """A finding: what does not hold, its minimal scenario, and after how many runs of this process."""

    signature: str
    what: str
    scenario: Scenario
    runs: int


@dataclass(slots=True)
class Tally:
    """What was done so far: runs, their steps, those that were really executed, and what was reached."""

    runs: int = 0
    steps: int = 0
    executed: int = 0
    reached: set[int] = field(default_factory=set)
    entries: int = 0
    findings: int = 0


class Search:
    """Searches in one world, beside others that use the same corpus; `job` is the number of this one.

    What the next run is follows from the seed, the job, the number of the run and the corpus.
    """

    def __init__(self, world: Scenario, corpus: Corpus, seed: int, job: int = 0) -> None:
        self.tally = Tally()
        self._world = world
        self._corpus = corpus
        self._grammar = Grammar(world)
        self._runner = SequenceRunner(world)
        self._seed, self._job = f"{seed}/{job}", name_of(seed, job)
        self._behind = corpus.runs_of(self._job)
        self._entries: list[tuple[Step, ...]] = []
        self._points = Points(POINTS)
        self._point: Prefix | None = None  # behind which the next sequences go on
        self._left = 0  # so many of them
        self._race: Step | None = None  # which operation, if all of them are one
        self._shown: list[Run] = []  # entries of somebody's own that have a finding
        self._fresh = self._varied = 0  # steps that were executed for such sequences
        self.read_corpus()

    def read_corpus(self) -> None:
        """Take in what older campaigns and other processes have found worth keeping, as far as it is of this
        world.
        """
        for steps, reached in self._corpus.unread():
            if not self._grammar.fits(steps):
                continue
            if reached:
                self._note(steps, reached)
                continue
            run = self._runner.run(steps)
            if run.findings:
                self._shown.append(run)
            self._keep(run, write=False)

    def advance(self) -> Found | None:
        """One run; returns what it has found if nobody has found that before."""
        if self._shown:
            self.tally.runs += 1
            return self._found(self._shown.pop())
        random_ = random.Random(f"{self._seed}/{self._behind + self.tally.runs}")
        if not self._left:
            self._point = self._next_point(random_)
            self._left = BRANCHES if self._point is not None else 1
            self._race = None
            if self._point is not None and random_.random() < _races(self._point.steps):
                self._race = self._grammar.raced(random_, self._point.steps)
        self._left -= 1
        run = self._from_boot(random_) if self._point is None else self._branch(random_, self._point)
        self.tally.runs += 1
        self.tally.steps += len(run.steps)
        if run.findings:
            return self._found(run)
        new = self._keep(run, write=True)
        if new or not self._left:
            self._stay(run, new=new)
        return None

    def _next_point(self, random_: random.Random) -> Prefix | None:
        """Where the next branches begin; None for the boot."""
        executed = self.tally.executed
        if self._fresh <= FRESH * executed or self._varied <= VARIED * executed:
            return None
        return self._points.choose(random_)

    def _from_boot(self, random_: random.Random) -> Run:
        """A sequence from nothing, or an entry with changes anywhere."""
        fresh = not self._entries or self._fresh * VARIED <= self._varied * FRESH
        if fresh:
            steps = self._grammar.sequence(random_)
        else:
            # The newest entries are varied most: they are where nobody has been.
            entry = self._entries[-1 - int(len(self._entries) * random_.random() ** 3)]
            steps = self._grammar.varied(random_, entry)
        self._note_under_way(steps)
        run = self._runner.run(steps)
        self.tally.executed += len(run.steps)
        self._fresh += len(run.steps) * fresh
        self._varied += len(run.steps) * (not fresh)
        return run

    def _branch(self, random_: random.Random, point: Prefix) -> Run:
        """A step or a few behind a restore point."""
        if self._race is not None:
            raced = self._grammar.scheduled(random_, point.steps, self._race)
            return self._go_on(point, [raced])
        count = 1
        while len(point.steps) + count < LENGTH and random_.random() < LONGER:
            count += 1
        return self._go_on(point, self._grammar.behind(random_, point.steps, count))

    def _go_on(self, point: Prefix, steps: Sequence[Step]) -> Run:
        self._note_under_way((*point.steps, *steps))
        run = self._runner.run(steps, point)
        self.tally.executed += len(run.steps) - len(point.steps)
        return run

    def _stay(self, run: Run, *, new: bool) -> None:
        """A restore point where a run has ended, if the machine is at rest there."""
        if len(run.steps) < LENGTH:
            point = self._runner.here(run)
            if point is not None:
                self._points.add(point, new=new)

    def note_runs(self) -> None:
        """Write down how many runs there were: the next start goes on behind them."""
        self._corpus.note_runs(self._job, self._behind + self.tally.runs)

    def _note_under_way(self, steps: Sequence[Step]) -> None:
        self._corpus.note_under_way(self._job, scenario_of(self._world, steps))

    def _keep(self, run: Run, *, write: bool) -> bool:
        """Remember a run that has reached something new; whether a state of the patch core is among it."""
        new = [each for each in run.covered if each not in self.tally.reached]
        if not new or run.findings:
            return False
        self._note(run.steps, new)
        self.tally.entries += write
        if write:
            self._corpus.add(scenario_of(self._world, run.steps), new)
        return bool(counted(new, STATE) or counted(new, OPERATION))

    def _note(self, steps: Sequence[Step], reached: Sequence[int]) -> None:
        self.tally.reached.update(reached)
        self._entries.append(tuple(replace(each, error="") for each in steps))

    def _found(self, run: Run) -> Found | None:
        signature = run.signature
        if self._corpus.finding(signature).exists():
            return None
        left = SHRINKING

        def fails(steps: Sequence[Step]) -> bool:
            nonlocal left
            left -= 1
            return left >= 0 and self._runner.run(steps).shows(signature)

        runs = self._behind + self.tally.runs
        steps = [replace(each, error="") for each in run.steps]
        if fails(steps):
            run = self._runner.run(shrunk(steps, fails))
        scenario = self._smaller(scenario_of(self._world, run.steps), signature)
        what = "\n".join(str(each) for each in run.findings)
        if not _shows(scenario, signature):
            what += "\nklpemu: the scenario alone does not show it: please report that, too"
        if self._corpus.report(signature, scenario, what) is None:
            return None
        self.tally.findings += 1
        return Found(signature, what, scenario, runs)

    def _smaller(self, scenario: Scenario, signature: str) -> Scenario:
        """Without tasks and modules, as far as it still shows the finding."""
        simpler: list[dict[str, object]] = [{"modules": ()}]
        if not any(each.action is Action.SPAWN for each in scenario.steps):
            simpler.append({"tasks": {}})
        for each in simpler:
            candidate = replace(scenario, **each)  # type: ignore[arg-type]  # each is a member's new value
            if _shows(candidate, signature):
                scenario = candidate
        return scenario


def _races(before: Sequence[Step]) -> float:
    return RACES if any(each.action is Action.SPAWN for each in before) else ALONE


def _shows(scenario: Scenario, signature: str) -> bool:
    """Performed alone, on a kernel that was just booted, it has the finding; what does not boot has none."""
    try:
        return any(f" {signature}: " in each for each in replayed(scenario))
    except KlpemuError:
        return False


def name_of(seed: int, job: int) -> str:
    """The name of a job, by which its progress is written down."""
    return f"{seed}-{job}"


def scenario_of(world: Scenario, steps: Sequence[Step]) -> Scenario:
    """The steps as a scenario of their own, with what they name."""
    named = {each.target for each in steps}
    tasks = {name for step in steps for name, _ in step.schedule} | named
    return replace(
        world,
        title="",
        steps=tuple(steps),
        patches={name: each for name, each in world.patches.items() if name in named},
        tasks={name: each for name, each in world.tasks.items() if name in tasks}
        or dict(list(world.tasks.items())[:1]),
    )
