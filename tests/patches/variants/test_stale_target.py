"""The second RFC of the per-task model: an immediate patch goes where the last transition went."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from livepatches import AREA, fix_area2, livepatch

from elf.errors import KlpemuError
from klpemu import Func, Kernel
from patches import transition
from patches.klp import Klp
from patches.variants import replaced
from patches.variants.immediate import patches_immediate
from patches.variants.stale_target import target_state_stale

PAGE_OF_DOCS = Path(__file__).resolve().parents[3] / "docs" / "variants.md"
WRONG, RIGHT = 7, 12
KLP_UNDEFINED, KLP_UNPATCHED, KLP_PATCHED = -1, 0, 1
STALE = "klp_target_state is {}, no transition is on"
Immediate = Callable[..., AbstractContextManager[None]]


def enable_first(immediate: Immediate) -> Kernel:
    """An immediate patch before any other transition."""
    kernel = Kernel.load()
    with immediate("fix_area"):
        kernel.enable(livepatch("fix_area", AREA))
    return kernel


def disable_after_another(immediate: Immediate) -> Kernel:
    """An immediate patch, enabled and disabled after another patch was enabled."""
    kernel = Kernel.load()
    with immediate("fix_area"):
        kernel.enable(livepatch("fix_steps", Func("nap", "new_nap")))
        kernel.enable(livepatch("fix_area", AREA))
        kernel.disable("fix_area")
    return kernel


def found(kernel: Kernel) -> dict[str, str]:
    return {each.invariant: each.what for each in kernel.verify().findings}


def test_the_first_immediate_patch_is_taken_back_at_once_and_counts_as_enabled() -> None:
    """klp_target_state is 0 as a static variable is, KLP_UNPATCHED: the patching becomes an unpatching."""
    with target_state_stale("fix_area"):
        kernel = Kernel.load()
        kernel.enable(livepatch("fix_area", AREA))
        assert kernel.log == [
            "livepatch: enabling patch 'fix_area'",
            "livepatch: 'fix_area': starting unpatching transition",
            "livepatch: 'fix_area': completing unpatching transition",
            "livepatch: 'fix_area': unpatching complete",
        ]
        assert kernel.enabled[0].guest.enabled, "/sys/kernel/livepatch/fix_area/enabled says 1"
        assert kernel.call("area_of", 3, 4) == WRONG
        what = found(kernel)
        assert what["func_stacks_hold_the_patches"] == "func_stack is [], expected [fixed_area_of]"
        assert what["tasks_are_settled"] == STALE.format(KLP_UNPATCHED)


def test_the_merged_model_stores_the_target_state_first() -> None:
    with patches_immediate("fix_area"):
        kernel = Kernel.load()
        kernel.enable(livepatch("fix_area", AREA))
        assert kernel.call("area_of", 3, 4) == RIGHT
        assert kernel.log[-1] == "livepatch: 'fix_area': patching complete"
        kernel.verify().raise_for_findings()


def test_after_a_patch_was_enabled_an_immediate_one_can_be_enabled_but_not_disabled() -> None:
    with target_state_stale("fix_area"):
        kernel = Kernel.load()
        kernel.enable(livepatch("fix_steps", Func("nap", "new_nap")))
        kernel.enable(livepatch("fix_area", AREA))
        assert kernel.call("area_of", 3, 4) == RIGHT
        kernel.disable("fix_area")
        assert [each.patch.name for each in kernel.enabled] == ["fix_steps"]
        assert kernel.call("area_of", 3, 4) == RIGHT, "it is disabled and goes on redirecting"
        assert kernel.log[-1] == "livepatch: 'fix_area': patching complete"
        what = found(kernel)
        assert what["func_stacks_hold_the_patches"] == "func_stack is [fixed_area_of], expected []"
        assert what["tasks_are_settled"] == STALE.format(KLP_PATCHED)


def test_in_the_merged_model_it_can() -> None:
    with patches_immediate("fix_area"):
        kernel = Kernel.load()
        kernel.enable(livepatch("fix_steps", Func("nap", "new_nap")))
        kernel.enable(livepatch("fix_area", AREA))
        kernel.disable("fix_area")
        assert kernel.call("area_of", 3, 4) == WRONG
        assert kernel.log[-1] == "livepatch: 'fix_area': unpatching complete"
        kernel.verify().raise_for_findings()


def test_after_a_patch_was_disabled_an_immediate_one_cannot_be_enabled() -> None:
    with target_state_stale("fix_area"):
        kernel = Kernel.load()
        kernel.enable(fix_area2())
        kernel.disable("fix_area2")
        kernel.enable(livepatch("fix_area", AREA))
        assert kernel.call("area_of", 3, 4) == WRONG


def test_patches_that_are_not_immediate_go_where_they_should() -> None:
    with target_state_stale("fix_area"):
        kernel = Kernel.load()
        kernel.tasks.spawn("sleeper", ["nap(1500)", "both_steps()"], repeat=None)
        kernel.tasks.run(100)
        for _ in range(2):
            kernel.enable(livepatch("fix_steps", Func("nap", "new_nap")))
            assert kernel.in_transition == "fix_steps"
            kernel.tasks.wait_for_transition()
            assert kernel.function_stack("nap") != []
            kernel.disable("fix_steps")
            kernel.tasks.wait_for_transition()
            assert kernel.function_stack("nap") == []
        assert kernel.machine.warnings == []


def test_a_target_state_that_ends_as_undefined_is_noticed_where_nobody_set_it() -> None:
    """The other half of the fix: with it, what the RFC forgot would have been a WARN."""

    def klp_init_transition(klp: Klp, patch_: object, state: int) -> None:
        klp.klp_transition_patch.set(patch_)

    with patches_immediate("fix_area"), replaced(transition, "klp_init_transition", klp_init_transition):
        kernel = Kernel.load()
        kernel.enable(livepatch("fix_area", AREA))
        assert kernel.machine.warnings == [
            "WARNING at klp_start_transition: klp_target_state == KLP_UNDEFINED",
            "WARNING at klp_try_complete_transition: klp_target_state == KLP_UNDEFINED",
        ]


def test_a_variant_is_gone_when_its_block_ends_and_so_is_the_stale_state() -> None:
    names = ("klp_init_transition", "klp_start_transition", "klp_try_complete_transition")
    before = [getattr(transition, name) for name in (*names, "klp_complete_transition")]
    kernel = Kernel.load()

    def fail_inside() -> None:
        with target_state_stale("fix_area"):
            assert transition.klp_init_transition is not before[0]
            kernel.enable(fix_area2())
            assert kernel.klp.klp_target_state.get() == KLP_PATCHED
            kernel.enable(livepatch("fix_area", Func("nobody", "fixed_area_of")))

    with pytest.raises(KlpemuError):
        fail_inside()
    assert [getattr(transition, name) for name in (*names, "klp_complete_transition")] == before
    assert kernel.klp.klp_target_state.get() == KLP_UNDEFINED
    kernel.disable("fix_area2")
    assert kernel.machine.warnings == []
    kernel.verify().raise_for_findings()


def test_the_table_in_the_docs_is_what_happens() -> None:
    rows = {
        "enabled before any other transition": enable_first,
        "disabled after another patch was enabled": disable_after_another,
    }
    text = PAGE_OF_DOCS.read_text()
    for name, scenario in rows.items():
        cells = [
            scenario(variant).call("area_of", 3, 4) for variant in (patches_immediate, target_state_stale)
        ]
        assert len(set(cells)) == 2
        assert f"| {name} | {cells[0]} | {cells[1]} |" in text, (name, cells)
