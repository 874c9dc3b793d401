"""What a CPU may fetch while a site changes: the protocol is safe for each form, its shortcuts are not."""

from itertools import permutations, product

import pytest

from emu.cross_modifying import SYNC, Store, TextFetches, check_change, entry_points
from emu.text_poke import INT3, NOP5

CALL = bytes.fromhex("e8fb2f003f")
OTHER_CALL = bytes.fromhex("e8eb7f0040")
JUMP = bytes.fromhex("e9112233f4")
FIVE_NOPS = bytes.fromhex("9090909090")
SITES = {"nop": NOP5, "call": CALL, "other call": OTHER_CALL, "jump": JUMP}


def poke(new: bytes) -> list[Store | None]:
    """text_poke_bp_batch() of arch/x86/kernel/alternative.c."""
    return [Store(0, bytes([INT3])), SYNC, Store(1, new[1:]), SYNC, Store(0, new[:1]), SYNC]


@pytest.mark.parametrize("old", SITES)
@pytest.mark.parametrize("new", SITES)
def test_the_breakpoint_protocol_is_safe_from_any_form_to_any_other(old: str, new: str) -> None:
    assert check_change(SITES[old], SITES[new], poke(SITES[new])) == []


def test_a_plain_store_lets_half_of_two_instructions_be_fetched() -> None:
    wrong = check_change(NOP5, CALL, [Store(0, CALL), SYNC])
    assert bytes.fromhex("e81f440000") in {each.data for each in wrong}
    assert len(wrong) == 2**4 - 2, "four bytes differ: every combination but the two instructions"
    assert {each.moment for each in wrong} == {1}


def test_bytes_that_are_the_same_in_both_make_no_combinations() -> None:
    assert len(check_change(CALL, OTHER_CALL, [Store(0, OTHER_CALL), SYNC])) == 2**3 - 2
    assert check_change(CALL, CALL, [Store(0, CALL)]) == []


@pytest.mark.parametrize(("missing", "fetched"), [(1, NOP5[:1] + CALL[1:]), (3, CALL[:1] + NOP5[1:])])
def test_without_one_of_the_first_two_syncs_the_site_is_not_safe(missing: int, fetched: bytes) -> None:
    stores = [each for at, each in enumerate(poke(CALL)) if at != missing]
    assert fetched in {each.data for each in check_change(NOP5, CALL, stores)}


def test_the_last_sync_is_for_those_who_come_behind_it() -> None:
    assert check_change(NOP5, CALL, poke(CALL)[:-1]) == []
    fetches = TextFetches()
    fetches.store(0, bytes([INT3]), CALL[:1])
    assert fetches.pending, "somebody may still execute the int3, which the handler must claim until the sync"
    fetches.sync()
    assert not fetches.pending


def test_the_tail_first_is_not_safe_whatever_the_syncs() -> None:
    stores = [Store(1, CALL[1:]), SYNC, Store(0, CALL[:1]), SYNC]
    assert [each.data for each in check_change(NOP5, CALL, stores) if each.data[1:] == CALL[1:]] != []


def test_of_all_orders_of_the_three_stores_only_the_protocol_is_safe() -> None:
    stages = [Store(0, bytes([INT3])), Store(1, CALL[1:]), Store(0, CALL[:1])]
    safe = [
        order
        for order in permutations(stages)
        if not check_change(NOP5, CALL, [step for each in order for step in (each, SYNC)])
    ]
    assert safe == [tuple(stages)]


def test_of_all_ways_to_leave_syncs_out_only_the_last_does_no_harm() -> None:
    stages = [Store(0, bytes([INT3])), Store(1, CALL[1:]), Store(0, CALL[:1])]
    safe = []
    for syncs in product((True, False), repeat=3):
        stores: list[Store | None] = []
        for stage, synced in zip(stages, syncs, strict=True):
            stores += [stage, SYNC] if synced else [stage]
        if not check_change(NOP5, CALL, stores):
            safe.append(syncs)
    assert safe == [(True, True, True), (True, True, False)]


def test_a_site_of_five_single_nops_is_not_safe_even_with_the_protocol() -> None:
    """A CPU can stand between two of them, where no breakpoint is."""
    assert entry_points(FIVE_NOPS) == [0, 1, 2, 3, 4]
    wrong = check_change(FIVE_NOPS, CALL, poke(CALL))
    assert {each.offset for each in wrong} == {1, 2, 3, 4}
    assert check_change(FIVE_NOPS, CALL, poke(CALL), entries=[0]) == []


def test_a_byte_can_be_any_of_the_values_stored_since_the_last_sync() -> None:
    fetches = TextFetches()
    fetches.store(7, b"\x01", b"\x02")
    fetches.store(7, b"\x02", b"\x03")
    assert sorted(fetches.possible(7, b"\x03\x09")) == [b"\x01\x09", b"\x02\x09", b"\x03\x09"]
    fetches.sync()
    assert list(fetches.possible(7, b"\x03\x09")) == [b"\x03\x09"]


@pytest.mark.parametrize(
    ("text", "entries"), [(NOP5, [0]), (CALL, [0]), (FIVE_NOPS[:2] + b"\x0f\x1f\x00", [0, 1, 2])]
)
def test_a_cpu_can_be_about_to_fetch_where_an_instruction_begins(text: bytes, entries: list[int]) -> None:
    assert entry_points(text) == entries
