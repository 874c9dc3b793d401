"""The oracle of answers: what 6.1 says of operations, right answers and wrong ones."""

import errno
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emu.errno import KernelErrno
from klpemu import Func, Patch
from klpemu.fixtures import fixture
from klpemu.fuzz.answers import ANSWER
from klpemu.fuzz.grammar import FTRACE_ENABLED, Grammar
from klpemu.fuzz.replay import replayed
from klpemu.fuzz.sequence_runner import Run, SequenceRunner
from klpemu.fuzz.world import world_of
from klpemu.scenario import Action, DeclaredTask, Step
from patches import core
from patches.klp import Klp
from patches.variants import replaced, variants

WORLD = world_of(None, None, None, "qemu64", (), (), ())
WAIT = Step(Action.RUN, "2000 ms", msecs=2000)
LOAD, UNLOAD = Step(Action.LOAD, "builtin:lamp.ko"), Step(Action.UNLOAD, "lamp")
ENDBR = Step(Action.LOAD, "builtin:endbr.o")
AREA_OF = Func("area_of", "fixed_area_of")
COUNT = Step(Action.FTRACE, "first", functions=("area_of",))
ASLEEP = [Step(Action.SPAWN, "sleeper"), Step(Action.RUN, "20 ms", msecs=20)]


def enable(name: str) -> Step:
    return Step(Action.ENABLE, name)


def disable(name: str) -> Step:
    return Step(Action.DISABLE, name)


def modprobe(name: str) -> Step:
    return Step(Action.MODPROBE, f"builtin:{name}.ko")


def rmmod(name: str) -> Step:
    return Step(Action.RMMOD, name)


def ftrace_enabled(value: str) -> Step:
    return Step(Action.WRITE, FTRACE_ENABLED, value=value)


@pytest.fixture(scope="module")
def runner() -> SequenceRunner:
    return SequenceRunner(WORLD)


# The last step of a sequence, and how 6.1 answers it.
RIGHT = {
    "twice": ([enable("fix_area"), WAIT, enable("fix_area")], "EEXIST"),
    "on top": ([enable("fix_area"), WAIT, enable("fix_area2")], ""),
    "in a transition": ([*ASLEEP, enable("nap_1"), enable("fix_area")], "EBUSY"),
    "the same name, later": ([*ASLEEP, enable("nap_1"), enable("nap_1")], "EEXIST"),
    "ftrace off": ([ftrace_enabled("0"), enable("fix_area")], "EBUSY"),
    "off, but for what is patched": (
        [enable("fix_area"), WAIT, ftrace_enabled("0"), enable("one_area")],
        "",
    ),
    "off with a permanent ops": ([enable("fix_area"), ftrace_enabled("0")], "EBUSY"),
    "off with a tracer": ([COUNT, ftrace_enabled("0")], ""),
    "no such function": ([LOAD, enable("fix_lamp")], "EINVAL"),
    "it comes later": ([enable("fix_lamp"), LOAD], "EINVAL"),
    "the module comes": ([enable("klp_lamp"), WAIT, LOAD], ""),
    "the module comes with ftrace off": ([enable("fix_form"), ftrace_enabled("0"), ENDBR], "EBUSY"),
    "the module comes again": ([enable("klp_lamp"), WAIT, LOAD, UNLOAD, LOAD], "ENOEXEC"),
    "a function with ENDBR": ([ENDBR, enable("fix_form")], ""),
    "a module twice": ([LOAD, LOAD], "EEXIST"),
    "a module that is not there": ([UNLOAD], "ENOENT"),
    "removed": ([LOAD, UNLOAD], ""),
    "disabled": ([enable("fix_area"), WAIT, disable("fix_area")], ""),
    "disabled twice": ([*ASLEEP, enable("nap_1"), disable("nap_1"), disable("nap_1")], "EINVAL"),
    "turned around": ([*ASLEEP, enable("nap_1"), disable("nap_1")], ""),
    "another one's transition": (
        [*ASLEEP, enable("fix_area"), WAIT, enable("nap_1"), disable("fix_area")],
        "EBUSY",
    ),
    "not enabled": ([disable("fix_area")], "ENOENT"),
    "nothing to force": ([enable("fix_area"), WAIT, Step(Action.FORCE, "fix_area")], "EINVAL"),
    "forced": ([*ASLEEP, enable("nap_1"), Step(Action.FORCE, "nap_1")], ""),
    "nothing to reverse": ([enable("fix_area"), WAIT, Step(Action.REVERSE, "fix_area")], "EINVAL"),
    "in use": ([modprobe("exporter"), modprobe("importer"), rmmod("exporter")], "EAGAIN"),
    "in use, without its exit function": (
        [modprobe("exporter"), modprobe("importer"), Step(Action.UNLOAD, "exporter")],
        "EAGAIN",
    ),
    "it is there already": ([modprobe("options"), modprobe("options")], ""),
    "it has no exit function": ([modprobe("init_stays"), rmmod("init_stays")], "EBUSY"),
    "time goes by": ([enable("fix_area"), WAIT], ""),
    "a tracer twice": ([COUNT, COUNT], "EEXIST"),
    "no tracer": ([Step(Action.UNFTRACE, "first")], "ENOENT"),
}


