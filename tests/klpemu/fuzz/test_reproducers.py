"""Reproducers are minimal: of what the search makes of a sequence with a finding nothing can be left out."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from emu.timer import JIFFY_INSTRUCTIONS
from klpemu.call_expression import parse_call
from klpemu.fuzz.answers import ANSWER
from klpemu.fuzz.corpus import Corpus
from klpemu.fuzz.replay import replay, replayed
from klpemu.fuzz.search import Search
from klpemu.fuzz.world import world_of
from klpemu.scenario import Action, Scenario, Step
from patches.variants import variants

WAIT = Step(Action.RUN, "2000 ms", msecs=2000)
LOAD, UNLOAD = Step(Action.LOAD, "builtin:lamp.ko"), Step(Action.UNLOAD, "lamp")
# What has nothing to do with any of the bugs.
NOISE = [
    Step(Action.MODPROBE, "builtin:options.ko"),
    Step(Action.DISABLE, "fix_lamp"),
    Step(Action.CALL, "shadow_passes()", call=parse_call("shadow_passes()")),
    Step(Action.RMMOD, "options"),
]


def enable(name: str) -> Step:
    return Step(Action.ENABLE, name)


def tracer(name: str) -> Step:
    return Step(Action.FTRACE, name, functions=("area_of",))


def turns(*groups: tuple[str, int, int]) -> tuple[tuple[str, int], ...]:
    """Task, instructions, and how many such turns."""
    return tuple((name, instructions) for name, instructions, times in groups for _ in range(times))


def doors(name: str, count: int) -> tuple[str, int, int]:
    return name, JIFFY_INSTRUCTIONS, count


AREA = [enable("fix_area"), WAIT]
CALLER = Step(Action.SPAWN, "caller")
FREED = replace(
    Step(Action.UNFTRACE, "second"),
    schedule=turns(("swapper/1", 3, 1), ("caller", 98, 1), ("caller", 95, 1), doors("init", 180)),
)
BEGINS = replace(
    enable("nap_1"),
    schedule=turns(("parent", 92, 1), ("parent", 34, 1), ("parent", 31, 1), doors("init", 900)),
)
TRACED = replace(tracer("first"), schedule=turns(doors("init", 137), doors("caller", 3)))
# By bug: steps that show it, and which finding it is.
SHOWN: dict[str, tuple[list[Step], str]] = {
    "nops-for-ever": ([*AREA, enable("fix_shapes"), WAIT], "func_stacks_hold_the_patches"),
    "stale-obj-mod": ([enable("fix_lamp"), LOAD], "objects_know_their_modules"),
    "ops-per-func": ([*AREA, enable("fix_area2")], ANSWER),
    "relocations-left": ([enable("klp_lamp"), WAIT, LOAD, UNLOAD, LOAD], ANSWER),
    "int3-as-nop": ([*AREA, CALLER, TRACED], "versions_are_never_mixed"),
    "fork-between": ([Step(Action.SPAWN, "parent"), BEGINS], "tasks_are_settled"),
    "ops-freed-early": (
        [*AREA, tracer("first"), tracer("second"), CALLER, FREED],
        "nothing_freed_is_in_use",
    ),
}
QUICK = ("stale-obj-mod", "ops-per-func", "fork-between")
INTERLEAVED = ("int3-as-nop", "fork-between", "ops-freed-early")


def with_less(scenario: Scenario) -> Iterator[Scenario]:
    """The scenario without one of its steps, without one turn, and without one group of equal turns."""
    steps = list(scenario.steps)
    for at, step in enumerate(steps):
        before, after = steps[:at], steps[at + 1 :]
        fewer = [[*before, *after]]
        schedule = step.schedule
        for turn in range(len(schedule)):
            if turn and schedule[turn] == schedule[turn - 1]:
                continue  # which of several equal turns is left out is the same
            end = turn + 1
            while end < len(schedule) and schedule[end] == schedule[turn]:
                end += 1
            for rest in (schedule[:turn] + schedule[turn + 1 :], schedule[:turn] + schedule[end:]):
                fewer.append([*before, replace(step, schedule=rest), *after])
        for each in fewer:
            yield replace(scenario, steps=tuple(replace(one, error="") for one in each))


@pytest.mark.parametrize(
    "bug", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in SHOWN]
)
def test_nothing_can_be_left_out_of_a_reproducer(bug: str, tmp_path: Path) -> None:
    steps, signature = SHOWN[bug]
    world = world_of(None, None, None, "qemu64", (), (), [f"museum:{bug}"])
    with variants(world.variants):
        search = Search(world, Corpus(tmp_path), 1)
        run = search._runner.run([*NOISE, *steps, WAIT])
        assert run.signature == signature
        found = search._found(run)
    assert found is not None
    assert "does not show it" not in found.what
    assert len(found.scenario.steps) <= len(steps)
    assert any(each.schedule for each in found.scenario.steps) == (bug in INTERLEAVED)
    (path,) = Corpus(tmp_path).findings()
    assert any(f" {signature}: " in each for each in replay(path))
    for less in with_less(found.scenario):
        assert not any(f" {signature}: " in each for each in replayed(less)), less.steps
    if bug != "relocations-left":  # which 6.1 has
        assert replayed(replace(found.scenario, variants=())) == []
