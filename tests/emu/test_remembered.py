"""What is remembered is found again while memory and facts are the same, and never when they are not."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import pytest
from machines import boot

from emu.machine import Machine
from emu.memory import MemoryFault
from emu.paging import Access
from emu.remembered import Remembered
from emu.restore_point import RestorePoint
from emu.stream import execute_and_undo

FREE = 0xFFFF_FFFF_A000_0000  # nothing is mapped here


@dataclass
class Told:
    """A subject with one fact; `runs` counts how often a function was really run."""

    remembered: Remembered
    name: str = "Alice"
    runs: int = 0
    seen: list[str] = field(default_factory=list)

    def fact(self, name: str) -> Hashable:
        return self.name


def word_at(address: int) -> Callable[[Told], int]:
    def read(told: Told) -> int:
        told.runs += 1
        try:
            return int.from_bytes(told.remembered.read(address, 8), "little")
        except MemoryFault:
            return -1

    return read


def greeting(told: Told, mark: str) -> str:
    told.runs += 1
    told.remembered.note("name")
    return told.name + mark


@pytest.fixture
def told() -> Told:
    machine = boot()
    return Told(Remembered(machine.space))


@pytest.fixture
def machine() -> Machine:
    return boot()


def test_what_was_read_and_is_the_same_is_not_read_again(machine: Machine) -> None:
    told, at = Told(Remembered(machine.space)), machine.slab.kzalloc(64, "test")
    read = word_at(at)
    assert [told.remembered.call(read, told) for _ in range(3)] == [0, 0, 0]
    machine.space.write(at + 8, b"\1")  # behind it
    assert told.remembered.call(read, told) == 0
    assert told.runs == 1


def test_a_change_is_seen_whoever_has_made_it(machine: Machine) -> None:
    told, at = Told(Remembered(machine.space)), machine.slab.kzalloc(64, "test")
    read = word_at(at)
    physical = machine.space.physical(at)

    def through_the_arena(value: int) -> None:
        machine.space.arena.bytes[physical : physical + 8] = value.to_bytes(8, "little")

    writers: list[Callable[[int], object]] = [
        lambda value: machine.space.write(at, value.to_bytes(8, "little")),
        lambda value: machine.shared.write(at, value.to_bytes(8, "little")),
        lambda value: machine.call(machine.symbol("store_to"), at, value),
        through_the_arena,
    ]
    for value, write in enumerate(writers, 1):
        write(value)
        assert told.remembered.call(read, told) == int.from_bytes(machine.space.read(at, 8), "little")
        assert told.runs == value


def test_a_restore_point_makes_nothing_untrue_and_what_was_known_is_known_again(machine: Machine) -> None:
    told, at = Told(Remembered(machine.space)), machine.slab.kzalloc(64, "test")
    read = word_at(at)
    assert told.remembered.call(read, told) == 0
    point = RestorePoint(machine, told.remembered)
    for _ in range(3):
        machine.space.write(at, b"\5")
        assert told.remembered.call(read, told) == 5
        point.restore()
        assert told.remembered.call(read, told) == 0
    assert told.runs == 2


def test_a_page_that_is_mapped_or_has_another_frame_is_another_one(machine: Machine) -> None:
    told, space = Told(Remembered(machine.space)), machine.space
    read = word_at(FREE)
    assert told.remembered.call(read, told) == -1
    space.map(FREE, 4096, Access.WRITE)
    assert told.remembered.call(read, told) == 0
    (frame,) = space.unmap(FREE, 4096)
    assert told.remembered.call(read, told) == -1
    space.map(FREE, 4096, Access.WRITE)
    space.write(FREE, b"\7")
    assert told.remembered.call(read, told) == 7
    assert frame
    assert told.runs == 3, "unmapped twice, but looked at once"


def test_of_a_large_place_each_page_counts(machine: Machine) -> None:
    told, space, size = Told(Remembered(machine.space)), machine.space, 1 << 17
    at = machine.area.module_alloc(size, "test")
    space.write(at, bytes(size))

    def total(told: Told) -> int:
        told.runs += 1
        return sum(told.remembered.read(at, size))

    assert told.remembered.call(total, told) == 0
    for number, place in enumerate((0, 5000, size - 1), 1):
        told.remembered.look()
        space.write(at + place, b"\1")
        assert told.remembered.call(total, told) == number
        told.remembered.look()
        assert told.remembered.call(total, told) == number
        assert told.runs == number + 1


def test_a_fact_that_a_function_has_noted_belongs_to_it(told: Told) -> None:
    assert told.remembered.call(greeting, told, "!") == "Alice!"
    told.name = "Bob"
    assert told.remembered.call(greeting, told, "!") == "Bob!"
    assert told.remembered.call(greeting, told, "?") == "Bob?"
    told.name = "Alice"
    assert told.remembered.call(greeting, told, "!") == "Alice!"
    assert told.runs == 3


def test_whoever_calls_a_function_has_read_what_that_has_read(machine: Machine) -> None:
    told, at = Told(Remembered(machine.space)), machine.slab.kzalloc(64, "test")
    read = word_at(at)

    def twice(told: Told) -> tuple[int, str]:
        return 2 * told.remembered.call(read, told), told.remembered.call(greeting, told, "!")

    assert told.remembered.call(twice, told) == (0, "Alice!")
    machine.space.write(at, b"\4")
    assert told.remembered.call(twice, told) == (8, "Alice!")
    told.name = "Bob"
    assert told.remembered.call(twice, told) == (8, "Bob!")


def test_what_a_stream_has_loaded_was_read(machine: Machine) -> None:
    """The function returns what is in memory; no one but its guest code looks there."""
    told, at = Told(Remembered(machine.space)), machine.slab.kzalloc(64, "test")
    entry = machine.symbol("area_of")
    machine.space.write(
        entry, b"\x48\xb8" + at.to_bytes(8, "little") + b"\x48\x8b\x00\xc3"
    )  # mov rax, [at]; ret

    def loaded(told: Told) -> int:
        told.runs += 1
        stream = execute_and_undo(machine, entry, entry + 13)
        told.remembered.note_stream(stream)
        return stream.after["rax"]

    assert [told.remembered.call(loaded, told) for _ in range(2)] == [0, 0]
    assert told.runs == 1
    machine.space.write(at, b"\6")
    assert told.remembered.call(loaded, told) == 6
    machine.space.write(entry + 10, b"\x31\xc0\x90")  # xor eax, eax; nop
    assert told.remembered.call(loaded, told) == 0


def test_which_of_two_pages_is_mapped_makes_a_difference(machine: Machine) -> None:
    told, space = Told(Remembered(machine.space)), machine.space
    words = word_at(FREE), word_at(FREE + 4096)

    def both(told: Told) -> tuple[int, int]:
        return words[0](told), words[1](told)

    space.map(FREE, 4096, Access.WRITE)
    assert told.remembered.call(both, told) == (0, -1)
    space.unmap(FREE, 4096)
    space.map(FREE + 4096, 4096, Access.WRITE)
    assert told.remembered.call(both, told) == (-1, 0)
