"""Many patched functions: the fixture with ten thousand of them, and a livepatch for the first n."""

from klpemu.fixtures import fixture
from klpemu.kernel import Kernel
from patches.livepatch import Func, Patch

__all__ = ["kernel_with_many", "patch_of"]

MODULE = "many"


def kernel_with_many() -> Kernel:
    """A kernel that has the module `many` loaded."""
    kernel = Kernel.load()
    kernel.machine.recorder.enabled = (
        False  # it copies memory at each entry into the guest, for fault reports
    )
    kernel.load_module(fixture("many.o"))
    return kernel


def patch_of(count: int) -> Patch:
    """A livepatch that replaces the first `count` functions."""
    funcs = [Func(f"fn_{number:05}", f"new_{number:05}") for number in range(count)]
    return Patch(f"fix_{count}", {MODULE: funcs}, fixture("many_fix.o"))
