"""Streams: executed up to a place and no further, and without a trace if that is asked for."""

from machines import count_of, registered

from emu.machine import Machine
from emu.stream import execute_and_undo, execute_stream, trace_call, undone


def test_a_stream_ends_before_the_first_instruction_of_what_it_stops_at(machine: Machine) -> None:
    site, handler = machine.symbol("area_of"), machine.symbol("trace_count")
    ops = registered(machine, ["area_of"])
    stream = execute_stream(machine, site, handler)
    assert stream.reached
    assert stream.after["rip"] == handler
    assert handler not in stream.addresses
    assert stream.addresses[:2] == (site, ops.trampoline)
    assert count_of(machine, ops) == 0


def test_a_stream_that_never_gets_there_says_so(machine: Machine) -> None:
    elsewhere = machine.symbol("perimeter_of")
    for entry in ("area_of", "spin_forever", "jump_nowhere"):
        assert not execute_stream(machine, machine.symbol(entry), elsewhere, limit=1000).reached


def test_what_is_undone_leaves_no_trace_in_memory(machine: Machine) -> None:
    ops = registered(machine, ["area_of"])
    before = machine.space.snapshot()
    with undone(machine):
        execute_stream(machine, machine.symbol("area_of"), machine.return_address)
        assert count_of(machine, ops) == 1
    assert before.changed(machine.space.snapshot()) == []


def test_a_stream_that_is_undone_leaves_no_trace_in_memory_nor_in_the_page_tables(machine: Machine) -> None:
    ops = registered(machine, ["area_of"])
    used, _ = machine.space.arena.in_use()
    before = machine.space.arena.bytes[: used.stop]
    stream = execute_and_undo(machine, machine.symbol("area_of"), machine.symbol("area_of") + 5)
    assert stream.reached
    assert stream.stores, "the trampoline saves registers"
    assert machine.space.arena.bytes[: used.stop] == before
    assert count_of(machine, ops) == 0


def test_a_trace_is_every_instruction_of_the_call_and_its_result(machine: Machine) -> None:
    result, addresses = trace_call(machine, machine.symbol("measure"), 3, 4)
    assert result == machine.call(machine.symbol("measure"), 3, 4) == 7007
    assert addresses[0] == machine.symbol("measure")
    assert addresses.count(machine.symbol("area_of")) == addresses.count(machine.symbol("perimeter_of")) == 1
    assert machine.return_address not in addresses


def test_every_register_of_a_stream_has_a_value_of_its_own(machine: Machine) -> None:
    site = machine.symbol("area_of")
    before = execute_stream(machine, site, site).before
    values = [value for name, value in before.items() if name not in ("rip", "eflags")]
    assert len(set(values)) == len(values)
