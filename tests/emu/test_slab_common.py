"""The other ways to ask for memory, on the built-in kernel, where modules link against them."""

import pytest

from elf.errors import KlpemuError
from emu.machine import Machine
from emu.slab import POISON_INUSE

GFP_KERNEL, GFP_ZERO = 0xCC0, 0x100


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("__kmalloc_node", (24, GFP_KERNEL | GFP_ZERO, 0)),
        ("__kmalloc_node_track_caller", (24, GFP_KERNEL | GFP_ZERO, 0, 0)),
        ("kmalloc_node_trace", (0, GFP_KERNEL | GFP_ZERO, 0, 24)),
        ("kmalloc_large", (24, GFP_KERNEL | GFP_ZERO)),
        ("kvmalloc_node", (24, GFP_KERNEL | GFP_ZERO, 0)),
        ("vzalloc", (24,)),
    ],
)
def test_memory_has_the_size_and_the_zeroes_asked_for(
    machine: Machine, function: str, arguments: tuple[int, ...]
) -> None:
    address = machine.call(machine.symbol(function), *arguments)
    assert machine.slab.live[address][0] == 24
    assert machine.space.read(address, 24) == bytes(24)


def test_vmalloc_does_not_clear(machine: Machine) -> None:
    address = machine.call(machine.symbol("vmalloc"), 8)
    assert machine.space.read(address, 8) == bytes([POISON_INUSE]) * 8


def test_krealloc_keeps_the_contents_and_frees_the_old(machine: Machine) -> None:
    krealloc = machine.symbol("krealloc")
    first = machine.call(krealloc, 0, 8, GFP_KERNEL)
    machine.space.write(first, b"contents")
    second = machine.call(krealloc, first, 100, GFP_KERNEL)
    assert machine.space.read(second, 8) == b"contents"
    assert first not in machine.slab.live
    assert machine.call(krealloc, second, 0, GFP_KERNEL) == 0
    assert second not in machine.slab.live


@pytest.mark.parametrize("function", ["kvfree", "vfree"])
def test_freeing_twice_is_an_error(machine: Machine, function: str) -> None:
    address = machine.call(machine.symbol("vmalloc"), 8)
    machine.call(machine.symbol(function), address)
    with pytest.raises(KlpemuError, match="double free"):
        machine.call(machine.symbol(function), address)
