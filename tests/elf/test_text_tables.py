"""The tables of places where a kernel rewrites its text."""

from struct import pack

import pytest

from elf.errors import ElfError
from elf.text_tables import (
    AltInstr,
    alt_instrs,
    jump_entries,
    paravirt_patch_sites,
    place_relative,
    static_call_sites,
    static_call_tramp_keys,
)

AT = 0xFFFFFFFFC0001000


def test_each_offset_of_an_alternative_counts_from_its_own_field() -> None:
    data = pack("<iiHBB", -0x100, 0x200, 0x8074, 6, 5) + pack("<iiHBB", -0x100, 0x200, 7, 3, 0)
    first, second = alt_instrs(data, AT)
    assert first == AltInstr(AT - 0x100, AT + 4 + 0x200, 0x8074, 6, 5)
    assert second == AltInstr(AT + 12 - 0x100, AT + 16 + 0x200, 7, 3, 0)


def test_places_are_relative_to_their_entries_and_zero_means_none() -> None:
    assert place_relative(pack("<iii", -8, 0, 16), AT, ".smp_locks") == [AT - 8, AT + 8 + 16]


def test_paravirt_sites_are_absolute_and_padded_to_sixteen_bytes() -> None:
    (site,) = paravirt_patch_sites(pack("<QBB6x", AT, 28, 7))
    assert (site.instr, site.type, site.len) == (AT, 28, 7)


def test_the_key_of_a_static_call_carries_the_tail_flag() -> None:
    call, tail = static_call_sites(pack("<iiii", -0x10, 0x20, -0x10, 0x21), AT)
    assert (call.addr, call.key, call.is_tail) == (AT - 0x10, AT + 4 + 0x20, False)
    assert (tail.addr, tail.key, tail.is_tail) == (AT + 8 - 0x10, AT + 12 + 0x20, True)


def test_trampolines_are_found_with_their_keys() -> None:
    assert static_call_tramp_keys(pack("<ii", 0x40, 0x80), AT) == {AT + 0x40: AT + 4 + 0x80}


def test_a_jump_entry_has_the_branch_in_bit_0_of_a_key_that_may_lie_anywhere() -> None:
    data = pack("<iiq", -0x30, -0x20, -0x40000000 | 1) + pack("<iiq", 0, 0, 0x1000 | 2)
    first, second = jump_entries(data, AT)
    assert (first.code, first.target) == (AT - 0x30, AT + 4 - 0x20)
    assert (first.key, first.branch) == (AT + 8 - 0x40000000, True)
    assert (second.key, second.branch) == (AT + 16 + 8 + 0x1000, False)


@pytest.mark.parametrize("size", [1, 11, 13])
def test_a_table_that_ends_within_an_entry_is_refused(size: int) -> None:
    with pytest.raises(ElfError, match="no whole number of 12-byte entries"):
        list(alt_instrs(bytes(size), AT))
