"""Immediate patches and funcs of v4.12 to v4.15: what they are good for, and what they lose."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
from livepatches import fix_area, fix_shapes, livepatch

from elf.errors import KlpemuError
from emu.errno import KernelErrno
from klpemu import Func, Kernel, Patch
from klpemu.tasks import TaskState
from patches import stack_check, transition
from patches.variants.immediate import funcs_immediate, patches_immediate

PAGE_OF_DOCS = Path(__file__).resolve().parents[3] / "docs" / "variants.md"
STEPS = (Func("step_one", "new_step_one"), Func("step_two", "new_step_two"))
NAP = Func("nap", "new_nap")
TRANSACT = Func("transact", "new_transact")
OLD, NEW = 0x11, 0x22
REPLACED = (
    (transition, "klp_init_transition"),
    (transition, "klp_start_transition"),
    (transition, "klp_try_complete_transition"),
    (transition, "klp_complete_transition"),
    (stack_check, "checked_function"),
)
Variant = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def kernel() -> Kernel:
    """One vCPU, every call observed."""
    return Kernel.load(observe=True)


def state(kernel: Kernel, name: str = "sleeper") -> TaskState:
    (found,) = (each for each in kernel.tasks.states() if each.name == name)
    return found


def sleeper(kernel: Kernel, *program: str) -> None:
    """A task that is asleep in the first call of its program, which it repeats for ever."""
    kernel.tasks.spawn("sleeper", program, repeat=None)
    kernel.tasks.run(100)


def results(kernel: Kernel) -> list[int]:
    return [value for _, value in state(kernel).returned]


def found(kernel: Kernel, invariant: str) -> list[str]:
    """What one invariant says of the run so far."""
    return [each.what for each in kernel.verify().findings if each.invariant == invariant]


@dataclass(frozen=True)
class Across:
    """fix_steps enabled while a task is between step_one and step_two of transact()."""

    seconds: float  # virtual, until the patch is everybody's
    result: int
    mixed: list[str]


def across(variant: Variant) -> Across:
    with variant():
        kernel = Kernel.load(observe=True)
        sleeper(kernel, "transact(3000)")
        start = kernel.machine.timers.seconds
        kernel.enable(livepatch("fix_steps", *STEPS, TRANSACT))
        kernel.tasks.run(10_000, lambda: not kernel.in_transition)
        seconds = kernel.machine.timers.seconds - start
        kernel.tasks.run(4000, lambda: bool(results(kernel)))
        return Across(seconds, results(kernel)[0], found(kernel, "versions_are_never_mixed"))


# What it is good for.


def test_the_consistency_model_waits_for_a_task_that_an_immediate_patch_does_not_wait_for(
    kernel: Kernel,
) -> None:
    sleeper(kernel, "nap(60000)")
    kernel.enable(livepatch("fix_steps", NAP))
    assert kernel.in_transition == "fix_steps"
    kernel.reverse("fix_steps")
    kernel.tasks.wait_for_transition()
    lines = len(kernel.log)
    with patches_immediate("fix_steps"):
        kernel.enable(livepatch("fix_steps", NAP))
    assert kernel.in_transition == ""
    assert [state(kernel).version, state(kernel).pending] == ["", False]
    assert kernel.log[lines:] == [
        "livepatch: enabling patch 'fix_steps'",
        "livepatch: 'fix_steps': initializing patching transition",
        "livepatch: 'fix_steps': starting patching transition",
        "livepatch: 'fix_steps': completing patching transition",
        "livepatch: 'fix_steps': patching complete",
    ]
    kernel.verify().raise_for_findings()


def test_an_immediate_patch_leaves_tasks_and_func_transition_alone(kernel: Kernel) -> None:
    number = kernel.machine.events.total
    with patches_immediate("fix_area"):
        kernel.enable(fix_area())
    guest = kernel.enabled[0].guest
    layouts = kernel.machine.layouts
    funcs = [guest.follow_("objs").funcs + i * layouts.sizeof("klp_func") for i in range(2)]
    untouched = {
        each.struct + layouts.offsetof("task_struct", "patch_state") for each in kernel.machine.tasks
    }
    stores = kernel.machine.events.since(number)
    assert not [each for each in stores if each.address in untouched]
    transitions = {each + layouts.offsetof("klp_func", "transition") for each in funcs}
    assert {each.after for each in stores if each.address in transitions} == {b"\0"}


def test_a_fix_that_changes_no_meaning_loses_nothing(kernel: Kernel) -> None:
    """What they were meant for: one function, wrong before and right afterwards, whoever calls it."""
    with patches_immediate("fix_area"):
        sleeper(kernel, "nap(250)", "area_of(3, 4)")
        kernel.tasks.run(500)
        kernel.enable(livepatch("fix_area", Func("area_of", "fixed_area_of")))
        kernel.tasks.run(1000)
        kernel.verify("enabled").raise_for_findings()
        areas = [value for text, value in state(kernel).returned if text.startswith("area_of")]
        assert (areas[0], areas[-1]) == (7, 12)
        kernel.disable("fix_area")
        kernel.tasks.run(500)
        assert kernel.call("area_of", 3, 4) == 7


# What it loses.


def test_a_task_mixes_the_versions_of_an_immediate_patch_and_that_is_found() -> None:
    now, then = across(nullcontext), across(lambda: patches_immediate("fix_steps"))
    assert (now.result, now.mixed) == (OLD, [])
    assert (then.seconds, then.result) == (0, 0x12)
    assert len(then.mixed) == 1
    assert "called the old transact and then the new new_step_two of 'fix_steps'" in then.mixed[0]
    assert now.seconds > 2


def test_a_kernel_thread_mixes_the_versions_of_a_single_function(kernel: Kernel) -> None:
    """Its only switch points are the stack checks of transitions, and there was none."""
    with patches_immediate("fix_area"):
        kernel.tasks.spawn("kt", ["area_of(3, 4)", "sleep(50)"], kthread=True, repeat=None)
        kernel.tasks.run(100)
        kernel.enable(livepatch("fix_area", Func("area_of", "fixed_area_of")))
        kernel.tasks.run(100)
    (mixed,) = found(kernel, "versions_are_never_mixed")
    assert mixed.startswith("kt:3 called the old area_of and then the new fixed_area_of of 'fix_area'")


def test_so_it_does_when_an_immediate_patch_is_disabled(kernel: Kernel) -> None:
    with patches_immediate("fix_steps"):
        kernel.enable(livepatch("fix_steps", *STEPS))
        sleeper(kernel, "transact(3000)")
        kernel.disable("fix_steps")
        assert kernel.in_transition == ""
        kernel.tasks.run(3500)
        assert results(kernel) == [0x21]
    (mixed,) = found(kernel, "versions_are_never_mixed")
    assert "called the new new_step_one and then the old step_two" in mixed


def test_the_module_of_an_immediate_patch_can_never_go(kernel: Kernel) -> None:
    """A task may sleep in its code for as long as it likes: nobody has looked."""
    with patches_immediate("fix_steps"):
        kernel.enable(livepatch("fix_steps", NAP))
        module = kernel.enabled[0].module
        sleeper(kernel, "nap(5000)")
        kernel.disable("fix_steps")
    assert kernel.enabled == []
    assert state(kernel).stack[1].startswith("new_nap+")
    assert "fix_steps" in kernel.machine.modules.objects
    assert kernel.machine.view("module", module.struct).refcnt.counter == 2
    kernel.tasks.run(6000)
    assert results(kernel) == [2]
    assert found(kernel, "nobody_runs_what_is_freed") == []


def test_without_the_variant_a_disabled_patch_takes_its_module_with_it(kernel: Kernel) -> None:
    kernel.enable(livepatch("fix_steps", NAP))
    sleeper(kernel, "nap(5000)")
    kernel.disable("fix_steps")
    assert state(kernel).why == "is sleeping on function nap"
    kernel.tasks.wait_for_transition()
    assert "fix_steps" not in kernel.machine.modules.objects
    kernel.verify().raise_for_findings()


def stacked(name: str, code: str, *funcs: Func) -> Patch:
    return livepatch(code, *funcs, name=name)


def test_a_later_patch_cannot_see_a_task_in_the_last_but_one_immediate_patch(kernel: Kernel) -> None:
    """The reason why d0807da78e11 removed the feature: patches 1i, 2i, 3 of one function.

    The stack check of 3 looks for 2i; the task is in 1i, and goes on in it with the functions of 3.
    """
    with patches_immediate("first", "second"):
        kernel.enable(stacked("first", "fix_steps", TRANSACT))
        sleeper(kernel, "transact(5000)")
        assert state(kernel).stack[1].startswith("new_transact+")
        kernel.enable(stacked("second", "fix_steps2", TRANSACT))
        kernel.enable(stacked("third", "fix_steps2", TRANSACT, *STEPS))
        assert kernel.in_transition == "", "nobody holds the third patch up"
        kernel.tasks.run(6000)
        assert results(kernel) == [0x13]


def test_without_the_variant_each_patch_waits_for_the_one_before(kernel: Kernel) -> None:
    kernel.enable(stacked("first", "fix_steps", TRANSACT))
    sleeper(kernel, "transact(5000)")
    kernel.enable(stacked("second", "fix_steps2", TRANSACT))
    assert state(kernel).why == "is sleeping on function transact"
    with pytest.raises(KernelErrno, match="'second' is in transition"):
        kernel.enable(stacked("third", "fix_steps2", TRANSACT, *STEPS))
    kernel.tasks.wait_for_transition()
    kernel.enable(stacked("third", "fix_steps2", TRANSACT, *STEPS))
    kernel.tasks.wait_for_transition()
    kernel.tasks.run(12_000)
    assert set(results(kernel)) == {OLD, 0x33}
    kernel.verify().raise_for_findings()


# Which patches, and what goes wrong.


def test_only_the_patches_that_are_named_are_immediate(kernel: Kernel) -> None:
    sleeper(kernel, "nap(5000)")
    with patches_immediate("fix_area"):
        kernel.enable(livepatch("fix_steps", NAP))
        assert kernel.in_transition == "fix_steps"
        with pytest.raises(KernelErrno, match="'fix_steps' is in transition"):
            kernel.enable(fix_area())
        kernel.tasks.wait_for_transition()
        kernel.enable(fix_area())
        assert kernel.in_transition == ""
        kernel.disable("fix_steps")
        kernel.tasks.wait_for_transition()
        assert "fix_steps" not in kernel.machine.modules.objects
        kernel.verify().raise_for_findings()


def test_no_patch_is_immediate_and_replaces(kernel: Kernel) -> None:
    kernel.enable(fix_area())
    with (
        patches_immediate("fix_shapes"),
        pytest.raises(KlpemuError, match="'fix_shapes' is immediate and replaces"),
    ):
        kernel.enable(fix_shapes())
    assert [each.patch.name for each in kernel.enabled] == ["fix_area"]
    kernel.verify().raise_for_findings()


def test_an_immediate_patch_that_fails_is_taken_back_whole(kernel: Kernel) -> None:
    funcs = Func("area_of", "fixed_area_of"), Func("notrace_add", "fixed_perimeter_of")
    with patches_immediate("fix_area"), pytest.raises(KernelErrno, match="failed to find location"):
        kernel.enable(livepatch("fix_area", *funcs))
    assert kernel.in_transition == ""
    assert kernel.function_stack("area_of") == []
    assert "livepatch: 'fix_area': canceling patching transition, going to unpatch" in kernel.log
    kernel.verify().raise_for_findings()
    kernel.enable(fix_area())


# Immediate functions.


def test_an_immediate_func_is_not_looked_for_on_stacks(kernel: Kernel) -> None:
    """What schedule() would be, the bottom of every sleeping task's stack, is nap() here."""
    sleeper(kernel, "nap(600000)")
    kernel.enable(livepatch("fix_steps", NAP, *STEPS))
    kernel.tasks.run(30_000)
    assert state(kernel).why == "is sleeping on function nap", "for ten minutes"
    kernel.reverse("fix_steps")
    kernel.tasks.wait_for_transition()
    with funcs_immediate("nap"):
        kernel.enable(livepatch("fix_steps", NAP, *STEPS))
        assert kernel.in_transition == ""
    (left,) = found(kernel, "switched_tasks_have_left_what_changes")
    assert left.endswith("was switched while nap is on its stack, which 'fix_steps' changes")


