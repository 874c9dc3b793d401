"""Shadow variables, data attached to an object from outside: kernel/livepatch/shadow.c.

The hash table, its lock and the variables are in guest memory; constructors and destructors are guest code,
called under the lock.  A variable is looked for twice, first without the lock and then under it: whoever
comes second throws its own allocation away.

%p prints the address, as on a kernel booted with no_hash_pointers: there is nobody to keep it from.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import compress
from struct import unpack
from typing import Any

from emu.errno import KernelErrno
from emu.hashtable import hash_bucket, hlist_add_head_rcu, hlist_del_init_rcu, hlist_for_each_entry
from emu.kfree_rcu import kfree_rcu
from emu.memory import read_u64
from emu.spinlock import spin_locked
from patches.exports import klp_export
from patches.klp import Klp

__all__ = [
    "hash_add",
    "klp_shadow_alloc",
    "klp_shadow_free",
    "klp_shadow_free_all",
    "klp_shadow_free_struct",
    "klp_shadow_get",
    "klp_shadow_get_or_alloc",
    "klp_shadow_locked",
    "new_shadow",
    "shadow_exists",
]

KLP_SHADOW_HASH_BITS = 12
KMALLOC_MAX_SIZE = 1 << 22  # include/linux/slab.h with CONFIG_SLUB


@klp_export
def klp_shadow_get(klp: Klp, obj: int, id_: int) -> int:
    """Address of the data of <obj, id>, or NULL.

    Readers take no lock; between rcu_read_lock() and rcu_read_unlock() nothing they stand on is freed.
    """
    for shadow in _bucket(klp, obj):
        if _match(shadow, obj, id_):
            return _data(shadow)
    return 0


@klp_export
def klp_shadow_alloc(
    klp: Klp, obj: int, id_: int, size: int, gfp_flags: int, ctor: int, ctor_data: int
) -> int:
    """Attach `size` zero bytes to `obj` and have `ctor` fill them; their address.

    NULL if <obj, id> exists, with a WARN, and if the constructor fails.
    """
    _note_user(klp, id_)
    return _klp_shadow_get_or_alloc(klp, obj, id_, size, gfp_flags, ctor, ctor_data, True)


@klp_export
def klp_shadow_get_or_alloc(
    klp: Klp, obj: int, id_: int, size: int, gfp_flags: int, ctor: int, ctor_data: int
) -> int:
    """As klp_shadow_alloc(), but what exists is returned; `ctor` is called only for what did not."""
    _note_user(klp, id_)
    return _klp_shadow_get_or_alloc(klp, obj, id_, size, gfp_flags, ctor, ctor_data, False)


@klp_export
def klp_shadow_free(klp: Klp, obj: int, id_: int, dtor: int) -> None:
    """Detach and free <obj, id>, if it exists, calling `dtor` before."""
    _note_user(klp, id_)
    with klp_shadow_locked(klp):
        for shadow in _bucket(klp, obj):
            if _match(shadow, obj, id_):
                klp_shadow_free_struct(klp, shadow, dtor)
                break


@klp_export
def klp_shadow_free_all(klp: Klp, id_: int, dtor: int) -> None:
    """Detach and free what has this id, whatever the object, in the table's order."""
    _note_user(klp, id_)
    with klp_shadow_locked(klp):
        for shadow in _all(klp):
            if shadow.id == id_:
                klp_shadow_free_struct(klp, shadow, dtor)


def klp_shadow_free_struct(klp: Klp, shadow: Any, dtor: int) -> None:
    """Detach a `struct klp_shadow`, call the destructor, free it once no reader can stand on it."""
    hlist_del_init_rcu(shadow.node)
    if dtor:
        klp.machine.hub.call_guest(dtor, shadow.obj, _data(shadow))
    kfree_rcu(klp.machine, shadow.address_)


def klp_shadow_locked(klp: Klp) -> AbstractContextManager[None]:
    """Hold klp_shadow_lock."""
    return spin_locked(klp.machine, klp.machine.symbol("klp_shadow_lock"))


