"""Calls at every moment of a transition: orders of stores that go wrong for a moment only."""

from collections.abc import Callable
from typing import Any

import pytest
from livepatches import fix_area

from klpemu import Func, Kernel, Patch
from patches import core, patch, transition
from patches.invariants.moments import MOMENT
from patches.klp import Klp
from patches.variants import replaced

SHAPES = Patch(
    "fix_shapes",
    {"vmlinux": [Func("perimeter_of", "checked_perimeter_of")]},
    "builtin:fix_shapes.o",
    replace=True,
)

FORM = Patch("fix_form", {"endbr": [Func("form_both", "fixed_area_of")]}, "builtin:fix_area.o")


@pytest.fixture
def observed() -> Kernel:
    return Kernel.load(cpus=2, observe=True)


def found(kernel: Kernel) -> list[str]:
    return [each.what for each in kernel.verify("now").findings if each.invariant == MOMENT]


def checked(kernel: Kernel) -> int:
    return kernel.verify("now").checks[MOMENT]


def test_each_store_of_a_transition_is_judged(observed: Kernel) -> None:
    assert checked(observed) == 0
    observed.enable(fix_area())
    observed.tasks.wait_for_transition()
    assert checked(observed) > 2 * len(observed.machine.tasks)
    observed.disable("fix_area")
    observed.tasks.wait_for_transition()
    assert checked(observed) > 2 * len(observed.machine.tasks)
    observed.verify("gone").raise_for_findings()


def test_replacing_takes_each_function_straight_to_what_it_will_be(observed: Kernel) -> None:
    observed.enable(fix_area())
    observed.tasks.wait_for_transition()
    observed.enable(SHAPES)
    observed.tasks.wait_for_transition()
    assert found(observed) == []


def test_a_module_that_comes_in_a_transition_is_no_version(observed: Kernel) -> None:
    observed.tasks.spawn("sleeper", ["nap(2500)"])
    observed.tasks.run(100)
    observed.insmod("builtin:klp_lamp.ko")
    observed.tasks.wait_for_transition()
    observed.enable(Patch("nap_1", {"vmlinux": [Func("nap", "new_nap")]}, "builtin:fix_steps.o"))
    observed.load_module("builtin:lamp.ko")
    observed.tasks.wait_for_transition()
    observed.disable("klp_lamp")
    observed.unload_module("lamp")
    observed.tasks.wait_for_transition()
    assert found(observed) == []


def test_a_func_stack_that_goes_with_a_module_is_forgotten(observed: Kernel) -> None:
    """Its klp_ops is freed, and nobody looks at it when the next task gets a patch_state."""
    observed.load_module("builtin:endbr.o")
    observed.enable(FORM)
    observed.tasks.wait_for_transition()
    observed.tasks.spawn("sleeper", ["nap(2500)"])
    observed.tasks.run(100)
    observed.enable(Patch("nap_1", {"vmlinux": [Func("nap", "new_nap")]}, "builtin:fix_steps.o"))
    observed.unload_module("endbr")
    observed.load_module("builtin:endbr.o")
    observed.tasks.spawn("another", ["nap(10)"])
    assert observed.in_transition
    assert found(observed) == []


def first(function: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    """Another order of two parts of klp_complete_transition()."""

    def both(klp: Klp, patch_: Any) -> None:
        function(klp, patch_)
        then(klp, patch_)

    return both


def test_the_old_function_on_top_for_a_moment_is_found(observed: Kernel) -> None:
    observed.enable(fix_area())
    observed.tasks.wait_for_transition()
    order = first(core.klp_discard_nops, core.klp_unpatch_replaced_patches)
    with replaced(core, "klp_unpatch_replaced_patches", order):
        observed.enable(SHAPES)
        observed.tasks.wait_for_transition()
    (what,) = found(observed)
    assert what.startswith("a call of area_of+0x0/")
    assert "KLP_PATCHED would reach fixed_area_of+0x0/" in what


@pytest.mark.parametrize("declared", [fix_area(), FORM], ids=["vmlinux", "module"])
def test_a_func_that_is_on_its_stack_before_it_is_in_transition_is_found(
    observed: Kernel, declared: Patch
) -> None:
    observed.load_module("builtin:endbr.o")
    klp_patch_func = patch._klp_patch_func

    def klp_patch_func_at_once(klp: Klp, func: Any) -> None:
        func.transition = False
        klp_patch_func(klp, func)
        func.transition = True

    with replaced(patch, "_klp_patch_func", klp_patch_func_at_once):
        observed.enable(declared)
    assert any("KLP_UNPATCHED would reach fixed_area_of" in each for each in found(observed))


def test_a_func_in_transition_while_tasks_have_no_state_is_found(observed: Kernel) -> None:
    observed.enable(fix_area())
    observed.tasks.wait_for_transition()
    init = transition.klp_init_transition

    def funcs_first(klp: Klp, patch_: Any, state: int) -> None:
        for obj in transition.klp_for_each_object(patch_):
            for func in transition.klp_for_each_func(obj):
                func.transition = True
        init(klp, patch_, state)

    with replaced(transition, "klp_init_transition", funcs_first):
        observed.disable("fix_area")
    assert set(found(observed)) == {
        "a func comes into transition while a task is neither KLP_PATCHED nor KLP_UNPATCHED"
    }
