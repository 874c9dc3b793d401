"""ftrace_bug: what is reported, what stays, and that nothing works afterwards."""

from collections.abc import Callable

import pytest
from machines import ftrace_world, record_of, registered, site_of

from emu.dyn_ftrace import FTRACE_REF_MAX, FtraceFl
from emu.errno import KernelErrno
from emu.ftrace import FtraceBug
from emu.machine import Machine

SITES = ("area_of", "perimeter_of", "measure", "tail_inner")
TRAMP = int(FtraceFl.TRAMP | FtraceFl.TRAMP_EN)
EN = int(FtraceFl.ENABLED)


def damaged(machine: Machine, name: str) -> bytes:
    """Change a byte of a site behind ftrace's back; returns what it holds now."""
    site = machine.symbol(name)
    machine.space.write(site + 2, bytes([machine.space.read(site + 2, 1)[0] ^ 0x40]))
    return machine.space.read(site, 5)


def test_ftrace_bug_is_reported_as_the_kernel_reports_it(machine: Machine) -> None:
    ops = registered(machine, ["area_of"])
    site, trampoline = machine.symbol("area_of"), ops.trampoline
    expected = machine.space.read(site, 5)
    actual = damaged(machine, "area_of")
    lines = len(machine.log.lines)
    with pytest.raises(FtraceBug, match="ftrace bug"):
        machine.ftrace.unregister_ftrace_function(ops)
    assert machine.log.lines[lines:] == [
        "------------[ ftrace bug ]------------",
        "ftrace failed to modify ",
        f"[<{site:016x}>] area_of+0x0/0x10",
        f" actual:   {actual.hex(':')}",
        f" expected: {expected.hex(':')}",
        "Setting ftrace call site to NOP",
        "ftrace record flags: 88000000",
        " (0)  \ttramp: ERROR!",
        f" expected tramp: {trampoline:x}",
    ]


def test_ftrace_bug_while_enabling_names_the_nop(machine: Machine) -> None:
    actual = damaged(machine, "area_of")
    with pytest.raises(FtraceBug):
        registered(machine, ["area_of"])
    assert f" actual:   {actual.hex(':')}" in machine.log.lines
    assert " expected: 0f:1f:44:00:00" in machine.log.lines
    assert "Setting ftrace call site to call ftrace function" in machine.log.lines


def test_ftrace_bug_on_a_changed_call_says_it_was_updating(machine: Machine) -> None:
    registered(machine, ["area_of"])
    damaged(machine, "area_of")
    with pytest.raises(FtraceBug):
        registered(machine, ["area_of"])
    assert "Updating ftrace call site to call a different ftrace function" in machine.log.lines


def test_after_an_ftrace_bug_ftrace_is_dead(machine: Machine) -> None:
    other = registered(machine, ["measure"])
    damaged(machine, "area_of")
    with pytest.raises(FtraceBug):
        registered(machine, ["area_of"])
    text = [site_of(machine, name) for name in SITES]
    fresh = machine.view("ftrace_ops", machine.slab.kzalloc(machine.layouts.sizeof("ftrace_ops"), "fresh"))
    attempts: list[Callable[[], None]] = [
        lambda: machine.ftrace.register_ftrace_function(fresh),
        lambda: machine.ftrace.unregister_ftrace_function(other),
        lambda: machine.ftrace.ftrace_set_filter_ip(fresh, machine.symbol("measure"), remove=False),
    ]
    for attempt in attempts:
        with pytest.raises(KernelErrno, match="ENODEV"):
            attempt()
    assert [site_of(machine, name) for name in SITES] == text
    assert machine.variable("ftrace_disabled", "<i").get() == 1
    assert machine.variable("ftrace_enabled", "<i").get() == 0


def test_an_ftrace_bug_at_one_site_leaves_all_text_as_it_was(machine: Machine) -> None:
    """All sites are verified before the first is poked, and ftrace_kill() puts the stub back."""
    damaged(machine, "perimeter_of")
    before = ftrace_world(machine)[0]
    with pytest.raises(FtraceBug):
        registered(machine, ["area_of", "measure", "perimeter_of"])
    assert ftrace_world(machine)[0] == before
    assert not machine.poker._queue


def test_an_ops_that_met_an_ftrace_bug_is_off_the_list(machine: Machine) -> None:
    damaged(machine, "area_of")
    with pytest.raises(FtraceBug):
        registered(machine, ["area_of"])
    assert list(machine.ftrace.each_ops()) == []


@pytest.mark.parametrize("count", [0, FTRACE_REF_MAX - 1])
def test_a_count_that_leaves_its_range_turns_ftrace_off(machine: Machine, count: int) -> None:
    if count:
        record_of(machine, "area_of").flags = count
        with pytest.raises(FtraceBug, match="counts more ops than fit"):
            registered(machine, ["area_of"])
    else:
        ops = registered(machine, ["area_of"])
        record_of(machine, "area_of").flags = EN | TRAMP
        with pytest.raises(FtraceBug, match="counts no ops"):
            machine.ftrace.unregister_ftrace_function(ops)
    assert machine.ftrace.disabled.get() == 1


def test_a_site_whose_trampoline_nobody_has_is_bad_accounting(machine: Machine) -> None:
    ops = registered(machine, ["area_of"])
    ops.trampoline = 0
    with pytest.raises(FtraceBug, match="bad trampoline accounting"):
        registered(machine, ["area_of"])
    assert any(line.startswith("Bad trampoline accounting at: ") for line in machine.log.lines)
    assert machine.ftrace.disabled.get() == 1
