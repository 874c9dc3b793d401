"""Patches before v5.1: registered, enabled, disabled and unregistered, in the order of a stack."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from livepatches import AREA, AREA_IN_CM, BUILD, CHECKED_PERIMETER, fix_area, fix_area2, livepatch

from elf.errors import KlpemuError
from emu.errno import KernelErrno
from klpemu import Func, Kernel, Patch
from klpemu.registered import enable, register, unregister
from patches import core, stacks, transition
from patches.variants.registration import klp_unregister_patch, patches_registered

PAGE_OF_DOCS = Path(__file__).resolve().parents[3] / "docs" / "variants.md"
ONE, TWO, THREE = "fix_area", "fix_area2", "fix_shapes"
PATCHES = {
    ONE: livepatch(ONE, AREA),
    TWO: livepatch(TWO, AREA_IN_CM),
    THREE: livepatch(THREE, CHECKED_PERIMETER),
}


@pytest.fixture
def old() -> Iterator[Kernel]:
    """A kernel before v5.1."""
    with patches_registered():
        yield Kernel.load()


def outcome(step: Callable[[], object]) -> str:
    """The errno's name of a step, "" if it works."""
    try:
        step()
    except KernelErrno as error:
        return error.name
    return ""


def walk(kernel: Kernel, steps: list[tuple[Callable[[Kernel, str], None], str]]) -> list[tuple[str, int]]:
    """What each step gives, and what area_of(3, 4) is after it."""
    found = []
    for step, name in steps:
        came = outcome(partial(step, kernel, name))
        kernel.verify().raise_for_findings()
        found.append((came, kernel.call("area_of", 3, 4)))
    return found


def registers(kernel: Kernel, name: str) -> None:
    register(kernel, PATCHES[name])


def loads(kernel: Kernel, name: str) -> None:
    kernel.enable(PATCHES[name])


def disables(kernel: Kernel, name: str) -> None:
    kernel.disable(name)


def unregisters(kernel: Kernel, name: str) -> None:
    unregister(kernel, name)


def test_a_third_patch_cannot_be_enabled_while_the_second_is_off(old: Kernel) -> None:
    """register 1, enable 1, register 2, enable 2, disable 2, register 3, enable 3, as v4.19 answers it."""
    assert walk(
        old,
        [
            (registers, ONE),
            (enable, ONE),
            (registers, TWO),
            (enable, TWO),
            (disables, TWO),
            (registers, THREE),
            (enable, THREE),
        ],
    ) == [("", 7), ("", 12), ("", 12), ("", 120000), ("", 12), ("", 12), ("EBUSY", 12)]
    assert not any("fix_shapes" in line for line in old.log), "a refused patch is not even mentioned"
    assert old.call("perimeter_of", 2**64 - 1, 1) == 0


def test_today_the_same_sequence_enables_the_third_and_has_lost_the_second(kernel: Kernel) -> None:
    steps = [(loads, ONE), (loads, TWO), (disables, TWO), (loads, THREE), (disables, TWO)]
    assert walk(kernel, steps) == [("", 12), ("", 120000), ("", 12), ("", 12), ("ENOENT", 12)]
    assert kernel.call("perimeter_of", 2**64 - 1, 1) == 2**64 - 1


def test_the_documented_table_is_what_happens() -> None:
    """docs/variants.md tells of both walks."""
    rows = [line for line in PAGE_OF_DOCS.read_text().splitlines() if line.startswith("| enable 3 |")]
    assert rows == ["| enable 3 | `-EBUSY`: 2, below it, is disabled | enabled |"]


def test_a_registered_patch_changes_nothing_and_logs_nothing(old: Kernel) -> None:
    sites, lines = old.site_of("area_of"), len(old.log)
    register(old, fix_area())
    assert (old.site_of("area_of"), old.log[lines:]) == (sites, [])
    assert old.function_stack("area_of") == []
    old.verify().raise_for_findings()


def test_a_patch_is_switched_on_and_off_as_often_as_one_likes(old: Kernel) -> None:
    register(old, fix_area())
    for _ in range(3):
        enable(old, ONE)
        assert old.call("area_of", 3, 4) == 12
        old.disable(ONE)
        assert old.call("area_of", 3, 4) == 7
        old.verify().raise_for_findings()
    unregister(old, ONE)
    assert ONE not in old.machine.modules.objects
    old.verify().raise_for_findings()


def test_only_the_last_enabled_patch_can_be_disabled(old: Kernel) -> None:
    for name in (ONE, TWO):
        registers(old, name)
        enable(old, name)
    lines = len(old.log)
    assert outcome(lambda: old.disable(ONE)) == "EBUSY"
    assert old.log[lines:] == [], "the kernel says nothing"
    assert outcome(lambda: old.disable(TWO)) == ""
    assert outcome(lambda: old.disable(ONE)) == ""


def test_a_disabled_patch_on_top_does_not_hold_the_one_below(old: Kernel) -> None:
    registers(old, ONE)
    enable(old, ONE)
    registers(old, TWO)
    assert outcome(lambda: old.disable(ONE)) == ""
    assert outcome(lambda: enable(old, TWO)) == "EBUSY"


@pytest.mark.parametrize("times", [0, 1])
def test_the_state_that_it_has_cannot_be_asked_for(old: Kernel, times: int) -> None:
    register(old, fix_area())
    if times:
        enable(old, ONE)
    asked = (lambda: enable(old, ONE)) if times else (lambda: old.disable(ONE))
    assert outcome(asked) == "EINVAL"


