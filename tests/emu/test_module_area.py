"""module_alloc: pages of its own, guarded, and not soon used again."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from elf.errors import KlpemuError
from emu.arena import Arena
from emu.memory import PAGE_SIZE, MemoryFault
from emu.module_area import MODULES_VADDR, QUARANTINE_AREAS, ModuleArea
from emu.paging import AddressSpace


def test_an_area_is_zeroed_pages_with_a_hole_behind() -> None:
    space = AddressSpace(Arena(256 * PAGE_SIZE))
    area = ModuleArea(space)
    first, second = area.module_alloc(5000, "first"), area.module_alloc(10, "second")
    assert first == MODULES_VADDR
    assert space.read(first, 2 * PAGE_SIZE) == bytes(2 * PAGE_SIZE)
    assert space.access(first + 2 * PAGE_SIZE) is None
    assert second == first + 3 * PAGE_SIZE
    assert area.live == {first: (2 * PAGE_SIZE, "first"), second: (PAGE_SIZE, "second")}


def test_a_freed_area_is_unmapped_and_its_address_rests() -> None:
    space = AddressSpace(Arena(256 * PAGE_SIZE))
    area = ModuleArea(space)
    first = area.module_alloc(PAGE_SIZE, "first")
    area.free(first)
    with pytest.raises(MemoryFault):
        space.read(first, 1)
    later = []
    for _ in range(QUARANTINE_AREAS):
        later.append(area.module_alloc(PAGE_SIZE, "later"))
        area.free(later[-1])
    assert first not in later
    assert area.module_alloc(PAGE_SIZE, "again") == first


def test_frames_of_freed_areas_are_used_again() -> None:
    space = AddressSpace(Arena(64 * PAGE_SIZE))
    area = ModuleArea(space)
    for _ in range(200):
        area.free(area.module_alloc(4 * PAGE_SIZE, "churn"))


def test_a_free_of_no_area_is_refused() -> None:
    area = ModuleArea(AddressSpace(Arena(256 * PAGE_SIZE)))
    address = area.module_alloc(PAGE_SIZE, "area")
    area.free(address)
    for wrong in (address, address + PAGE_SIZE):
        with pytest.raises(KlpemuError, match="never returned"):
            area.free(wrong)


def test_an_area_that_does_not_fit_leaves_nothing_behind() -> None:
    space = AddressSpace(Arena(32 * PAGE_SIZE))
    area = ModuleArea(space)
    with pytest.raises(KlpemuError, match="used up"):
        area.module_alloc(64 * PAGE_SIZE, "too much")
    assert area.live == {}
    assert space.access(MODULES_VADDR) is None


class Areas(RuleBasedStateMachine):
    """Random areas: none overlaps another or its guard page, and each keeps its bytes."""

    @initialize()
    def start(self) -> None:
        self.space = AddressSpace(Arena(2048 * PAGE_SIZE))
        self.area = ModuleArea(self.space)
        self.model: dict[int, tuple[int, bytes]] = {}
        self.number = 0

    @rule(size=st.integers(1, 4 * PAGE_SIZE))
    def allocate(self, size: int) -> None:
        self.number += 1
        address = self.area.module_alloc(size, f"{self.number}")
        room = -(-size // PAGE_SIZE) * PAGE_SIZE
        for start, (taken, _) in self.model.items():
            assert address + room < start or start + taken < address
        data = self.number.to_bytes(4, "little") * (room // 4)
        self.space.write(address, data)
        self.model[address] = room, data

    @rule(choice=st.integers(0, 1000))
    def free(self, choice: int) -> None:
        if self.model:
            address = sorted(self.model)[choice % len(self.model)]
            del self.model[address]
            self.area.free(address)
            assert self.space.access(address) is None

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        assert {at: size for at, (size, _) in self.area.live.items()} == {
            at: room for at, (room, _) in self.model.items()
        }
        for address, (room, data) in self.model.items():
            assert self.space.read(address, room) == data


Areas.TestCase.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)
TestAreas = Areas.TestCase
