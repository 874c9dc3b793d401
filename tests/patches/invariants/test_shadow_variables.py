"""Damage in the table of shadow variables, and variables that nobody will free any more."""

import pytest
from livepatches import Raw, fix_area, fix_shapes
from shadow_table import HEADER, neighbours, variables

from klpemu import Func, Kernel, Patch
from patches.invariants.finding import Finding

HASHED, REMAINS = "shadow_variables_are_hashed", "no_shadow_variable_remains"
NEXT, PPREV, OBJ, ID = 0, 8, 32, 40
PS_LOCK = 1
ALLOC = Func("sta_info_alloc", "new_sta_info_alloc")
FREE = Func("sta_info_free", "new_sta_info_free")
TX = Func("ieee80211_tx_h_unicast_ps_buf", "new_tx_h_unicast_ps_buf")


def fix_sta_lock(name: str = "fix_sta_lock", *, replace: bool = False) -> Patch:
    return Patch(name, {"sta_info": [ALLOC, FREE]}, code="builtin:fix_sta_lock.o", replace=replace)


def fix_sta_inflight(name: str = "fix_sta_inflight", *, replace: bool = False) -> Patch:
    return Patch(name, {"sta_info": [TX]}, code="builtin:fix_sta_inflight.o", replace=replace)


def only(kernel: Kernel) -> Finding:
    (finding,) = kernel.verify().findings
    return finding


def left_behind(kernel: Kernel) -> list[str]:
    """What verification says, which is nothing but this."""
    findings = kernel.verify().findings
    assert {each.invariant for each in findings} <= {REMAINS}
    return [each.what for each in findings]


# The table.


@pytest.fixture
def chain(kernel: Kernel) -> list[int]:
    """Three variables in one bucket, newest first, and a livepatch that may have made them."""
    kernel.enable(fix_area())
    for obj in neighbours(3):
        kernel.call("klp_shadow_alloc", obj, 7, 8, 0, 0, 0)
    kernel.verify().raise_for_findings()
    return [each.address for each in variables(kernel)]


@pytest.mark.parametrize("place", range(3))
def test_a_link_back_that_leads_elsewhere_is_found(
    kernel: Kernel, raw: Raw, chain: list[int], place: int
) -> None:
    right = raw.u64(chain[place] + PPREV)
    raw.put(chain[place] + PPREV, right + 8)
    found = only(kernel)
    assert (found.invariant, found.address) == (HASHED, chain[place] + PPREV)
    assert (found.expected, found.found) == (right.to_bytes(8, "little"), (right + 8).to_bytes(8, "little"))


def test_a_link_that_leads_nowhere_is_found(kernel: Kernel, raw: Raw, chain: list[int]) -> None:
    raw.put(chain[0] + NEXT, 0xFFFF_FFFF_DEAD_B000)
    found = only(kernel)
    assert (found.invariant, found.address) == (HASHED, chain[0] + NEXT)
    assert "which is no memory" in found.what


def test_a_link_that_leads_back_in_a_circle_is_found(kernel: Kernel, raw: Raw, chain: list[int]) -> None:
    raw.put(chain[2] + NEXT, chain[0])
    found = only(kernel)
    assert (found.invariant, found.address) == (HASHED, chain[0] + PPREV)


def test_a_variable_in_another_objects_bucket_is_found(kernel: Kernel, raw: Raw, chain: list[int]) -> None:
    raw.put(chain[1] + OBJ, raw.u64(chain[1] + OBJ) + (1 << 40))
    found = only(kernel)
    assert (found.invariant, found.address) == (HASHED, chain[1])
    assert "its object belongs to" in found.what


def test_two_of_one_object_and_id_are_found(kernel: Kernel, raw: Raw, chain: list[int]) -> None:
    raw.put(chain[2] + OBJ, raw.u64(chain[0] + OBJ))
    found = only(kernel)
    assert (found.invariant, found.address) == (HASHED, chain[2])
    assert f"exists twice, here and at {chain[0]:#x}" in found.what


def test_one_object_with_two_ids_is_in_order(kernel: Kernel, raw: Raw, chain: list[int]) -> None:
    raw.put(chain[2] + OBJ, raw.u64(chain[0] + OBJ))
    raw.put(chain[2] + ID, 8)
    kernel.verify().raise_for_findings()