@pytest.mark.parametrize("what", RIGHT)
def test_a_right_answer_is_no_finding(what: str, runner: SequenceRunner) -> None:
    steps, answer = RIGHT[what]
    run = runner.run(steps)
    assert not run.findings
    assert run.steps[-1].error == answer


@pytest.mark.parametrize("what", RIGHT)
def test_any_other_answer_is_wrong(what: str, runner: SequenceRunner) -> None:
    """EOPNOTSUPP is wrong for each of them, and so is success where 6.1 refuses."""
    *before, last = RIGHT[what][0]
    answer = RIGHT[what][1]
    assert not runner.run(before).findings
    answers = runner._stepper._answers
    asked = answers.before(last)
    runner._stepper._error_of(last)
    wrong = answers.judge(last, asked, KernelErrno(errno.EOPNOTSUPP, "it does not want to"))
    assert wrong is not None
    assert wrong.right == answer
    wrong = answers.judge(last, asked, None)
    assert (wrong is not None and wrong.right == answer) == bool(answer)


@pytest.mark.parametrize("bug", ["site-at-start", "ops-per-func", "sympos-zero-one", "relocations-left"])
def test_a_bug_that_shows_by_an_errno_is_found_and_shown_by_its_scenario(bug: str) -> None:
    steps = {
        "site-at-start": [enable("fix_form"), ENDBR],
        "ops-per-func": [enable("nap_1"), WAIT, enable("nap_2")],
        "sympos-zero-one": [enable("fix_area"), WAIT, enable("one_area")],
        "relocations-left": [enable("klp_lamp"), WAIT, LOAD, UNLOAD, LOAD],
    }[bug]
    run = found(steps, f"museum:{bug}")
    assert (run.signature, run.steps[-1].error) == (ANSWER, "")


def judged_as(patches: dict[str, Patch], steps: list[Step]) -> tuple[list[str], list[str]]:
    """How patches of one's own are answered, and what the oracle has against it."""
    run = SequenceRunner(replace(WORLD, patches=patches)).run(steps)
    return [each.error for each in run.steps], [each.what for each in run.findings]


def test_two_funcs_of_one_name_are_refused() -> None:
    twice = Patch("twice", {"vmlinux": [AREA_OF, replace(AREA_OF, sympos=1)]}, "builtin:fix_area.o")
    answers, findings = judged_as({"twice": twice}, [enable("twice")])
    assert answers in (["EEXIST"], ["EINVAL"])
    assert not findings


def test_a_symbol_that_is_not_there_is_refused_once_its_module_is(tmp_path: Path) -> None:
    renamed = tmp_path / "klp_lamp.ko"
    code = fixture("klp_lamp.ko").read_bytes()
    renamed.write_bytes(code.replace(b".klp.sym.lamp.level,", b".klp.sym.lamp.lever,"))
    patches = {"klp_lamp": Patch("klp_lamp", code=renamed)}
    assert judged_as(patches, [LOAD, enable("klp_lamp")]) == (["", "EINVAL"], [])
    assert judged_as(patches, [enable("klp_lamp"), WAIT, LOAD]) == (["", "", "EINVAL"], [])


