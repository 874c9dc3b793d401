"""The Python front door: odd orders and odd input leave the kernel as it was."""

import pytest

from klpemu import Func, Kernel, KernelErrno, KlpemuError, Patch

AREA = Func("area_of", "fixed_area_of")


def fix_area(objname: str = "vmlinux", name: str = "fix_area") -> Patch:
    return Patch(name, {objname: [AREA]}, code="builtin:fix_area.o")


@pytest.mark.parametrize("sympos", [-1, 1 << 64])
def test_a_symbol_position_out_of_range_is_refused(sympos: int) -> None:
    with pytest.raises(KlpemuError, match=f"symbol position {sympos}"):
        Func("area_of", "fixed_area_of", sympos)


@pytest.mark.parametrize("name", ["", "vmlinux", "a b", "fix/../x", "é", "."])
def test_a_patch_is_named_as_a_module_can_be(name: str) -> None:
    with pytest.raises(KlpemuError, match="no patch can be called"):
        Patch(name, {"vmlinux": [AREA]})


def test_an_object_without_a_name_is_refused() -> None:
    with pytest.raises(KlpemuError, match="no object is called ''"):
        Patch("fix_area", {"": [AREA]})


def test_a_module_that_a_patch_cannot_be_applied_to_is_refused() -> None:
    kernel = Kernel.load()
    kernel.enable(fix_area("fix_shapes"))  # it names functions that fix_shapes does not have
    before = len(kernel.log)
    with pytest.raises(KernelErrno) as caught:
        kernel.load_module("builtin:fix_shapes.o")
    assert caught.value.name == "EINVAL"
    assert kernel.log[before:] == [
        "livepatch: symbol 'area_of' not found in symbol table",
        "livepatch: failed to initialize patch 'fix_area' for module 'fix_shapes' (-22)",
        "livepatch: patch 'fix_area' failed for module 'fix_shapes', refusing to load module 'fix_shapes'",
    ]
    assert "fix_shapes" not in kernel.machine.modules.objects
    assert kernel.verify().holds
    kernel.disable("fix_area")
    assert kernel.load_module("builtin:fix_shapes.o") == "fix_shapes"
    assert kernel.verify().holds


def test_a_module_in_use_by_a_patch_is_not_unloaded() -> None:
    kernel = Kernel.load()
    kernel.enable(fix_area())
    with pytest.raises(KernelErrno, match="in use"):
        kernel.unload_module("fix_area")
    assert kernel.verify().holds


def test_after_an_ftrace_bug_every_new_patch_gets_the_same_answer() -> None:
    kernel = Kernel.load()
    kernel.enable(fix_area())
    site, _ = kernel.site_of("area_of")
    kernel.machine.space.write(site, b"\x90")
    kernel.disable("fix_area")  # the kernel warns and goes on
    assert "------------[ ftrace bug ]------------" in kernel.log
    assert kernel.enabled == []
    other = Patch(
        "fix_area2", {"vmlinux": [Func("perimeter_of", "perimeter_in_cm")]}, code="builtin:fix_area2.o"
    )
    for _ in range(2):
        with pytest.raises(KernelErrno) as caught:
            kernel.enable(other)
        assert caught.value.name == "ENODEV"