def test_a_variable_that_was_freed_where_it_stood_is_found(kernel: Kernel, chain: list[int]) -> None:
    space, slab = kernel.machine.space, kernel.machine.slab
    before = space.read(chain[1], HEADER)
    slab.kfree(chain[1])
    space.write(chain[1], before)
    found = {each.invariant: each for each in kernel.verify().findings}
    assert found[HASHED].address == chain[1]
    assert "is in the table and is no object of the heap" in found[HASHED].what


# Left behind.


@pytest.fixture
def stations(kernel: Kernel) -> Kernel:
    """The module whose functions are patched, with one station."""
    kernel.load_module("builtin:sta_info.o")
    kernel.call("sta_add", 0)
    kernel.verify().raise_for_findings()
    return kernel


def message(obj: int, users: str) -> str:
    return f"shadow variable <{obj:#x}, {PS_LOCK}>{users} is left behind"


def test_what_a_gone_patch_left_behind_is_reported(stations: Kernel) -> None:
    stations.enable(fix_sta_lock())
    for number in (1, 2):
        stations.call("sta_add", number)
    assert left_behind(stations) == []
    stations.disable("fix_sta_lock")
    expected = [message(each.obj, " of fix_sta_lock") for each in variables(stations)]
    assert len(expected) == 2
    assert left_behind(stations) == expected
    assert {each.address for each in stations.verify().findings} == {
        each.address for each in variables(stations)
    }


def test_who_frees_all_before_it_goes_leaves_nothing_behind(stations: Kernel) -> None:
    stations.enable(fix_sta_lock())
    stations.call("sta_add", 1)
    stations.call("fix_sta_lock:fix_sta_lock_exit")
    stations.disable("fix_sta_lock")
    assert left_behind(stations) == []


def test_a_station_that_a_gone_patch_allocated_may_stay(stations: Kernel) -> None:
    """Memory that guest code asked for is its own: only the shadow variable was the patch's to free."""
    stations.enable(fix_sta_lock())
    stations.call("sta_add", 1)
    stations.call("fix_sta_lock:fix_sta_lock_exit")
    stations.disable("fix_sta_lock")
    stations.verify().raise_for_findings()
    assert stations.machine.slab.owner(stations.call("sta_get", 1))


def test_an_enabled_patch_that_has_nothing_to_do_with_it_does_not_hide_it(stations: Kernel) -> None:
    stations.enable(fix_area())
    stations.enable(fix_sta_lock())
    stations.call("sta_add", 1)
    stations.disable("fix_sta_lock")
    assert len(left_behind(stations)) == 1


def test_a_patch_that_uses_the_same_id_keeps_it(stations: Kernel) -> None:
    stations.enable(fix_sta_lock())
    stations.call("sta_add", 1)
    stations.enable(fix_sta_inflight())
    stations.call("sta_tx", 1)
    stations.disable("fix_sta_lock")
    assert left_behind(stations) == []
    (one,) = variables(stations)
    stations.disable("fix_sta_inflight")
    assert left_behind(stations) == [message(one.obj, " of fix_sta_inflight, fix_sta_lock")]


def test_a_cumulative_patch_may_have_taken_it_over(stations: Kernel) -> None:
    stations.enable(fix_sta_lock())
    stations.call("sta_add", 1)
    stations.enable(fix_shapes())
    assert left_behind(stations) == []
    stations.disable("fix_shapes")
    assert len(left_behind(stations)) == 1


def test_without_any_livepatch_every_variable_is_left_behind(kernel: Kernel) -> None:
    """Who allocated it is not always known, a tail call hides it; but nobody is left who could free it."""
    kernel.load_module("builtin:shadow.o")
    kernel.enable(fix_area())
    obj = neighbours(1)[0]
    kernel.call("shadow:attach", obj, PS_LOCK)
    assert left_behind(kernel) == []
    kernel.disable("fix_area")
    assert left_behind(kernel) == [message(obj, "")]


def test_a_forced_patch_never_goes_and_leaves_nothing_behind(stations: Kernel) -> None:
    stations.enable(fix_sta_lock())
    stations.call("sta_add", 1)
    (patch,) = stations.enabled
    patch.guest.forced = True
    stations.disable("fix_sta_lock")
    assert left_behind(stations) == []
