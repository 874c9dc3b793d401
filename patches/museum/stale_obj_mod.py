"""A module that was refused left its address behind in the livepatch that had refused it.

klp_module_coming() stores the module in `obj->mod` before it applies the patch. When that fails the module
is not loaded, its memory is freed, and `obj->mod` stayed: to klp_is_object_loaded() the object is there.
The commit calls it probably harmless as of then; whoever trusts that answer next reads memory that is
freed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from emu.errno import KernelErrno
from patches import core
from patches.klp import Klp
from patches.museum import Bug, Kind
from patches.variants import replaced

__all__ = ["BUG", "stale_obj_mod"]


@contextmanager
def stale_obj_mod() -> Iterator[None]:
    """Put the address back into the object whose patch has failed."""
    coming, apply_ = core.klp_module_coming, core._klp_apply_to_coming
    failing: list[Any] = []

    def _klp_apply_to_coming(klp: Klp, patch_: Any, obj: Any, name: str) -> None:
        failing[:] = [obj]
        apply_(klp, patch_, obj, name)

    def klp_module_coming(klp: Klp, module: Any) -> None:
        try:
            coming(klp, module)
        except KernelErrno:
            for obj in failing:
                obj.mod = module.address_
            raise

    with (
        replaced(core, "_klp_apply_to_coming", _klp_apply_to_coming),
        replaced(core, "klp_module_coming", klp_module_coming),
    ):
        yield


BUG = Bug(
    title="obj->mod stays set when a coming module is refused",
    kind=Kind.SHIPPED,
    commit='4ff96fb52c69 ("livepatch: Nullify obj->mod in klp_module_coming()\'s error path") (in v5.4)',
    invariant="objects_know_their_modules",
    breaks="klp_module_coming() leaves obj->mod as it is on its way out of an error",
    bug=stale_obj_mod,
)
