"""The order of things when patches are enabled, stacked and replaced, read back from the event trace."""

import json
from pathlib import Path

import pytest
from livepatches import AREA, Raw, fix_area, fix_area2, fix_shapes, livepatch

from emu.events import Event, EventKind
from klpemu import Kernel

NOP5 = "0f1f440000"


def stores_to(events: list[Event], address: int) -> list[Event]:
    return [event for event in events if event.kind is EventKind.STORE and event.address == address]


def pokes_of(events: list[Event], address: int) -> list[Event]:
    return [
        event for event in events if event.kind is EventKind.POKE and address <= event.address < address + 5
    ]


@pytest.fixture
def replaced(kernel: Kernel, raw: Raw) -> tuple[Kernel, list[Event], dict[str, int]]:
    """fix_area replaced by fix_shapes, which drops area_of: the events, and where things were before."""
    kernel.enable(fix_area())
    old = kernel.enabled[0].guest
    area, perimeter = (raw.klp_ops(kernel.address_of(name)) for name in ("area_of", "perimeter_of"))
    before = {
        "old patch": old.address_,
        "old area func": raw.funcs(area)[0],
        "old perimeter func": raw.funcs(perimeter)[0],
        "area ops": area,
        "area site": kernel.site_of("area_of")[0],
        "perimeter site": kernel.site_of("perimeter_of")[0],
    }
    number = kernel.machine.events.total
    kernel.enable(fix_shapes())
    before["new perimeter func"] = raw.funcs(perimeter)[0]
    before["new patch"] = kernel.enabled[0].guest.address_
    return kernel, kernel.machine.events.since(number), before


def first(events: list[Event], address: int, after: bytes) -> int:
    """Number of the first store of these bytes."""
    return next(event.number for event in stores_to(events, address) if event.after == after)


def last(events: list[Event], address: int, after: bytes) -> int:
    return [event.number for event in stores_to(events, address) if event.after == after][-1]


def test_the_order_at_completion_of_a_replace_is_the_kernels(
    replaced: tuple[Kernel, list[Event], dict[str, int]], raw: Raw
) -> None:
    kernel, events, at = replaced
    state = raw.member("task_struct", raw.current(kernel), "patch_state")
    grace = [event.number for event in events if event.note == "klp_synchronize_transition"]
    assert len(grace) == 1
    order = [
        ("the task has switched", first(events, state, b"\x01\0\0\0")),
        (
            "the replaced patch is disabled",
            first(events, raw.member("klp_patch", at["old patch"], "enabled"), b"\0"),
        ),
        ("area_of unpatched", first(events, raw.member("klp_func", at["old area func"], "patched"), b"\0")),
        (
            "perimeter_of unpatched",
            first(events, raw.member("klp_func", at["old perimeter func"], "patched"), b"\0"),
        ),
        ("the dropped site goes back", pokes_of(events, at["area site"])[0].number),
        (
            "func->transition cleared",
            last(events, raw.member("klp_func", at["new perimeter func"], "transition"), b"\0"),
        ),
        ("klp_synchronize_transition", grace[0]),
        ("states undefined", last(events, state, b"\xff\xff\xff\xff")),
        ("klp_target_state undefined", last(events, raw.symbol("klp_target_state"), b"\xff\xff\xff\xff")),
        ("klp_transition_patch NULL", last(events, raw.symbol("klp_transition_patch"), bytes(8))),
        (
            "the replaced patch leaves the list",
            first(
                events,
                raw.member("klp_patch", at["old patch"], "list.next"),
                (0xDEAD_0000_0000_0100).to_bytes(8, "little"),
            ),
        ),
        (
            "its release",
            first(events, raw.member("klp_patch", at["old patch"], "finish.done"), b"\x01\0\0\0"),
        ),
    ]
    assert [name for name, _ in sorted(order, key=lambda step: step[1])] == [name for name, _ in order]