def test_a_patch_that_nobody_registered_cannot_be_enabled(old: Kernel) -> None:
    with pytest.raises(KernelErrno, match="not registered") as caught:
        old.enable(fix_area())
    assert caught.value.name == "EINVAL"
    assert ONE not in old.machine.modules.objects
    old.verify().raise_for_findings()


def test_an_enabled_patch_holds_its_module_and_cannot_be_unregistered(old: Kernel) -> None:
    register(old, fix_area())
    module = old.machine.view("module", old.machine.modules.objects[ONE].struct)
    before = module.refcnt.counter
    enable(old, ONE)
    assert module.refcnt.counter == before + 1
    assert outcome(lambda: unregister(old, ONE)) == "EAGAIN"
    guest = old.enabled[0].guest
    wants = outcome(lambda: old.machine.service("exit", lambda: klp_unregister_patch(old.klp, guest)))
    assert wants == "EBUSY"
    old.disable(ONE)
    assert module.refcnt.counter == before
    unregister(old, ONE)


def test_a_patch_that_cannot_be_enabled_stays_registered_and_gives_its_module_back(old: Kernel) -> None:
    register(old, livepatch("fix_all", Func("fib", "fixed_fib"), Func("notrace_add", "fixed_sum_many")))
    module = old.machine.view("module", old.machine.modules.objects["fix_all"].struct)
    before = module.refcnt.counter
    assert outcome(lambda: enable(old, "fix_all")) == "EINVAL"
    assert module.refcnt.counter == before
    assert old.log[-1] == "livepatch: 'fix_all': unpatching complete"
    old.verify().raise_for_findings()
    assert outcome(lambda: unregister(old, "fix_all")) == ""
    old.verify().raise_for_findings()


def test_symbols_are_looked_for_when_a_patch_is_registered(old: Kernel) -> None:
    allocations = dict(old.machine.slab.live)
    assert outcome(lambda: register(old, livepatch(ONE, Func("nobody", "fixed_area_of")))) == "EINVAL"
    assert old.log == ["livepatch: symbol 'nobody' not found in symbol table"]
    assert (dict(old.machine.slab.live), old.enabled) == (allocations, [])
    old.verify().raise_for_findings()


def test_a_patch_in_transition_keeps_all_others_waiting() -> None:
    with patches_registered():
        kernel = Kernel.load(observe=True)
        kernel.tasks.spawn("sleeper", ["nap(2500)"], repeat=None)
        kernel.tasks.run(100)
        register(kernel, livepatch("fix_steps", Func("nap", "new_nap")))
        registers(kernel, ONE)
        enable(kernel, "fix_steps")
        assert kernel.in_transition == "fix_steps"
        assert outcome(lambda: enable(kernel, ONE)) == "EBUSY"
        kernel.disable("fix_steps")  # turns it around
        kernel.tasks.wait_for_transition()
        assert kernel.log[-1] == "livepatch: 'fix_steps': unpatching complete"
        enable(kernel, "fix_steps")
        kernel.tasks.wait_for_transition()
        enable(kernel, ONE)
        kernel.tasks.wait_for_transition()
        kernel.verify().raise_for_findings()
        assert kernel.call("area_of", 3, 4) == 12


def test_after_a_forced_transition_the_module_stays() -> None:
    with patches_registered():
        kernel = Kernel.load()
        kernel.tasks.spawn("sleeper", ["nap(2500)"], repeat=None)
        kernel.tasks.run(100)
        register(kernel, livepatch("fix_steps", Func("nap", "new_nap")))
        enable(kernel, "fix_steps")
        kernel.force("fix_steps")
        kernel.tasks.wait_for_transition()
        kernel.disable("fix_steps")
        kernel.tasks.wait_for_transition()
        assert kernel.call("nap", 1) == 1
        assert outcome(lambda: unregister(kernel, "fix_steps")) == "EAGAIN"


def test_only_an_enabled_patch_applies_to_a_module_that_comes(old: Kernel) -> None:
    func = Func("checked_perimeter_of", "fixed_perimeter_of")
    register(old, Patch(ONE, {"fix_shapes": [func]}, code=BUILD / "fix_area.o"))
    module = BUILD / "fix_shapes.o"
    old.load_module(module)
    assert old.log == []
    enable(old, ONE)
    assert len(old.function_stack("fix_shapes:checked_perimeter_of")) == 1
    old.disable(ONE)
    lines = len(old.log)
    old.unload_module("fix_shapes")
    assert old.log[lines:] == []
    enable(old, ONE)
    lines = len(old.log)
    old.load_module(module)
    assert old.log[lines:] == ["livepatch: applying patch 'fix_area' to loading module 'fix_shapes'"]
    old.verify().raise_for_findings()


def test_what_replaces_was_never_registered(old: Kernel) -> None:
    with pytest.raises(KlpemuError, match="replaces, and is registered"):
        register(old, fix_area2(replace=True))
    old.verify().raise_for_findings()


def test_behind_the_block_everything_is_the_reference_again() -> None:
    owners = (core, stacks, transition)
    before = [dict(vars(each)) for each in owners]
    with patches_registered():
        inside = [dict(vars(each)) for each in owners]
    changed = [
        name
        for one, other in zip(before, inside, strict=True)
        for name in one
        if one[name] is not other[name]
    ]
    assert len(changed) == 10
    assert [dict(vars(each)) for each in owners] == before
