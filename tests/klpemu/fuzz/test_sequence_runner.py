"""Sequences performed one after the other on one kernel."""

import random
from dataclasses import replace

import pytest

from klpemu.fuzz.bounds import BOUND, Bounds
from klpemu.fuzz.grammar import Grammar
from klpemu.fuzz.replay import replayed
from klpemu.fuzz.sequence_runner import Run, SequenceRunner
from klpemu.fuzz.world import world_of
from klpemu.scenario import Action, Step
from patches.variants import variants

WORLD = world_of(None, None, None, "qemu64", (), (), ())
GRAMMAR = Grammar(WORLD)
LAMP, AREA = Step(Action.ENABLE, "klp_lamp"), Step(Action.ENABLE, "fix_area")
WAIT = Step(Action.RUN, "2000 ms", msecs=2000)


@pytest.fixture(scope="module")
def runner() -> SequenceRunner:
    return SequenceRunner(WORLD)


def events(runner: SequenceRunner) -> list[object]:
    return [*runner._stepper.kernel.machine.events]


def test_a_run_in_the_middle_of_many_is_the_run_alone(runner: SequenceRunner) -> None:
    random_ = random.Random(11)
    sequences = [GRAMMAR.sequence(random_, 8) for _ in range(6)]
    together = []
    for each in sequences:
        run = runner.run(each)
        together.append((run, events(runner)))
    for each, expected in list(zip(sequences, together, strict=True))[::-2]:
        alone = SequenceRunner(WORLD)
        assert (alone.run(each), events(alone)) == expected


def test_behind_a_prefix_a_run_is_the_whole_run(runner: SequenceRunner) -> None:
    steps = [LAMP, WAIT, AREA, WAIT, Step(Action.LOAD, "builtin:lamp.ko"), Step(Action.DISABLE, "fix_area")]
    whole = runner.run(steps, thorough=True)
    expected = events(runner)
    prefix = runner.here(runner.run(steps[:4]))
    assert prefix is not None
    for _ in range(2):
        assert runner.run(steps[4:], prefix, thorough=True) == whole
        assert events(runner) == expected


def test_nothing_is_copied_where_somebody_sleeps_in_the_kernel(runner: SequenceRunner) -> None:
    run = runner.run([Step(Action.SPAWN, "sleeper"), Step(Action.RUN, "20 ms", msecs=20)])
    assert runner.here(run) is None


def test_a_refusal_is_an_answer_and_no_finding(runner: SequenceRunner) -> None:
    run = runner.run([Step(Action.DISABLE, "fix_area"), AREA, AREA])
    assert not run.findings
    assert [each.error for each in run.steps] == ["ENOENT", "", "EEXIST"]


def outcome(run: Run) -> tuple[tuple[Step, ...], str]:
    return run.steps, run.signature


@pytest.mark.parametrize("bug", ["", "museum:nops-for-ever", "nops_kept", "museum:missing-sync"])
def test_checking_only_what_has_changed_finds_the_same(bug: str) -> None:
    random_ = random.Random(5)
    sequences = [GRAMMAR.sequence(random_, 6) for _ in range(6)]
    shapes = Step(Action.ENABLE, "fix_shapes")
    sequences.append([AREA, WAIT, shapes, WAIT, Step(Action.DISABLE, "nap_1"), WAIT])
    with variants([bug] if bug else []):
        runner = SequenceRunner(WORLD)
        for each in sequences:
            assert outcome(runner.run(each)) == outcome(runner.run(each, thorough=True))
            if bug == "museum:missing-sync":
                break


def test_a_finding_is_shown_by_its_scenario_alone() -> None:
    with variants(["museum:nops-for-ever"]):
        runner = SequenceRunner(WORLD)
        shapes = Step(Action.ENABLE, "fix_shapes")
        run = runner.run([AREA, WAIT, shapes, WAIT])
    assert run.findings
    scenario = replace(WORLD, steps=run.steps, variants=("museum:nops-for-ever",))
    assert sorted(str(each) for each in run.findings) == sorted(replayed(scenario))
    assert replayed(replace(scenario, variants=())) == []


def test_a_run_that_uses_too_much_is_a_finding() -> None:
    runner = SequenceRunner(WORLD, Bounds(turns=60))
    busy = [
        Step(Action.SPAWN, "caller"),
        Step(Action.SPAWN, "worker"),
        Step(Action.RUN, "20 s", msecs=20_000),
    ]
    run = runner.run(busy)
    assert run.signature == BOUND
    scenario = replace(WORLD, steps=run.steps)
    assert any(BOUND in each for each in replayed(scenario, Bounds(turns=60)))
    assert not runner.run([AREA]).findings


def test_after_a_force_versions_may_be_mixed(runner: SequenceRunner) -> None:
    steps = [Step(Action.SPAWN, "kthread"), Step(Action.ENABLE, "nap_2"), Step(Action.FORCE, "nap_2")]
    steps += [Step(Action.RUN, "500 ms", msecs=500)]
    run = runner.run(steps)
    assert not run.findings
    assert replayed(replace(WORLD, steps=run.steps)) == []
    asleep = Step(Action.RUN, "20 ms", msecs=20)
    assert not runner.run([steps[0], asleep, *steps[1:], Step(Action.REVERSE, "nap_2"), steps[3]]).findings


def test_a_task_that_was_forced_is_judged_again_once_it_has_left_what_it_was_in() -> None:
    """It sleeps in the old function when it is forced, and later in the new one, which is then unpatched by a
    kernel that takes every stack for empty.
    """
    runner = SequenceRunner(WORLD)
    asleep = [Step(Action.SPAWN, "sleeper"), Step(Action.RUN, "20 ms", msecs=20)]
    forced = [*asleep, Step(Action.ENABLE, "nap_1"), Step(Action.FORCE, "nap_1")]
    assert not runner.run([*forced, Step(Action.DISABLE, "nap_1")]).findings
    assert not runner.run([*forced, Step(Action.RUN, "4000 ms", msecs=4000)]).findings
    with variants(["museum:empty-reliable-stack"]):
        _, findings = runner._stepper.attempt(Step(Action.DISABLE, "nap_1"), thorough=True)
    assert [each.invariant for each in findings] == ["switched_tasks_have_left_what_changes"]


def test_a_refused_operation_lets_the_others_come_to_an_end(runner: SequenceRunner) -> None:
    """When it returns a task is on its way to user space: its flag is clear, its state is to be stored."""
    refused = Step(Action.DISABLE, "fix_area2", schedule=(("caller", 1),))
    steps = [Step(Action.ENABLE, "fix_area2"), Step(Action.SPAWN, "caller")]
    run = runner.run([*steps, Step(Action.DISABLE, "fix_area2"), refused])
    assert run.steps[-1].error == "EINVAL"
    assert not run.findings
