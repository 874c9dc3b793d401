"""The files that later kernels have beside those of 6.1."""

import pytest
from livepatches import fix_area, fix_area2, fix_shapes

from emu.errno import KernelErrno
from klpemu import Kernel
from patches.variants import variant
from patches.variants.sysfs_attributes import replace_attribute, stack_order_attribute

ROOT = "/sys/kernel/livepatch"


def test_replace_says_whether_a_patch_replaces(kernel: Kernel) -> None:
    with replace_attribute():
        kernel.enable(fix_area())
        assert kernel.read(f"{ROOT}/fix_area/replace") == "0\n"
        kernel.enable(fix_shapes())
        assert kernel.read(f"{ROOT}/fix_shapes/replace") == "1\n"
        with pytest.raises(KernelErrno, match="EACCES"):
            kernel.write(f"{ROOT}/fix_shapes/replace", "0")


def test_stack_order_counts_from_the_oldest_that_is_enabled(kernel: Kernel) -> None:
    with stack_order_attribute():
        kernel.enable(fix_area(name="one"))
        kernel.enable(fix_area2(name="two"))
        kernel.enable(fix_area(name="three"))
        assert orders(kernel) == {"one": "1", "two": "2", "three": "3"}
        kernel.disable("one")
        assert orders(kernel) == {"two": "1", "three": "2"}
        kernel.enable(fix_area(name="one"))
        assert orders(kernel) == {"two": "1", "three": "2", "one": "3"}


def orders(kernel: Kernel) -> dict[str, str]:
    names = kernel.machine.kernfs.listdir(ROOT)
    return {name: kernel.read(f"{ROOT}/{name}/stack_order").rstrip("\n") for name in names}


def test_both_at_once_by_their_names(kernel: Kernel) -> None:
    with variant("replace_attribute"), variant("stack_order_attribute"):
        kernel.enable(fix_area())
    files = kernel.machine.kernfs.listdir(f"{ROOT}/fix_area")
    assert files == ["enabled", "force", "replace", "stack_order", "transition", "vmlinux"]
    kernel.verify("with files").raise_for_findings()


def test_outside_of_the_block_there_are_no_such_files(kernel: Kernel) -> None:
    with replace_attribute(), stack_order_attribute():
        pass
    kernel.enable(fix_area())
    assert kernel.machine.kernfs.listdir(f"{ROOT}/fix_area") == ["enabled", "force", "transition", "vmlinux"]
