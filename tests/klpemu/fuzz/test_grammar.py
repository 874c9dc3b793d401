"""Which sequences there are."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from klpemu.fixtures import fixture
from klpemu.fuzz.grammar import LENGTH, Grammar
from klpemu.fuzz.world import world_of
from klpemu.scenario import Action, Step
from klpemu.scenario_file import read_scenario
from klpemu.scenario_text import scenario_text

WORLD = world_of(None, None, None, "qemu64", (), (), ())
GRAMMAR = Grammar(WORLD)
WAIT = Step(Action.RUN, "2000 ms", msecs=2000)


def assert_readable(steps: list[Step], directory: Path) -> None:
    """Written as a scenario and read again the steps are the same."""
    path = directory / "sequence.toml"
    path.write_text(scenario_text(replace(WORLD, steps=tuple(steps))))
    assert [replace(each, line=0) for each in read_scenario(path).steps] == [
        replace(each, line=0) for each in steps
    ]


def test_a_seed_gives_one_sequence_and_another_seed_another() -> None:
    same = [GRAMMAR.sequence(random.Random(7)) for _ in range(2)]
    assert same[0] == same[1]
    assert GRAMMAR.sequence(random.Random(8)) != same[0]


def test_every_kind_of_operation_comes_up() -> None:
    random_ = random.Random(1)
    steps = [step for _ in range(300) for step in GRAMMAR.sequence(random_)]
    kinds = {each.action for each in steps}
    assert kinds >= {
        *(Action.ENABLE, Action.DISABLE, Action.REVERSE, Action.FORCE, Action.LOAD, Action.UNLOAD),
        *(Action.MODPROBE, Action.RMMOD, Action.SPAWN, Action.RUN, Action.CALL, Action.WRITE),
        *(Action.FTRACE, Action.UNFTRACE),
    }
    assert any(each.schedule for each in steps)
    assert any(each.fail_alloc for each in steps)


@pytest.mark.parametrize("seed", range(20))
def test_every_sequence_is_a_scenario_that_can_be_read(seed: int, tmp_path: Path) -> None:
    steps = GRAMMAR.sequence(random.Random(seed))
    assert_readable(steps, tmp_path)


@pytest.mark.parametrize("seed", range(20))
def test_a_variation_is_another_sequence_and_not_longer(seed: int, tmp_path: Path) -> None:
    random_ = random.Random(seed)
    steps = GRAMMAR.sequence(random_)
    varied = [GRAMMAR.varied(random_, steps) for _ in range(5)]
    assert any(each != steps for each in varied)
    for each in varied:
        assert len(each) <= LENGTH
        assert_readable(each, tmp_path)


def test_what_was_never_loaded_is_unloaded_where_nothing_can_be_loaded() -> None:
    world = replace(WORLD, patches={}, steps=(Step(Action.UNLOAD, "lamp"), Step(Action.RMMOD, "options")))
    random_ = random.Random(1)
    names = {each.target for _ in range(20) for each in Grammar(world).sequence(random_)}
    assert {"lamp", "options"} <= names


def test_modules_and_patches_of_ones_own_make_a_world() -> None:
    patch = "builtin:fix_area.o:area_of=fixed_area_of"
    world = world_of(None, None, None, "qemu64", [fixture("lamp.ko")], [patch], ["nops_kept"])
    operations = Grammar(world).operations
    assert [each.target for each in operations[Action.ENABLE]] == ["fix_area"]
    assert [each.target for each in operations[Action.UNLOAD]] == ["lamp"]
    assert {each.functions for each in operations[Action.FTRACE]} == {("area_of",)}
    assert world.variants == ("nops_kept",)


def test_livepatch_modules_are_loaded_by_modprobe_and_then_removed() -> None:
    steps = [Step(Action.MODPROBE, "builtin:klp_lamp.ko"), Step(Action.RMMOD, "klp_lamp")]
    world = replace(WORLD, steps=[*steps, Step(Action.READ, "/proc/cmdline")])
    random_ = random.Random(2)
    sequences = [Grammar(world).sequence(random_) for _ in range(300)]
    behind = [
        Action.MODPROBE in [each.action for each in sequence[:at]]
        for sequence in sequences
        for at, step in enumerate(sequence)
        if step.action is Action.RMMOD
    ]
    assert len(behind) > 20
    assert sum(behind) > 0.8 * len(behind)
    assert any(each.action is Action.READ for sequence in sequences for each in sequence)


def behind(before: list[Step], count: int = 200) -> list[Step]:
    """What comes right behind these steps, drawn so many times."""
    return [GRAMMAR.behind(random.Random(seed), before, 1)[0] for seed in range(count)]


def test_what_was_removed_often_comes_back_at_once() -> None:
    load = Step(Action.LOAD, "builtin:lamp.ko")
    drawn = behind([load, Step(Action.UNLOAD, "lamp")])
    assert sum("lamp.ko" in each.target for each in drawn) > len(drawn) / 4


def test_a_task_that_starts_is_often_raced_by_the_same_call() -> None:
    drawn = [each for each in behind([Step(Action.SPAWN, "attacher")]) if each.schedule]
    raced = [each for each in drawn if each.target == "attach(8, 7)"]
    assert len(raced) > len(drawn) / 5
    assert any(name == "attacher" for each in raced for name, _ in each.schedule)


def test_tracers_are_registered_on_what_is_patched() -> None:
    drawn = behind([Step(Action.ENABLE, "fix_shapes"), WAIT], 600)
    traced = [each for each in drawn if each.action is Action.FTRACE]
    assert sum("perimeter_of" in each.functions for each in traced) > len(traced) / 2