def test_a_function_without_a_site_is_refused_once_its_module_comes() -> None:
    patch = Patch("late", {"no_site": [Func("form_both", "fixed_area_of")]}, "builtin:fix_area.o")
    load = Step(Action.LOAD, "builtin:no_site.o")
    assert judged_as({"late": patch}, [enable("late"), WAIT, load]) == (["", "", "EINVAL"], [])
    assert judged_as({"late": patch}, [load, enable("late")]) == (["", "EINVAL"], [])


def test_of_patches_with_states_nothing_is_said() -> None:
    names = ("klp_state2", "klp_state")
    patches = {name: Patch(name, code=f"builtin:{name}.ko") for name in names}
    steps = [enable("klp_state2"), WAIT, enable("klp_state")]
    assert judged_as(patches, steps) == (["", "", "EINVAL"], [])


def test_a_transition_that_ends_meanwhile_leaves_the_answer_open(runner: SequenceRunner) -> None:
    assert not runner.run([*ASLEEP, enable("nap_1")]).findings
    stepper, asked = runner._stepper, runner._stepper._answers.before(enable("fix_area"))
    assert asked.transition == "nap_1"
    assert stepper._error_of(Step(Action.RUN, "5000 ms", msecs=5000)) is None
    assert stepper._error_of(enable("fix_area")) is None
    assert stepper._answers.judge(enable("fix_area"), asked, None) is None


def test_a_task_may_read_what_is_not_there() -> None:
    reader = DeclaredTask("reader", ("read(/sys/kernel/livepatch/nap_1/enabled)",), start=False)
    steps = (Step(Action.SPAWN, "reader"), Step(Action.RUN, "20 ms", msecs=20))
    run = SequenceRunner(replace(WORLD, tasks={"reader": reader})).run(steps)
    assert [each.error for each in run.steps] == ["", "ENOENT"]
    assert not run.findings


def found(steps: list[Step], variant: str) -> Run:
    """The run with a bug, whose scenario shows it as well."""
    with variants([variant]):
        run = SequenceRunner(replace(WORLD, variants=(variant,))).run(steps)
    scenario = replace(WORLD, steps=run.steps, variants=(variant,))
    assert any(f" {ANSWER}: " in each for each in replayed(scenario))
    return run


def test_a_kernel_that_lets_two_transitions_be_on_at_once_gives_a_wrong_answer() -> None:
    enable_patch = core.__klp_enable_patch

    def two_at_once(klp: Klp, patch: Any) -> None:
        if klp.transition_patch is None:
            enable_patch(klp, patch)

    steps = [*ASLEEP, enable("nap_1"), enable("fix_area")]
    with replaced(core, "__klp_enable_patch", two_at_once):
        run = SequenceRunner(WORLD).run(steps)
        assert ANSWER in {each.invariant for each in run.findings}
        assert run.steps[-1].error == "EBUSY"
        shown = replayed(replace(WORLD, steps=run.steps))
    assert any(f" {ANSWER}: found nothing failed, expected EBUSY" in each for each in shown)


def test_a_refusal_that_missing_memory_explains_is_right(runner: SequenceRunner) -> None:
    run = runner.run([replace(enable("fix_area"), fail_alloc="klp_ops")])
    assert not run.findings
    assert run.steps[-1].error == "ENOMEM"


@pytest.mark.parametrize("seed", range(2))
def test_without_a_bug_no_answer_is_wrong(seed: int, runner: SequenceRunner) -> None:
    grammar, random_ = Grammar(WORLD), random.Random(seed)
    for _ in range(40):
        assert not runner.run(grammar.sequence(random_)).findings


@pytest.mark.slow
def test_without_a_bug_no_answer_is_wrong_in_thousands_of_sequences(runner: SequenceRunner) -> None:
    grammar = Grammar(WORLD)
    for number in range(3000):
        run = runner.run(grammar.sequence(random.Random(f"answers {number}")))
        assert not run.findings, run.steps
