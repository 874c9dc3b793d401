"""Hash tables of the kernel's kind: which bucket a key has, and chains linked both ways."""

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.events import EventKind
from emu.hashtable import hash_bucket, hash_min, hlist_add_head_rcu, hlist_del_init_rcu, hlist_for_each_entry
from emu.machine import Machine

BITS = 4
SIZE = 32  # struct ftrace_func_entry: an hlist_node and two words
NEXT, PPREV, IP = 0, 8, 16


@given(st.integers(0, 2**64 - 1), st.integers(1, 32))
def test_a_bucket_is_the_upper_bits_of_the_product(key: int, bits: int) -> None:
    """hash_64_generic(): 64-bit multiplication, then a shift to the right (include/linux/hash.h)."""
    product = ctypes.c_uint64(key * 0x61C8864680B583EB).value
    assert hash_min(key, bits) == product >> (64 - bits) < 1 << bits


@pytest.fixture
def table(machine: Machine) -> int:
    return machine.slab.kzalloc(8 << BITS, "a table")


def new_entry(machine: Machine, ip: int) -> int:
    address = machine.slab.kzalloc(SIZE, "an entry")
    machine.view("ftrace_func_entry", address).ip = ip
    return address


def word(machine: Machine, address: int) -> int:
    return int.from_bytes(machine.space.read(address, 8), "little")


def chain(machine: Machine, head: int) -> list[int]:
    """The entries of a bucket, their links checked."""
    found, link = [], head
    while at := word(machine, link):
        assert word(machine, at + PPREV) == link
        found.append(at)
        link = at + NEXT
    return found


def bucket(machine: Machine, table: int, key: int) -> int:
    return int(hash_bucket(machine.layouts, machine.shared, table, BITS, key).address_)


def add(machine: Machine, head: int, entry: int) -> None:
    view = machine.view("ftrace_func_entry", entry)
    hlist_add_head_rcu(view.hlist, machine.view("hlist_head", head))


def remove(machine: Machine, entry: int) -> None:
    hlist_del_init_rcu(machine.view("ftrace_func_entry", entry).hlist)


def test_a_key_leads_to_its_bucket(machine: Machine, table: int) -> None:
    for key in (0, 1, 0xFFFF_FFFF_8100_0000, 0xFFFF_8880_1234_5678):
        assert bucket(machine, table, key) == table + 8 * hash_min(key, BITS)


def test_the_last_added_is_the_first(machine: Machine, table: int) -> None:
    entries = [new_entry(machine, number) for number in range(3)]
    for each in entries:
        add(machine, table, each)
    assert chain(machine, table) == entries[::-1]
    views = hlist_for_each_entry(machine.view("hlist_head", table), "ftrace_func_entry", "hlist")
    assert [each.ip for each in views] == [2, 1, 0]


@pytest.mark.parametrize("victim", range(3))
def test_any_one_can_be_removed(machine: Machine, table: int, victim: int) -> None:
    entries = [new_entry(machine, number) for number in range(3)]
    for each in entries:
        add(machine, table, each)
    after = word(machine, entries[victim] + NEXT)
    remove(machine, entries[victim])
    assert word(machine, entries[victim] + NEXT) == after, "a reader that stands on it goes on"
    assert word(machine, entries[victim] + PPREV) == 0
    del entries[victim]
    assert chain(machine, table) == entries[::-1]


def test_what_is_on_no_list_can_be_removed_again(machine: Machine, table: int) -> None:
    entry, other = new_entry(machine, 1), new_entry(machine, 2)
    add(machine, table, other)
    add(machine, table, entry)
    remove(machine, entry)
    remove(machine, entry)
    assert chain(machine, table) == [other]


def test_an_entry_can_be_reached_only_when_its_own_links_are_set(machine: Machine, table: int) -> None:
    first, second = new_entry(machine, 1), new_entry(machine, 2)
    add(machine, table, first)
    number = machine.events.total
    add(machine, table, second)
    stores = [event.address for event in machine.events.since(number) if event.kind is EventKind.STORE]
    assert stores == [second + NEXT, second + PPREV, table, first + PPREV]


def test_the_loop_body_may_remove_the_entry_it_is_at(machine: Machine, table: int) -> None:
    entries = [new_entry(machine, number) for number in range(4)]
    for each in entries:
        add(machine, table, each)
    seen = []
    for each in hlist_for_each_entry(machine.view("hlist_head", table), "ftrace_func_entry", "hlist"):
        seen.append(each.ip)
        if each.ip % 2:
            hlist_del_init_rcu(each.hlist)
    assert seen == [3, 2, 1, 0]
    assert chain(machine, table) == [entries[2], entries[0]]
