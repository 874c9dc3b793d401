"""What modules link against: the string functions against Python, and the services."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import boot

from elf.errors import KlpemuError
from emu.exports import EXPORTS, GUEST_EXPORTS, THUNK_REGISTERS
from emu.machine import Machine

SHARED = boot()
ROOM = 512
BUFFER = SHARED.slab.kzalloc(ROOM, "buffer")
CALLEE_SAVED = {"rbx": 1, "rbp": 2, "r12": 3, "r13": 4, "r14": 5, "r15": 6}

offsets = st.integers(0, ROOM // 2)
sizes = st.integers(0, ROOM // 2)
contents = st.binary(min_size=ROOM, max_size=ROOM)


def called(name: str, *arguments: int) -> int:
    """Call an export; it must keep to the C ABI, the direction flag included."""
    task = SHARED.init_task
    entry = SHARED.symbol(name)
    result = SHARED.hub.finish(task, SHARED.hub.call(task, entry, arguments, **CALLEE_SAVED))
    after = task.cpu.registers()
    assert after == after | CALLEE_SAVED
    assert not after["eflags"] & 1 << 10
    return int(result)


@settings(max_examples=80, deadline=None)
@given(data=contents, to=offsets, source=offsets, size=sizes, name=st.sampled_from(["memmove", "__memmove"]))
def test_memmove_moves_overlapping_memory_as_python_does(
    data: bytes, to: int, source: int, size: int, name: str
) -> None:
    SHARED.space.write(BUFFER, data)
    assert called(name, BUFFER + to, BUFFER + source, size) == BUFFER + to
    expected = bytearray(data)
    expected[to : to + size] = data[source : source + size]
    assert SHARED.space.read(BUFFER, ROOM) == expected


@settings(max_examples=40, deadline=None)
@given(data=contents, size=sizes, name=st.sampled_from(["memcpy", "__memcpy"]))
def test_memcpy_copies_and_returns_its_destination(data: bytes, size: int, name: str) -> None:
    SHARED.space.write(BUFFER, data)
    assert called(name, BUFFER + 256, BUFFER, size) == BUFFER + 256
    assert SHARED.space.read(BUFFER, ROOM) == data[:256] + data[:size] + data[256 + size :]


@settings(max_examples=40, deadline=None)
@given(data=contents, at=offsets, byte=st.integers(0, 1 << 32), size=sizes)
def test_memset_stores_the_low_byte(data: bytes, at: int, byte: int, size: int) -> None:
    SHARED.space.write(BUFFER, data)
    assert called("memset", BUFFER + at, byte, size) == BUFFER + at
    assert SHARED.space.read(BUFFER, ROOM) == data[:at] + bytes([byte & 255]) * size + data[at + size :]


@settings(max_examples=60, deadline=None)
@given(
    first=st.binary(max_size=40),
    second=st.binary(max_size=40),
    size=st.integers(0, 40),
    same=st.integers(0, 40),
)
def test_memcmp_has_the_sign_of_the_first_difference(
    first: bytes, second: bytes, size: int, same: int
) -> None:
    second = (first[:same] + second)[:40]
    first, second = first.ljust(40, b"\0"), second.ljust(40, b"\0")
    SHARED.space.write(BUFFER, first + second)
    result = called("memcmp", BUFFER, BUFFER + 40, size) & 0xFFFF_FFFF
    signed = result - (1 << 32) if result >> 31 else result
    left, right = first[:size], second[:size]
    assert (signed > 0) - (signed < 0) == (left > right) - (left < right)


@settings(max_examples=40, deadline=None)
@given(text=st.binary(max_size=200).map(lambda data: data.replace(b"\0", b"x")))
def test_strlen_counts_up_to_the_nul(text: bytes) -> None:
    SHARED.space.write(BUFFER, text + b"\0x")
    assert called("strlen", BUFFER) == len(text)


@pytest.mark.parametrize("register", THUNK_REGISTERS)
def test_an_indirect_thunk_jumps_where_its_register_says(machine: Machine, register: str) -> None:
    task = machine.init_task
    target = machine.symbol("current_pid")
    thunk = machine.symbol(f"__x86_indirect_thunk_{register}")
    assert machine.hub.finish(task, machine.hub.call(task, thunk, (), **{register: target})) == 1


def test_memory_from_kmalloc_is_the_callers_until_kfree(machine: Machine) -> None:
    address = machine.call(machine.symbol("__kmalloc"), 40, 0)
    assert machine.slab.live[address][0] == 40
    assert machine.space.read(address, 40) == b"\x5a" * 40
    machine.call(machine.symbol("kfree"), address)
    assert address not in machine.slab.live
    with pytest.raises(KlpemuError, match="double free"):
        machine.call(machine.symbol("kfree"), address)


def test_gfp_zero_gives_zeroes(machine: Machine) -> None:
    address = machine.call(machine.symbol("kmalloc_trace"), 0, 0x100, 24)
    assert machine.space.read(address, 24) == bytes(24)
    machine.call(machine.symbol("kfree_sensitive"), address)
    machine.call(machine.symbol("kfree_sensitive"), 0)
    assert address not in machine.slab.live


def test_a_destroyed_canary_ends_the_call(machine: Machine) -> None:
    with pytest.raises(KlpemuError, match="Kernel stack is corrupted"):
        machine.call(machine.symbol("__stack_chk_fail"))


def test_printk_goes_to_the_log_without_its_level(machine: Machine) -> None:
    text = machine.slab.kstrdup("\x016hello\n", "text")
    machine.call(machine.symbol("_printk"), text)
    assert machine.log.lines[-1] == "hello"


def test_no_name_is_both_guest_code_and_a_service() -> None:
    assert not set(GUEST_EXPORTS) & set(EXPORTS)
    for name in (*GUEST_EXPORTS, *EXPORTS):
        assert SHARED.symbol(name)
