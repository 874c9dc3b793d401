"""A campaign: several processes that search in one world with one corpus, until there is enough of it.

Only when to stop may follow from the clock; what a run does never does.
"""

import gc
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

from elf.errors import KlpemuError
from klpemu.fuzz.corpus import Corpus
from klpemu.fuzz.coverage import EDGE, STATE, counted
from klpemu.fuzz.search import Found, Search, name_of
from klpemu.scenario import Scenario
from patches.variants import variants

__all__ = ["SURVIVES", "Campaign", "Plan", "State"]

SURVIVES: Final = "the_process_survives"

TELLING: Final = 0.25  # seconds between two messages of a process
READING: Final = 2.0  # and between two looks at what others have added to the corpus
COLLECTING: Final = 1000  # runs between two collections of garbage: each one leaves some 25 kB in cycles


@dataclass(frozen=True, slots=True)
class Plan:
    """What is searched, and how long: so many runs of all jobs together, so many seconds, or for ever."""

    world: Scenario
    corpus: Path
    seed: int = 0
    jobs: int = 1
    runs: int | None = None
    seconds: float | None = None


@dataclass(slots=True)
class State:
    """How far a campaign is; `covered` counts all that any job has reached, states and edges included."""

    runs: int = 0
    steps: int = 0
    executed: int = 0
    states: int = 0
    edges: int = 0
    covered: int = 0
    entries: int = 0
    found: list[Found] = field(default_factory=list)
    seconds: float = 0.0
    lost: list[str] = field(default_factory=list)  # what a process died of that did not end by itself
    refused: str = ""  # why a process could not go on: its world, or its corpus

    @property
    def rate(self) -> float:
        """Runs a second."""
        return self.runs / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class _Told:
    """What a process says of its part since it has last said something."""

    runs: int
    steps: int
    executed: int
    reached: frozenset[int]
    entries: int
    found: tuple[Found, ...]
    error: str = ""


class Campaign:
    """One campaign; `stop` ends it early, every process behind the run that it is in."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.state = State()
        self._stopped = False
        Corpus(plan.corpus)  # what is wrong with the folder is said here

    def stop(self) -> None:
        """Let the campaign come to its end."""
        self._stopped = True

    def run(self, watch: Callable[[State], None] = lambda state: None) -> State:
        """Search; `watch` is called several times a second."""
        began = time.monotonic()
        reached = set[int]()
        with _processes(self.plan) as pipes:
            waiting = dict(pipes)
            jobs = {pipe: job for job, pipe in enumerate(pipes)}
            told_to_stop = False
            while waiting:
                for pipe in wait(list(waiting), timeout=TELLING):
                    assert isinstance(pipe, Connection)
                    try:
                        self._take(pipe.recv(), reached)
                    except (EOFError, OSError):
                        process = waiting.pop(pipe)
                        process.join()
                        if process.exitcode:
                            self._lost(jobs[pipe], process.exitcode)
                self.state.seconds = time.monotonic() - began
                watch(self.state)
                if self._is_over() and not told_to_stop:
                    told_to_stop = True
                    for pipe in waiting:
                        _send(pipe, "stop")
        return self.state

    def _lost(self, job: int, status: int) -> None:
        """A process is dead that has not ended by itself: what it was performing is a finding."""
        plan, corpus = self.plan, Corpus(self.plan.corpus)
        what = f"{SURVIVES}: a process ended with status {status}"
        self.state.lost.append(what)
        scenario = corpus.under_way(name_of(plan.seed, job))
        if scenario is not None:
            corpus.report(SURVIVES, scenario, what)

    def _is_over(self) -> bool:
        plan, state = self.plan, self.state
        return self._stopped or (plan.seconds is not None and state.seconds >= plan.seconds)

    def _take(self, told: _Told, reached: set[int]) -> None:
        state = self.state
        state.runs += told.runs
        state.steps += told.steps
        state.executed += told.executed
        state.entries += told.entries
        state.found += told.found
        new = told.reached - reached
        reached |= new
        state.covered += len(new)
        state.states += counted(new, STATE)
        state.edges += counted(new, EDGE)
        if told.error:
            state.refused = told.error


@contextmanager
def _processes(plan: Plan) -> Iterator[dict[Connection, Any]]:
    """The processes of a campaign by the pipes to them; none is left when the block ends."""
    context = multiprocessing.get_context("spawn")
    resource_tracker.ensure_running()  # it unblocks SIGINT where it is started
    started: dict[Connection, Any] = {}
    try:
        for job in range(plan.jobs):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(plan, job, theirs), daemon=True)
            # Blocked here it is blocked there: Ctrl-C is for the campaign, also while a process begins.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            started[ours] = process
        yield started
    finally:
        for pipe, process in started.items():
            if process.is_alive():
                process.terminate()
            process.join()
            pipe.close()


def _work(plan: Plan, job: int, pipe: Connection) -> None:
    """One process: search and tell, until told to stop or until its share of the runs is done."""
    share = None if plan.runs is None else plan.runs // plan.jobs + (job < plan.runs % plan.jobs)
    try:
        with variants(plan.world.variants):
            _search(plan, job, pipe, share)
    except KlpemuError as error:
        _send(pipe, _Told(0, 0, 0, frozenset(), 0, (), str(error)))
    except OSError as error:  # the corpus cannot be written any more
        what = f"{error.filename or plan.corpus}: {error.strerror}; make room, or give another folder"
        _send(pipe, _Told(0, 0, 0, frozenset(), 0, (), what))
    pipe.close()


def _search(plan: Plan, job: int, pipe: Connection, share: int | None) -> None:
    corpus = Corpus(plan.corpus)
    corpus.note_under_way(name_of(plan.seed, job), None)  # what is there is of an older campaign
    search = Search(plan.world, corpus, plan.seed, job)
    tell = _Teller(search, pipe)
    told = read = time.monotonic()
    # What was booted stays, and so do the restore points: looking at them again and again for garbage took a
    # tenth of the time.
    gc.collect()
    gc.freeze()
    gc.disable()
    while share is None or search.tally.runs < share:
        found = search.advance()
        if found is not None or search.tally.runs % COLLECTING == 0:
            gc.collect()  # after a finding, because whole kernels were booted to confirm it
        now = time.monotonic()
        if found is not None or now - told > TELLING:
            search.note_runs()
            tell((found,) if found is not None else ())
            told = time.monotonic()
            if pipe.poll():
                break
        if plan.jobs > 1 and now - read > READING:
            search.read_corpus()
            read = time.monotonic()
    search.note_runs()
    corpus.note_under_way(name_of(plan.seed, job), None)
    tell(())


class _Teller:
    """Says what has come since it was last called."""

    def __init__(self, search: Search, pipe: Connection) -> None:
        self._tally, self._pipe = search.tally, pipe
        self._runs = self._steps = self._executed = self._entries = 0
        self._reached: frozenset[int] = frozenset()

    def __call__(self, found: tuple[Found, ...]) -> None:
        tally = self._tally
        reached = frozenset(tally.reached)
        _send(
            self._pipe,
            _Told(
                tally.runs - self._runs,
                tally.steps - self._steps,
                tally.executed - self._executed,
                reached - self._reached,
                tally.entries - self._entries,
                found,
            ),
        )
        self._runs, self._steps, self._executed = tally.runs, tally.steps, tally.executed
        self._entries, self._reached = tally.entries, reached


def _send(pipe: Connection, message: object) -> None:
    try:
        pipe.send(message)
    except (BrokenPipeError, OSError):
        return  # the other end has gone; who waits for it notices