def test_the_other_funcs_of_the_patch_are_looked_for(kernel: Kernel) -> None:
    sleeper(kernel, "transact(2000)")
    with funcs_immediate("nap"):
        kernel.enable(livepatch("fix_steps", NAP, TRANSACT))
        assert state(kernel).why == "is sleeping on function transact"
        kernel.tasks.wait_for_transition()
    kernel.verify().raise_for_findings()


@pytest.mark.parametrize("immediate", [True, False])
def test_a_patch_with_an_immediate_func_keeps_its_module(kernel: Kernel, immediate: bool) -> None:
    with funcs_immediate("nap" if immediate else "transact"):
        kernel.enable(livepatch("fix_steps", NAP))
        kernel.disable("fix_steps")
    assert ("fix_steps" in kernel.machine.modules.objects) is immediate


# Afterwards.


@pytest.mark.parametrize("variant", [patches_immediate, funcs_immediate])
def test_a_variant_is_gone_when_its_block_ends(
    kernel: Kernel, variant: Callable[..., AbstractContextManager[None]]
) -> None:
    before = [getattr(module, name) for module, name in REPLACED]

    def fail_inside() -> None:
        with variant("fix_area"):
            assert [getattr(module, name) for module, name in REPLACED] != before
            kernel.enable(livepatch("fix_area", Func("nobody", "fixed_area_of")))

    with pytest.raises(KlpemuError):
        fail_inside()
    assert [getattr(module, name) for module, name in REPLACED] == before


def test_the_table_in_the_docs_is_what_is_measured() -> None:
    now, then = across(nullcontext), across(lambda: patches_immediate("fix_steps"))
    rows = {
        "virtual seconds until the patch is everybody's": (f"{now.seconds:.1f}", f"{then.seconds:.1f}"),
        "what `transact()` returns": (f"`{now.result:#x}`", f"`{then.result:#x}`"),
        "`versions_are_never_mixed`": ("holds", f"{len(then.mixed)} finding"),
    }
    assert now.mixed == []
    text = PAGE_OF_DOCS.read_text()
    for name, (without, immediate) in rows.items():
        assert f"| {name} | {without} | {immediate} |" in text, (name, without, immediate)
