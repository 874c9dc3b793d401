"""Per-CPU memory: offsets valid in every area."""

import pytest
from machines import boot

from elf.errors import KlpemuError
from emu.arena import Arena
from emu.memory import PAGE_SIZE
from emu.paging import AddressSpace
from emu.percpu import PER_CPU_SIZE, PerCpu


def new() -> PerCpu:
    return PerCpu(AddressSpace(Arena(256 * PAGE_SIZE)))


def test_allocations_are_aligned_and_do_not_overlap() -> None:
    percpu = new()
    offsets = [
        percpu.alloc(size, alignment) for size, alignment in ((3, 1), (8, 8), (9, 1), (64, 64), (5, 4))
    ]
    assert offsets == [0, 8, 16, 64, 28]


def test_freed_room_is_used_again_where_it_fits() -> None:
    percpu = new()
    first, second, _ = (percpu.alloc(64, 8) for _ in range(3))
    percpu.free(first)
    assert percpu.alloc(65, 8) == 192
    assert percpu.alloc(32, 8) == first
    percpu.free(second)
    assert percpu.alloc(64, 64) == second


def test_what_does_not_fit_and_what_was_never_allocated_is_refused() -> None:
    percpu = new()
    percpu.alloc(PER_CPU_SIZE - 8, 8)
    with pytest.raises(KlpemuError, match="does not fit"):
        percpu.alloc(16, 8)
    with pytest.raises(KlpemuError, match="never allocated"):
        percpu.free(8)
    assert list(percpu.live) == [0]


def test_every_area_starts_as_the_image_says() -> None:
    machine = boot(cpus=3)
    offset = machine.vmlinux.symbols["__preempt_count"]
    for area in machine.percpu.areas:
        assert machine.space.read(area + offset, 4) == bytes.fromhex("00000080")
    canary = machine.view("task_struct", machine.symbol("init_task")).stack_canary
    assert {machine.space.read(area + 40, 8) for area in machine.percpu.areas} == {
        canary.to_bytes(8, "little")
    }
