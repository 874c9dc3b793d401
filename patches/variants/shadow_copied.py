"""The first API of shadow variables: the data are copied, nobody is asked to construct or to destroy them.

439e7271dc2b ("livepatch: introduce shadow variable API") (in v4.15) had

    klp_shadow_alloc(obj, id, data, size, gfp_flags)
    klp_shadow_get_or_alloc(obj, id, data, size, gfp_flags)
    klp_shadow_free(obj, id)
    klp_shadow_free_all(id)

e91c2518a5d2 ("livepatch: Initialize shadow variables safely by a custom callback") (in v4.17) put a
constructor in the place of the data, and 3b2c77d000fe ("livepatch: Allow to call a custom callback when
freeing shadow variables") (in v4.17) added the destructor.  A copy is not always what an object needs: a list
head has to point to itself, and a lock may be held at the moment when it is copied.  And it was made before
anybody knew whether the variable was needed.

The names are the same, so guest code that was written for one API may be called under the other, as on a real
machine; nothing but the registers says which was meant.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from emu.hashtable import hlist_del_init_rcu
from emu.kfree_rcu import kfree_rcu
from patches import shadow
from patches.klp import Klp
from patches.variants import replaced

__all__ = ["shadow_data_copied"]


@contextmanager
def shadow_data_copied() -> Iterator[None]:
    """Have the API of v4.15 behind the names of today's."""

    def klp_shadow_get_or_alloc(
        klp: Klp, obj: int, id_: int, data: int, size: int, gfp: int, _r9: int, warn_on_exist: bool
    ) -> int:
        machine = klp.machine
        found = shadow.klp_shadow_get(klp, obj, id_)
        if found:
            return shadow.shadow_exists(klp, obj, id_, found, warn_on_exist)
        new = shadow.new_shadow(klp, size)
        if new is None:
            return 0
        new.obj = obj
        new.id = id_
        if data:
            machine.shared.write(new.member_("data"), machine.shared.read(data, size))
        with shadow.klp_shadow_locked(klp):
            found = shadow.klp_shadow_get(klp, obj, id_)
            if not found:
                shadow.hash_add(klp, new)
                return int(new.member_("data"))
        machine.slab.kfree(new.address_)
        return shadow.shadow_exists(klp, obj, id_, found, warn_on_exist)

    def klp_shadow_free_struct(klp: Klp, old: Any, _rdx: int) -> None:
        hlist_del_init_rcu(old.node)
        kfree_rcu(klp.machine, old.address_)

    with (
        replaced(shadow, "_klp_shadow_get_or_alloc", klp_shadow_get_or_alloc),
        replaced(shadow, "klp_shadow_free_struct", klp_shadow_free_struct),
    ):
        yield
