"""One process's part of a campaign: sequences made, performed, kept if they reach something new, and shrunk.

Most sequences vary an entry of the corpus.  Several variations that have a beginning in common are run one
after the other from a restore point behind that beginning, if nobody is in the middle of a service there.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from klpemu.fuzz.corpus import Corpus
from klpemu.fuzz.grammar import Grammar
from klpemu.fuzz.replay import replayed
from klpemu.fuzz.sequence_runner import Prefix, Run, SequenceRunner
from klpemu.fuzz.shrink import shrunk
from klpemu.scenario import Action, Scenario, Step

__all__ = ["Found", "Search", "Tally"]

FRESH = 0.6  # of all batches, those that are one sequence from nothing
BATCH = 8  # variations behind one restore point
TAILS = (0, 0, 1, 1, 2, 3, 5, 8, 13)  # how many steps at the end of an entry are varied
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
    states: set[int] = field(default_factory=set)
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
        self._seed, self._job = f"{seed}/{job}", f"{seed}-{job}"
        self._behind = corpus.runs_of(self._job)
        self._entries: list[tuple[Step, ...]] = []
        self._prefix: Prefix | None = None
        self._of: tuple[Step, ...] = ()
        self._left = 0
        self.read_corpus()

    def read_corpus(self) -> None:
        """Take in what older campaigns and other processes have found worth keeping."""
        for steps in self._corpus.unread():
            self._keep(self._runner.run(steps), write=False)

    def advance(self) -> Found | None:
        """One run; returns what it has found if nobody has found that before."""
        random_ = random.Random(f"{self._seed}/{self._behind + self.tally.runs}")
        if not self._left:
            self._next_batch(random_)
        self._left -= 1
        if self._prefix is not None:
            done = self._prefix.steps
            steps = self._grammar.varied(random_, self._of, len(done), most=2)
            run = self._runner.run(steps[len(done) :], self._prefix)
            executed = len(run.steps) - len(done)
        else:
            fresh = not self._of
            steps = self._grammar.sequence(random_) if fresh else self._grammar.varied(random_, self._of)
            run = self._runner.run(steps)
            executed = len(run.steps)
        self.tally.runs += 1
        self.tally.steps += len(run.steps)
        self.tally.executed += executed
        if not run.findings:
            self._keep(run, write=True)
            return None
        return self._found(run)

    def note_runs(self) -> None:
        """Write down how many runs there were: the next start goes on behind them."""
        self._corpus.note_runs(self._job, self._behind + self.tally.runs)

    def _next_batch(self, random_: random.Random) -> None:
        """Choose what the next variations vary, and where they begin to."""
        self._left, self._prefix, self._of = 1, None, ()
        if not self._entries or random_.random() < FRESH:
            return
        # The newest entries are varied most: they are where nobody has been.
        self._of = self._entries[-1 - int(len(self._entries) * random_.random() ** 3)]
        length = len(self._of) - random_.choice(TAILS)
        if length >= 2:
            self._prefix = self._runner.prefix(self._of[:length])
            self._left = BATCH if self._prefix is not None else 1

    def _keep(self, run: Run, *, write: bool) -> None:
        new = [each for each in run.covered if each not in self.tally.reached]
        if not new or run.findings:
            return
        self.tally.reached.update(new)
        self.tally.states.update(run.states)
        self._entries.append(tuple(replace(each, error="") for each in run.steps))
        self.tally.entries += write
        if write:
            self._corpus.add(self._scenario(run.steps))

    def _found(self, run: Run) -> Found | None:
        signature = run.signature
        if self._corpus.finding(signature).exists():
            return None
        left = SHRINKING

        def fails(steps: Sequence[Step]) -> bool:
            nonlocal left
            left -= 1
            return left >= 0 and self._runner.run(steps).signature == signature

        runs = self._behind + self.tally.runs
        steps = [replace(each, error="") for each in run.steps]
        if fails(steps):
            run = self._runner.run(shrunk(steps, fails))
        scenario = self._smaller(self._scenario(run.steps), signature)
        what = "\n".join(str(each) for each in run.findings)
        if not _shows(scenario, signature):
            what += "\nklpemu: the scenario alone does not show it: please report that, too"
        if self._corpus.report(signature, scenario, what) is None:
            return None
        self.tally.findings += 1
        return Found(signature, what, scenario, runs)

    def _scenario(self, steps: Sequence[Step]) -> Scenario:
        """The steps as a scenario of their own, with what they name."""
        named = {each.target for each in steps}
        tasks = {name for step in steps for name, _ in step.schedule} | named
        return replace(
            self._world,
            title="",
            steps=tuple(steps),
            patches={name: each for name, each in self._world.patches.items() if name in named},
            tasks={name: each for name, each in self._world.tasks.items() if name in tasks}
            or dict(list(self._world.tasks.items())[:1]),
        )

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


def _shows(scenario: Scenario, signature: str) -> bool:
    """Performed alone, on a kernel that was just booted, it has the finding."""
    return any(f" {signature}: " in each for each in replayed(scenario))
