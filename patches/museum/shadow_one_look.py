"""What if klp_shadow_get_or_alloc() looked only once?

It looks without the lock, allocates, takes the lock and looks again: two tasks can both have found nothing,
and the second one throws its allocation away.  Without the second look there are two variables of one
object and one id.  One of them is never found again, with whatever was counted or locked in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from patches import shadow
from patches.klp import Klp
from patches.museum import Bug, Kind
from patches.variants import replaced

__all__ = ["BUG", "shadow_one_look"]


@contextmanager
def shadow_one_look() -> Iterator[None]:
    """Look before the lock is taken, and not under it."""

    def get_or_alloc(
        klp: Klp, obj: int, id_: int, size: int, gfp: int, ctor: int, ctor_data: int, warn_on_exist: bool
    ) -> int:
        found = shadow.klp_shadow_get(klp, obj, id_)
        if found:
            return shadow.shadow_exists(klp, obj, id_, found, warn_on_exist)
        new = shadow.new_shadow(klp, size)
        if new is None:
            return 0
        with shadow.klp_shadow_locked(klp):
            new.obj, new.id = obj, id_
            if not shadow._construct(klp, new, ctor, ctor_data):
                shadow.hash_add(klp, new)
                return int(new.member_("data"))
        klp.machine.slab.kfree(new.address_)
        return 0

    with replaced(shadow, "_klp_shadow_get_or_alloc", get_or_alloc):
        yield


BUG = Bug(
    title="A shadow variable is allocated without the second look under the lock",
    kind=Kind.COUNTERFACTUAL,
    commit="kept away by __klp_shadow_get_or_alloc() since the API of v4.15",
    invariant="shadow_variables_are_hashed",
    breaks="__klp_shadow_get_or_alloc() does not look again under klp_shadow_lock",
    bug=shadow_one_look,
)
