"""kmalloc and kfree against a dictionary, and every kind of misuse found."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elf.errors import KlpemuError
from emu.arena import Arena
from emu.memory import PAGE_SIZE, read_string
from emu.paging import AddressSpace
from emu.slab import PAGE_OFFSET, QUARANTINE_OBJECTS, RED_ZONE, Slab

Heap = tuple[AddressSpace, Slab]


@pytest.fixture
def heap() -> Heap:
    space = AddressSpace(Arena(4096 * PAGE_SIZE))
    return space, Slab(space)


def test_a_fresh_object_is_poison_a_zeroed_one_zero_and_a_freed_one_poison(heap: Heap) -> None:
    space, slab = heap
    fresh, zero = slab.kmalloc(40, "fresh"), slab.kzalloc(40, "zero")
    assert space.read(fresh, 40) == b"\x5a" * 40
    assert space.read(zero, 40) == bytes(40)
    slab.kfree(fresh)
    assert space.read(fresh, 40) == b"\x6b" * 39 + b"\xa5"  # include/linux/poison.h


def test_a_copied_string_ends_in_a_nul(heap: Heap) -> None:
    space, slab = heap
    assert read_string(space, slab.kstrdup("vmlinux", "name")) == "vmlinux"


def test_objects_lie_in_the_direct_map_aligned_to_sixteen(heap: Heap) -> None:
    _, slab = heap
    for size in (1, 7, 16, 33, 4096, 100_000):
        address = slab.kmalloc(size, "object")
        assert address > PAGE_OFFSET
        assert address % 16 == 0


@pytest.mark.parametrize("size", [0, -1, (1 << 22) + 1])
def test_a_size_the_kernel_has_no_cache_for_is_refused(heap: Heap, size: int) -> None:
    _, slab = heap
    with pytest.raises(KlpemuError, match="kmalloc of"):
        slab.kmalloc(size, "object")
    assert slab.live == {}


@pytest.mark.parametrize(
    ("offset", "what"),
    [(-1, "before"), (-RED_ZONE, "before"), (24, "behind"), (24 + RED_ZONE - 1, "behind")],
)
def test_a_write_past_either_end_is_found(heap: Heap, offset: int, what: str) -> None:
    space, slab = heap
    slab.kmalloc(24, "innocent")
    address = slab.kmalloc(24, "victim")
    space.write(address + offset, b"!")
    (found,) = slab.corruptions(space)
    assert (found.address, found.object, found.size, found.tag) == (address + offset, address, 24, "victim")
    assert what in found.what


@pytest.mark.parametrize("offset", [0, 11, 23])
def test_a_write_to_a_freed_object_is_found(heap: Heap, offset: int) -> None:
    space, slab = heap
    address = slab.kmalloc(24, "gone")
    slab.kfree(address)
    space.write(address + offset, b"!")
    (found,) = slab.corruptions(space)
    assert (found.address, found.what, found.tag) == (address + offset, "freed object written to", "gone")


def test_a_double_free_is_refused_and_names_the_object(heap: Heap) -> None:
    _, slab = heap
    address = slab.kmalloc(24, "gone")
    slab.kfree(address)
    with pytest.raises(KlpemuError, match="double free of gone"):
        slab.kfree(address)


@pytest.mark.parametrize("offset", [1, 16, -16])
def test_a_free_of_no_object_is_refused_and_null_is_ignored(heap: Heap, offset: int) -> None:
    _, slab = heap
    address = slab.kmalloc(64, "object")
    with pytest.raises(KlpemuError, match="never returned"):
        slab.kfree(address + offset)
    slab.kfree(0)
    assert set(slab.live) == {address}


def test_freed_memory_comes_back_only_after_the_quarantine(heap: Heap) -> None:
    _, slab = heap
    first = slab.kmalloc(64, "first")
    slab.kfree(first)
    between = []
    for number in range(QUARANTINE_OBJECTS):
        address = slab.kmalloc(64, f"{number}")
        between.append(address)
        slab.kfree(address)
    assert first not in between
    assert slab.kmalloc(64, "again") == first


def test_an_object_written_to_in_quarantine_is_reported_when_it_leaves(heap: Heap) -> None:
    space, slab = heap
    first = slab.kmalloc(64, "first")
    slab.kfree(first)
    space.write(first + 5, b"!")
    for number in range(QUARANTINE_OBJECTS - 1):
        slab.kfree(slab.kmalloc(64, f"{number}"))
    last = slab.kmalloc(64, "last")
    with pytest.raises(KlpemuError, match="first was written to after it was freed"):
        slab.kfree(last)


def test_the_owner_of_an_address_is_the_object_around_it(heap: Heap) -> None:
    _, slab = heap
    address = slab.kmalloc(24, "mine")
    assert slab.owner(address) == slab.owner(address + 23) == "mine"
    assert slab.owner(address - 1) is slab.owner(address + 24) is None


class Heaps(RuleBasedStateMachine):
    """Random allocations, stores and frees: every object keeps its bytes, and none overlaps another."""

    @initialize()
    def start(self) -> None:
        self.space = AddressSpace(Arena(4096 * PAGE_SIZE))
        self.slab = Slab(self.space)
        self.model: dict[int, bytes] = {}

    @rule(size=st.integers(1, 300), zero=st.booleans())
    def allocate(self, size: int, zero: bool) -> None:
        address = (self.slab.kzalloc if zero else self.slab.kmalloc)(size, f"{size}")
        for start, data in self.model.items():
            assert address + size + RED_ZONE <= start or start + len(data) + RED_ZONE <= address
        self.model[address] = bytes(size) if zero else b"\x5a" * size

    @precondition(lambda self: self.model)
    @rule(choice=st.integers(0, 1000), byte=st.integers(0, 255))
    def fill(self, choice: int, byte: int) -> None:
        address = sorted(self.model)[choice % len(self.model)]
        self.model[address] = bytes([byte]) * len(self.model[address])
        self.space.write(address, self.model[address])

    @precondition(lambda self: self.model)
    @rule(choice=st.integers(0, 1000), times=st.integers(1, 60))
    def free_and_churn(self, choice: int, times: int) -> None:
        address = sorted(self.model)[choice % len(self.model)]
        size = len(self.model.pop(address))
        self.slab.kfree(address)
        for _ in range(times):
            self.slab.kfree(self.slab.kmalloc(size, "churn"))

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        assert {at: size for at, (size, _) in self.slab.live.items()} == {
            at: len(data) for at, data in self.model.items()
        }
        for address, data in self.model.items():
            assert self.space.read(address, len(data)) == data
        assert self.slab.corruptions(self.space) == []


Heaps.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestHeaps = Heaps.TestCase