def new_shadow(klp: Klp, size: int) -> Any:
    """A `struct klp_shadow` with `size` bytes of data, all zero; None if there is no such memory.

    The sum of the sizes can overflow, as in C.
    """
    machine = klp.machine
    total = size + machine.layouts.sizeof("klp_shadow") & 0xFFFF_FFFF_FFFF_FFFF
    if total > KMALLOC_MAX_SIZE:
        return None
    try:
        return machine.view("klp_shadow", machine.slab.kzalloc(total, f"klp_shadow by {machine.caller()}"))
    except KernelErrno:
        return None


def hash_add(klp: Klp, shadow: Any) -> None:
    """Put a variable into the table; its object and id are set (hash_add_rcu())."""
    hlist_add_head_rcu(shadow.node, _bucket_head(klp, shadow.obj))


def shadow_exists(klp: Klp, obj: int, id_: int, data: int, warn_on_exist: bool) -> int:
    """What the callers get for a variable that exists."""
    if not warn_on_exist:
        return data
    message = f"Duplicate shadow variable <{obj:016x}, {id_:x}>"
    klp.log.pr_warn(message)
    klp.warn("__klp_shadow_get_or_alloc", message)
    return 0


def _klp_shadow_get_or_alloc(
    klp: Klp,
    obj: int,
    id_: int,
    size: int,
    gfp_flags: int,
    ctor: int,
    ctor_data: int,
    warn_on_exist: bool,
) -> int:
    found = klp_shadow_get(klp, obj, id_)
    if found:
        return shadow_exists(klp, obj, id_, found, warn_on_exist)
    shadow = new_shadow(klp, size)
    if shadow is None:
        return 0
    error = 0
    with klp_shadow_locked(klp):
        found = klp_shadow_get(klp, obj, id_)
        if not found:
            shadow.obj = obj
            shadow.id = id_
            error = _construct(klp, shadow, ctor, ctor_data)
            if not error:
                hash_add(klp, shadow)
                return _data(shadow)
    klp.machine.slab.kfree(shadow.address_)
    if found:
        return shadow_exists(klp, obj, id_, found, warn_on_exist)
    klp.log.pr_err(f"livepatch: Failed to construct shadow variable <{obj:016x}, {id_:x}> ({error})")
    return 0


def _construct(klp: Klp, shadow: Any, ctor: int, ctor_data: int) -> int:
    """What the constructor returns: an int, negative errno or 0."""
    if not ctor:
        return 0
    result = klp.machine.hub.call_guest(ctor, shadow.obj, _data(shadow), ctor_data) & 0xFFFF_FFFF
    return result - (1 << 32) if result >> 31 else result


def _match(shadow: Any, obj: int, id_: int) -> bool:
    return bool(shadow.obj == obj and shadow.id == id_)


def _data(shadow: Any) -> int:
    return int(shadow.member_("data"))


def _bucket_head(klp: Klp, obj: int) -> Any:
    machine = klp.machine
    table = machine.symbol("klp_shadow_hash")
    return hash_bucket(machine.layouts, machine.shared, table, KLP_SHADOW_HASH_BITS, obj)


def _bucket(klp: Klp, obj: int) -> Iterator[Any]:
    """hash_for_each_possible()"""
    return hlist_for_each_entry(_bucket_head(klp, obj), "klp_shadow", "node")


def _all(klp: Klp) -> Iterator[Any]:
    """hash_for_each(); the lock is held, so that nobody stores to a head while they are all read at once."""
    machine, count = klp.machine, 1 << KLP_SHADOW_HASH_BITS
    table = machine.symbol("klp_shadow_hash")
    heads = unpack(f"<{count}Q", machine.shared.read(table, 8 * count))
    for index in compress(range(count), heads):
        yield from hlist_for_each_entry(machine.view("hlist_head", table + 8 * index), "klp_shadow", "node")


def _note_user(klp: Klp, id_: int) -> None:
    """Remember which livepatch module allocates or frees variables of this id: it is the one to clean up.

    A tail call hides the caller; only livepatch modules count, so that nobody else is taken for it.
    """
    machine = klp.machine
    stack = machine.hub.current.cpu.registers()["rsp"]
    caller = machine.kallsyms.at(read_u64(machine.space, stack) - 1)
    module = machine.modules.objects.get(caller.module) if caller is not None else None
    if module is not None and module.struct and machine.view("module", module.struct).klp:
        klp.shadow_users.setdefault(id_, set()).add(module.name)
