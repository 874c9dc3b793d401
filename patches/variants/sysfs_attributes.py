"""Files of a patch in /sys/kernel/livepatch/<patch>/ that later kernels have.

`replace` (0444): 1 if the patch replaces all older ones; adb68ed26a3e ("livepatch: Add "replace" sysfs
attribute") (in v6.11).  `stack_order` (0444): the place of the patch on klp_patches, counted from 1 for the
oldest; 3dae09de4061 ("livepatch: Add stack_order sysfs attribute") (in v6.14).

The files are there for patches that are enabled inside the block.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from emu.kobject import Attribute
from patches import core, sysfs
from patches.klp import Klp
from patches.variants import replaced

__all__ = ["replace_attribute", "stack_order_attribute"]


@contextmanager
def replace_attribute() -> Iterator[None]:
    """Have the file `replace`, as kernels since v6.11."""
    with _attribute("replace", replace_show):
        yield


@contextmanager
def stack_order_attribute() -> Iterator[None]:
    """Have the file `stack_order`, as kernels since v6.14."""
    with _attribute("stack_order", stack_order_show):
        yield


def replace_show(klp: Klp, kobj: int) -> str:
    """The patch replaces the older ones."""
    return f"{sysfs.klp_patch_of(klp, kobj).replace:d}\n"


def stack_order_show(klp: Klp, kobj: int) -> str:
    """How many patches are on the list up to this one."""
    this_patch, stack_order = sysfs.klp_patch_of(klp, kobj), 0
    with core.klp_mutex(klp):
        for each in klp.patches():
            stack_order += 1
            if each == this_patch:
                break
    return f"{stack_order}\n"


@contextmanager
def _attribute(name: str, show: Callable[[Klp, int], str]) -> Iterator[None]:
    original = sysfs.klp_patch_attrs

    def klp_patch_attrs(klp: Klp) -> Sequence[Attribute]:
        return (*original(klp), Attribute(name, 0o444, partial(show, klp)))

    with replaced(sysfs, "klp_patch_attrs", klp_patch_attrs):
        yield
