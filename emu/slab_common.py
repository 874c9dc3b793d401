"""The other ways to ask for memory: mm/slab_common.c, mm/util.c, mm/vmalloc.c.

All of it comes from the one heap (emu/slab.py); nodes and most flags mean nothing here.  A cache keeps the
size and the constructor of its objects in its struct kmem_cache, which only a linked image has.
"""

from typing import TYPE_CHECKING

from emu.exports import allocate, export
from emu.memory import read_u64

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["kmem_cache_alloc", "kmem_cache_create", "kvmalloc_node", "vmalloc"]

GFP_ZERO = 0x100
SEVENTH_ARGUMENT = 8  # above the return address


@export
def __kmalloc_node(machine: "Machine", size: int, flags: int, _node: int) -> int:
    """As __kmalloc."""
    return allocate(machine, size, flags, f"kmalloc by {machine.caller()}")


@export
def __kmalloc_node_track_caller(machine: "Machine", size: int, flags: int, _node: int, _caller: int) -> int:
    """As __kmalloc: kstrdup() and the like call it."""
    return allocate(machine, size, flags, f"kmalloc by {machine.caller()}")


@export
def kmalloc_node_trace(machine: "Machine", _cache: int, flags: int, _node: int, size: int) -> int:
    """As __kmalloc: there are no nodes, and nothing is traced."""
    return allocate(machine, size, flags, f"kmalloc by {machine.caller()}")


@export
def kmalloc_large(machine: "Machine", size: int, flags: int) -> int:
    """As __kmalloc; more than 4 MiB are an error."""
    return allocate(machine, size, flags, f"kmalloc by {machine.caller()}")


@export
def kvmalloc_node(machine: "Machine", size: int, flags: int, _node: int) -> int:
    """As __kmalloc."""
    return allocate(machine, size, flags, f"kvmalloc by {machine.caller()}")


@export
def vmalloc(machine: "Machine", size: int) -> int:
    """Memory of the heap, not of an address range of its own."""
    return allocate(machine, size, 0, f"vmalloc by {machine.caller()}")


@export
def vzalloc(machine: "Machine", size: int) -> int:
    """As vmalloc, zeroed."""
    return allocate(machine, size, GFP_ZERO, f"vzalloc by {machine.caller()}")


@export
def krealloc(machine: "Machine", address: int, size: int, flags: int) -> int:
    """Always moves what it makes larger or smaller; a size of 0 frees."""
    if not size:
        machine.slab.kfree(address)
        return 0
    new = allocate(machine, size, flags, f"krealloc by {machine.caller()}")
    if new and address:
        old, _ = machine.slab.live.get(address, (0, ""))
        machine.space.write(new, machine.space.read(address, min(old, size)))
        machine.slab.kfree(address)
    return new


@export
def kvfree(machine: "Machine", address: int) -> None:
    """As kfree."""
    machine.slab.kfree(address)


@export
def vfree(machine: "Machine", address: int) -> None:
    """As kfree."""
    machine.slab.kfree(address)


@export
def kmem_cache_create(
    machine: "Machine", name: int, size: int, _align: int, _flags: int, constructor: int
) -> int:
    """A cache: its objects come from the heap one by one; there is nothing in sysfs."""
    return _create_cache(machine, name, size, constructor)


@export
def kmem_cache_create_usercopy(machine: "Machine", name: int, size: int) -> int:
    """As kmem_cache_create; what user space may copy is not looked at."""
    rsp = machine.hub.current.cpu.registers()["rsp"]
    return _create_cache(machine, name, size, read_u64(machine.space, rsp + SEVENTH_ARGUMENT))


def _create_cache(machine: "Machine", name: int, size: int, constructor: int) -> int:
    address = machine.slab.kzalloc(machine.layouts.sizeof("kmem_cache"), "struct kmem_cache")
    cache = machine.view("kmem_cache", address)
    cache.name, cache.size, cache.object_size, cache.ctor = name, size, size, constructor
    return address


@export
def kmem_cache_alloc(machine: "Machine", cache: int, flags: int) -> int:
    """An object of the cache, on which its constructor has run; it runs at each allocation."""
    view = machine.view("kmem_cache", cache)
    size, constructor = view.object_size, view.ctor
    found = allocate(machine, size, flags, f"kmem_cache_alloc by {machine.caller()}")
    if found and constructor:
        machine.hub.call_guest(constructor, found)
    return found


@export
def kmem_cache_free(machine: "Machine", _cache: int, address: int) -> None:
    """As kfree."""
    machine.slab.kfree(address)


@export
def kmem_cache_destroy(machine: "Machine", cache: int) -> None:
    """Free the cache; objects of it that are left stay, and are told as what remains."""
    machine.slab.kfree(cache)
