"""The address space: what the entries allow, and what the host side reads and writes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import boot

from elf.errors import KlpemuError
from emu.arena import Arena
from emu.machine import Machine
from emu.memory import PAGE_SIZE, MemoryFault, read_string
from emu.paging import Access, AddressSpace

BASE = 0xFFFF_8880_0001_0000


def space(frames: int = 256) -> AddressSpace:
    return AddressSpace(Arena(frames * PAGE_SIZE))


@settings(max_examples=50)
@given(offset=st.integers(0, 3 * PAGE_SIZE), data=st.binary(min_size=1, max_size=2 * PAGE_SIZE))
def test_what_is_written_is_read_back_and_nothing_else_changes(offset: int, data: bytes) -> None:
    memory = space()
    memory.map(BASE, 6 * PAGE_SIZE, Access.WRITE)
    memory.write(BASE, b"\x55" * 6 * PAGE_SIZE)
    memory.write(BASE + offset, data)
    expected = bytearray(b"\x55" * 6 * PAGE_SIZE)
    expected[offset : offset + len(data)] = data
    assert memory.read(BASE, 6 * PAGE_SIZE) == expected
    assert memory.snapshot().read(BASE, 6 * PAGE_SIZE) == expected


@settings(max_examples=50)
@given(offset=st.integers(0, 3 * PAGE_SIZE), data=st.binary(max_size=2 * PAGE_SIZE))
def test_what_is_exchanged_is_what_was_there_and_what_is_written(offset: int, data: bytes) -> None:
    """Within one page that is not executable, within one that is, and over several."""
    memory, other = space(), space()
    for each in (memory, other):
        each.map(BASE, 2 * PAGE_SIZE, Access.WRITE)
        each.map(BASE + 2 * PAGE_SIZE, 4 * PAGE_SIZE, Access.EXECUTE)
        each.write(BASE, bytes(range(256)) * (6 * PAGE_SIZE // 256))
    before = other.read(BASE + offset, len(data))
    other.write(BASE + offset, data)
    assert memory.exchange(BASE + offset, data) == before
    assert memory.read(BASE, 6 * PAGE_SIZE) == other.read(BASE, 6 * PAGE_SIZE)


@pytest.mark.parametrize(("offset", "size"), [(-1, 2), (PAGE_SIZE - 1, 2), (-PAGE_SIZE, 1), (PAGE_SIZE, 1)])
def test_an_access_that_leaves_what_is_mapped_faults_and_stores_nothing(offset: int, size: int) -> None:
    memory = space()
    memory.map(BASE, PAGE_SIZE, Access.WRITE)
    with pytest.raises(MemoryFault):
        memory.read(BASE + offset, size)
    with pytest.raises(MemoryFault):
        memory.write(BASE + offset, b"x" * size)
    with pytest.raises(MemoryFault):
        memory.exchange(BASE + offset, b"x" * size)
    assert memory.read(BASE, PAGE_SIZE) == bytes(PAGE_SIZE)
    with pytest.raises(MemoryFault):
        memory.snapshot().read(BASE + offset, size)


def test_a_mapping_that_hits_another_maps_nothing() -> None:
    memory = space()
    memory.map(BASE + 2 * PAGE_SIZE, PAGE_SIZE, Access.WRITE)
    with pytest.raises(KlpemuError, match="mapped already"):
        memory.map(BASE, 4 * PAGE_SIZE, Access.WRITE)
    assert [memory.access(BASE + page * PAGE_SIZE) for page in range(4)] == [None, None, Access.WRITE, None]


@pytest.mark.parametrize("access", list(Access))
def test_a_mapping_that_runs_out_of_frames_gives_all_of_them_back(access: Access) -> None:
    memory = space(32)
    memory.map(BASE, PAGE_SIZE, Access.WRITE)
    with pytest.raises(KlpemuError, match="used up"):
        memory.map(BASE + PAGE_SIZE, 64 * PAGE_SIZE, access)
    assert memory.access(BASE + PAGE_SIZE) is None
    memory.map(BASE + PAGE_SIZE, 8 * PAGE_SIZE, access)


def test_a_mapping_starts_on_a_page_and_in_a_region_of_the_kernel() -> None:
    memory = space()
    with pytest.raises(KlpemuError, match="page boundary"):
        memory.map(BASE + 1, PAGE_SIZE, Access.READ)
    with pytest.raises(KlpemuError, match="no kernel region"):
        memory.map(0x40_0000, PAGE_SIZE, Access.READ)
    assert memory.access(0x40_0000) is None


def test_two_snapshots_tell_which_pages_changed() -> None:
    memory = space()
    memory.map(BASE, 3 * PAGE_SIZE, Access.WRITE)
    before = memory.snapshot()
    memory.write(BASE + PAGE_SIZE + 7, b"x")
    memory.map(BASE + 5 * PAGE_SIZE, PAGE_SIZE, Access.READ)
    memory.unmap(BASE + 2 * PAGE_SIZE, PAGE_SIZE)
    changed = before.changed(memory.snapshot())
    assert changed == [BASE + page * PAGE_SIZE for page in (1, 2, 5)]


def test_what_the_guest_may_do_is_what_the_entries_say(machine: Machine) -> None:
    machine.space.map(BASE + (1 << 30), PAGE_SIZE, Access.WRITE)
    page = BASE + (1 << 30)
    store, load = machine.symbol("store_to"), machine.symbol("load_from")
    machine.call(store, page, 0xC3)
    assert machine.call(load, page) == 0xC3
    for access, may_store, may_run in ((Access.READ, False, False), (Access.EXECUTE, False, True),
                                       (Access.WRITE, True, False)):  # fmt: skip
        machine.space.protect(page, PAGE_SIZE, access)
        for allowed, attempt in ((may_store, (store, page, 0xC3)), (may_run, (page,)), (True, (load, page))):
            if allowed:
                machine.call(*attempt)
            else:
                with pytest.raises(KlpemuError):
                    machine.call(*attempt)
    (frame,) = machine.space.unmap(page, PAGE_SIZE)
    with pytest.raises(KlpemuError, match="unmapped address"):
        machine.call(load, page)
    assert frame % PAGE_SIZE == 0


def test_every_vcpu_sees_a_page_come_and_go() -> None:
    machine = boot(cpus=2)
    page = BASE + (1 << 30)
    for _ in range(2):
        machine.space.map(page, PAGE_SIZE, Access.WRITE)
        for task in machine.tasks:
            assert machine.hub.finish(task, machine.hub.call(task, machine.symbol("load_from"), (page,))) == 0
        machine.space.unmap(page, PAGE_SIZE)
        for task in machine.tasks:
            with pytest.raises(KlpemuError, match="unmapped address"):
                machine.hub.finish(task, machine.hub.call(task, machine.symbol("load_from"), (page,)))


@given(text=st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=200), at=st.integers(0, 4000))
@settings(max_examples=40)
def test_a_string_is_read_up_to_its_nul(text: str, at: int) -> None:
    memory = space()
    memory.map(BASE, 2 * PAGE_SIZE, Access.WRITE)
    memory.write(BASE + at, text.encode() + b"\0after")
    assert read_string(memory, BASE + at) == text


def test_a_string_without_an_end_is_an_error() -> None:
    memory = space()
    memory.map(BASE, 3 * PAGE_SIZE, Access.WRITE)
    memory.write(BASE, b"x" * 3 * PAGE_SIZE)
    with pytest.raises(KlpemuError, match="no string ends here"):
        read_string(memory, BASE)
