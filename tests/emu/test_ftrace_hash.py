"""ftrace_hash: buckets and sizes as the kernel has them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import boot

from emu.ftrace_hash import alloc_ftrace_hash, entries, free_ftrace_hash, hash_is_empty, hash_key, lookup_ip
from emu.machine import Machine
from emu.memory import read_u64


@given(bits=st.integers(1, 12), ip=st.integers(0, (1 << 64) - 1))
def test_the_bucket_of_an_address_is_that_of_hash_long(bits: int, ip: int) -> None:
    # hash_64() of include/linux/hash.h, with its constant
    assert hash_key(bits, ip) == ((ip * 0x61C8864680B583EB) % (1 << 64)) // (1 << (64 - bits))


@pytest.mark.parametrize(
    ("count", "bits"), [(1, 0), (2, 1), (3, 1), (4, 2), (7, 2), (8, 3), (31, 4), (32, 5), (200, 7)]
)
def test_the_number_of_buckets_is_that_of_dup_hash(machine: Machine, count: int, bits: int) -> None:
    found = alloc_ftrace_hash(machine.layouts, machine.slab, machine.shared, range(count))
    assert (found.size_bits, found.count) == (bits, count)


@settings(max_examples=30)
@given(ips=st.sets(st.integers(0, (1 << 64) - 1), max_size=80), other=st.integers(0, (1 << 64) - 1))
def test_a_hash_holds_what_was_put_in_and_nothing_else_each_in_its_bucket(ips: set[int], other: int) -> None:
    machine = boot()
    live = set(machine.slab.live)
    found = alloc_ftrace_hash(machine.layouts, machine.slab, machine.shared, ips)
    assert sorted(entry.ip for entry in entries(found)) == sorted(ips)
    assert all(lookup_ip(found, ip) for ip in ips)
    assert lookup_ip(found, other) == (other in ips)
    assert hash_is_empty(found) == (not ips)
    for index in range(1 << found.size_bits):
        link = bucket = found.buckets + 8 * index
        while at := read_u64(machine.space, link):
            entry = machine.view("ftrace_func_entry", at)
            assert hash_key(found.size_bits, entry.ip) == index
            assert entry.hlist.pprev == link, f"bucket {bucket:#x}"
            link = at
    free_ftrace_hash(machine.slab, found)
    assert set(machine.slab.live) == live


def test_no_hash_is_an_empty_one() -> None:
    assert hash_is_empty(None)
    assert not lookup_ip(None, 1)
