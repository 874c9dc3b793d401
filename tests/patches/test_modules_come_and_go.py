"""klp_module_coming() and klp_module_going(): patches and the modules that they change."""

from pathlib import Path

import pytest
from livepatches import BUILD

from klpemu import Func, Kernel, Patch

MODULE = BUILD / "fix_shapes.o"  # a module with checked_perimeter_of(), to be patched
IN_CM = 1400


def patch_of(code: str, new: str, *, replace: bool = False) -> Patch:
    funcs = [Func("checked_perimeter_of", new)]
    return Patch(code, {"fix_shapes": funcs}, code=BUILD / f"{code}.o", replace=replace)


def first() -> Patch:
    return patch_of("fix_area", "fixed_perimeter_of")


def second(*, replace: bool = False) -> Patch:
    return patch_of("fix_area2", "perimeter_in_cm", replace=replace)


def stack(kernel: Kernel) -> list[str]:
    return [each.split("+")[0] for each in kernel.function_stack("fix_shapes:checked_perimeter_of")]


def test_a_patch_applies_to_a_module_that_comes_later(kernel: Kernel) -> None:
    kernel.enable(first())
    before = len(kernel.log)
    kernel.load_module(MODULE)
    assert kernel.log[before:] == ["livepatch: applying patch 'fix_area' to loading module 'fix_shapes'"]
    assert stack(kernel) == ["fixed_perimeter_of"]
    kernel.verify("late").raise_for_findings()


def test_patches_apply_in_their_order_so_that_the_newest_wins(kernel: Kernel) -> None:
    kernel.enable(first())
    kernel.enable(second())
    kernel.load_module(MODULE)
    assert stack(kernel) == ["perimeter_in_cm", "fixed_perimeter_of"]
    assert kernel.call("fix_shapes:checked_perimeter_of", 3, 4) == IN_CM
    kernel.verify("late").raise_for_findings()


def test_what_a_patch_changed_in_a_module_goes_with_it_and_comes_back_with_it(kernel: Kernel) -> None:
    kernel.load_module(MODULE)
    kernel.enable(first())
    kernel.enable(second())
    before = len(kernel.log)
    kernel.unload_module("fix_shapes")
    assert kernel.log[before:] == [
        "livepatch: reverting patch 'fix_area' on unloading module 'fix_shapes'",
        "livepatch: reverting patch 'fix_area2' on unloading module 'fix_shapes'",
    ]
    assert [each.patch.name for each in kernel.enabled] == ["fix_area", "fix_area2"]
    kernel.verify("gone").raise_for_findings()
    kernel.load_module(MODULE)
    assert stack(kernel) == ["perimeter_in_cm", "fixed_perimeter_of"]
    for name in ("fix_area2", "fix_area"):
        kernel.disable(name)
    kernel.unload_module("fix_shapes")
    kernel.verify("end").raise_for_findings()


def test_if_the_second_patch_fails_the_first_is_undone_and_the_module_refused(
    kernel: Kernel, tmp_path: Path
) -> None:
    kernel.enable(first())
    wrong = Patch(
        "fix_area2", {"fix_shapes": [Func("not_there", "perimeter_in_cm")]}, code=BUILD / "fix_area2.o"
    )
    kernel.enable(wrong)
    before = len(kernel.log)
    with pytest.raises(Exception, match="not_there"):
        kernel.load_module(MODULE)
    assert kernel.log[before:] == [
        "livepatch: applying patch 'fix_area' to loading module 'fix_shapes'",
        "livepatch: symbol 'not_there' not found in symbol table",
        "livepatch: failed to initialize patch 'fix_area2' for module 'fix_shapes' (-22)",
        "livepatch: patch 'fix_area2' failed for module 'fix_shapes', refusing to load module 'fix_shapes'",
        "livepatch: reverting patch 'fix_area' on unloading module 'fix_shapes'",
    ]
    assert "fix_shapes" not in kernel.machine.modules.objects
    kernel.verify("refused").raise_for_findings()


def test_a_module_called_vmlinux_is_refused(kernel: Kernel, tmp_path: Path) -> None:
    copy = tmp_path / "vmlinux.o"
    copy.write_bytes(MODULE.read_bytes())
    with pytest.raises(Exception, match="invalid module name"):
        kernel.load_module(copy)
    assert kernel.log[-1] == "livepatch: vmlinux.ko: invalid module name"
    kernel.verify("refused").raise_for_findings()


def test_a_module_that_comes_in_the_middle_of_a_transition_joins_it() -> None:
    kernel = Kernel.load(cpus=2, observe=True)
    kernel.enable(first())
    assert kernel.in_transition == "fix_area"
    kernel.load_module(MODULE)
    assert stack(kernel) == ["fixed_perimeter_of"]
    kernel.tasks.wait_for_transition()
    kernel.verify("after").raise_for_findings()
