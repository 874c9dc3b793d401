"""Random programs under all schedules: nothing is missed, and a reduction that is broken is noticed.

Each task loads and stores words that all share, in guest memory and in an object of the emulator.  A store
depends on all that the task has seen before, so that nearly every order of dependent turns comes to something
else.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emu.footprint import Footprint
from emu.fork import new_task
from emu.same_state import SameState
from klpemu.exploration import Explored, explored
from klpemu.explorer import Bounds
from klpemu.kernel import Kernel
from klpemu.scenario import Action, Scenario, Step

WORDS = 2
Program = tuple[tuple[str, int], ...]


class Box:
    """An object that tasks share."""

    __module__ = "emu.box"  # whose objects are tracked

    def __init__(self) -> None:
        self.value = 0
        self.taken: list[int] = []


class Runner:
    """Runs one service for each program, to the end of all."""

    __module__ = "klpemu.runner"

    def __init__(self, programs: Sequence[Program]) -> None:
        self.kernel = Kernel.load(cpus=len(programs))
        self.box = Box()
        self._programs = programs
        machine = self.kernel.machine
        self._words = machine.slab.kzalloc(8 * WORDS, "words")
        self._tasks = [new_task(machine, f"task{at}", cpu) for at, cpu in enumerate(machine.cpus)]

    def _watched(self) -> None:
        return

    def judged(self) -> tuple[object, ...]:
        return ()

    def perform(self, _step: Step) -> Any:
        machine = self.kernel.machine
        services = [
            machine.hub.serve(task, "program", lambda each=each: self._run(each))
            for task, each in zip(self._tasks, self._programs, strict=True)
        ]
        machine.run(lambda: all(each.finished for each in services))
        return SimpleNamespace(report=SimpleNamespace(holds=True))

    def final_state(self) -> Any:
        words = self.kernel.machine.space.read(self._words, 8 * WORDS)
        return words, self.box.value, tuple(self.box.taken)

    def _run(self, program: Program) -> None:
        machine, seen = self.kernel.machine, 1
        for verb, number in program:
            at = self._words + 8 * number
            match verb:
                case "load":
                    value = int.from_bytes(machine.shared.read(at, 8), "little")
                    seen = (seen * 31 + value + 1) % 65521
                case "store":
                    machine.shared.write(at, seen.to_bytes(8, "little"))
                case "zero":
                    machine.shared.write(at, bytes(8))
                case "get":
                    machine.hub.door("get")
                    seen = (seen * 31 + self.box.value + 1) % 65521
                case "put":
                    machine.hub.door("put")
                    self.box.value = seen
                case "take":
                    machine.hub.door("take")
                    self.box.taken.append(seen)


def _explored(programs: Sequence[Program], preemptions: int, *, reduce: bool) -> Explored:
    runner = Runner(programs)
    scenario = Scenario(path="", steps=[Step(Action.BOOT)])
    return explored(scenario, runner, Bounds(preemptions), reduce=reduce, final_state=runner.final_state)


def _misses(programs: Sequence[Program], preemptions: int = 1) -> set[Any]:
    every = _explored(programs, preemptions, reduce=False)
    reduced = _explored(programs, preemptions, reduce=True)
    assert reduced.final_states <= every.final_states
    assert reduced.runs <= every.runs
    return set(every.final_states - reduced.final_states)


VERBS = st.sampled_from(["load", "store", "zero", "get", "put", "take"])
PROGRAMS = st.lists(st.tuples(VERBS, st.integers(0, WORDS - 1)), min_size=1, max_size=4).map(tuple)


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(PROGRAMS, min_size=2, max_size=2))
def test_nothing_that_random_programs_come_to_is_missed(programs: list[Program]) -> None:
    assert not _misses(programs)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(PROGRAMS, min_size=2, max_size=3), st.integers(1, 2))
def test_nothing_that_more_random_programs_come_to_is_missed(
    programs: list[Program], preemptions: int
) -> None:
    assert not _misses(programs, preemptions)


SWAP: Program = (("load", 0), ("store", 1), ("load", 1), ("store", 0))
OBJECT: Program = (("get", 0), ("put", 0), ("get", 0), ("take", 0))


def _always(self: Footprint, other: Footprint) -> bool:
    return True


def _one(self: SameState) -> int:
    return 1


BROKEN: dict[str, tuple[type, str, Callable[..., Any], Program]] = {
    "everything commutes": (Footprint, "commutes_with", _always, SWAP),
    "with objects everything commutes": (Footprint, "commutes_with", _always, OBJECT),
    "all states are one": (SameState, "number", _one, SWAP * 3),
    "objects are forgotten": (SameState, "_look_at_objects", _one, OBJECT * 3),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_reduction_that_is_broken_misses_something(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong, program = BROKEN[how]
    programs = (program, program)
    assert not _misses(programs)
    monkeypatch.setattr(owner, name, wrong)
    assert _misses(programs)