def test_nops_are_freed_before_the_complete_line_and_replaced_patches_after_it(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.enable(fix_area())
    slab = kernel.machine.slab
    kfree, line_at_free = slab.kfree, dict[str, str]()

    def watched(address: int) -> None:
        if address:
            line_at_free[slab.live[address][1]] = kernel.log[-1]
        kfree(address)

    monkeypatch.setattr(slab, "kfree", watched)
    kernel.enable(fix_shapes())
    completing = "livepatch: 'fix_shapes': completing patching transition"
    assert line_at_free["klp_ops of area_of"] == completing
    assert line_at_free["nop klp_func"] == completing
    assert line_at_free["klp_patch of patch fix_area"] == "livepatch: 'fix_shapes': patching complete"


def test_a_function_that_nobody_patches_any_more_has_its_nop_back(
    replaced: tuple[Kernel, list[Event], dict[str, int]],
) -> None:
    kernel, events, at = replaced
    assert kernel.site_of("area_of")[1].hex() == NOP5
    assert at["area ops"] not in kernel.machine.slab.live
    assert [event.after.hex() for event in pokes_of(events, at["area site"])] == ["cc", "1f440000", "0f"]
    assert pokes_of(events, at["perimeter site"]) == [], "what stays patched is not poked"


def test_stacking_a_second_version_pokes_nothing(kernel: Kernel) -> None:
    kernel.enable(fix_area())
    sites = [kernel.site_of(name)[1] for name in ("area_of", "perimeter_of")]
    number = kernel.machine.events.total
    kernel.enable(fix_area2())
    events = kernel.machine.events.since(number)
    assert [event for event in events if event.kind is EventKind.POKE] == []
    assert [kernel.site_of(name)[1] for name in ("area_of", "perimeter_of")] == sites


def test_taking_one_of_two_versions_away_pokes_nothing(stacked: Kernel) -> None:
    number = stacked.machine.events.total
    stacked.disable("fix_area2")
    assert [e for e in stacked.machine.events.since(number) if e.kind is EventKind.POKE] == []
    assert stacked.call("area_of", 3, 4) == 12


def test_starting_a_transition_pokes_no_site_that_is_patched_already(kernel: Kernel) -> None:
    """All pokes of an enable are of sites that nobody patched before."""
    kernel.enable(livepatch("fix_area", AREA))
    area, perimeter = (kernel.site_of(name)[0] for name in ("area_of", "perimeter_of"))
    number = kernel.machine.events.total
    kernel.enable(fix_area2())
    events = kernel.machine.events.since(number)
    assert pokes_of(events, area) == []
    assert len(pokes_of(events, perimeter)) == 3


def test_func_transition_is_set_before_a_func_is_on_its_stack(kernel: Kernel, raw: Raw) -> None:
    kernel.enable(fix_area())
    ops = raw.klp_ops(kernel.address_of("area_of"))
    number = kernel.machine.events.total
    kernel.enable(fix_area2())
    events = kernel.machine.events.since(number)
    top = raw.funcs(ops)[0]
    node = raw.member("klp_func", top, "stack_node")
    linked = first(events, raw.member("klp_ops", ops, "func_stack.next"), node.to_bytes(8, "little"))
    flagged = first(events, raw.member("klp_func", top, "transition"), b"\x01")
    state = raw.member("task_struct", raw.current(kernel), "patch_state")
    assert first(events, state, bytes(4)) < flagged < linked
    assert first(events, node, raw.space.read(node, 8)) < linked, (
        "its own pointers are set before it is linked"
    )


def test_disabling_synchronises_before_func_transition_is_cleared(kernel: Kernel, raw: Raw) -> None:
    kernel.enable(fix_area())
    func = raw.funcs(raw.klp_ops(kernel.address_of("area_of")))[0]
    number = kernel.machine.events.total
    kernel.disable("fix_area")
    events = kernel.machine.events.since(number)
    (grace,) = (event.number for event in events if event.note == "klp_synchronize_transition")
    cleared = last(events, raw.member("klp_func", func, "transition"), b"\0")
    unpatched = first(events, raw.member("klp_func", func, "patched"), b"\0")
    assert unpatched < grace < cleared


def test_the_module_of_an_enabled_patch_is_in_use_until_the_patch_is_freed(kernel: Kernel, raw: Raw) -> None:
    kernel.enable(fix_area())
    count = raw.member("module", kernel.enabled[0].guest.mod, "refcnt")
    before = int.from_bytes(raw.space.read(count, 4), "little")
    number = kernel.machine.events.total
    kernel.disable("fix_area")
    (event,) = stores_to(kernel.machine.events.since(number), count)
    assert int.from_bytes(event.after, "little") == before - 1


RECORDED = json.loads((Path(__file__).parent / "recorded_log.json").read_text())


def test_the_log_of_one_patch_is_the_one_recorded_from_a_real_kernel(kernel: Kernel) -> None:
    kernel.enable(fix_area(name="livepatch_sample"))
    kernel.disable("livepatch_sample")
    assert kernel.log == RECORDED["sample"]


def test_the_log_of_two_patches_of_one_function_is_the_one_recorded(kernel: Kernel) -> None:
    """The older one of the two can be disabled first."""
    kernel.enable(fix_area(name="own_a"))
    kernel.enable(fix_area2(name="own_b"))
    kernel.disable("own_a")
    assert kernel.log == RECORDED["stacked"]


def test_the_log_of_removing_a_replacing_patch_is_the_one_recorded(kernel: Kernel) -> None:
    kernel.enable(fix_area())
    kernel.enable(fix_shapes(name="own_c"))
    lines = len(kernel.log)
    kernel.disable("own_c")
    assert kernel.log[lines:] == RECORDED["removed replacement"]
