"""Leaving the guest: reports that say where and why, breakpoints with and without an owner, WARNs."""

import pytest
from machines import boot

from elf.errors import KlpemuError
from emu.cpu import REGISTERS
from emu.events import EventKind
from emu.machine import Machine
from emu.paging import Access
from emu.traps import GuestFault

NOWHERE = 0xFFFF_FFFF_DEAD_B000


def test_a_guest_that_loops_for_ever_is_stopped_and_reported(machine: Machine) -> None:
    machine.hub.instruction_budget = 10_000
    with pytest.raises(GuestFault, match="did not return within 10,000 instructions") as raised:
        machine.call(machine.symbol("spin_forever"))
    fault = raised.value
    assert "spin_forever+" in fault.where
    assert set(fault.registers) == set(REGISTERS)
    assert len(fault.last) == 16
    assert all("spin_forever+" in line for line in fault.last)
    assert machine.call(machine.symbol("area_of"), 3, 4) == 7


def test_a_guest_that_calls_an_export_for_ever_is_stopped_too(machine: Machine) -> None:
    machine.traps.exports["test_export"] = lambda machine, registers: 0
    machine.hub.instruction_budget = 50_000
    with pytest.raises(GuestFault, match="did not return within"):
        machine.call(machine.symbol("loop_export"))


def test_a_jump_to_nowhere_names_the_target_and_where_it_came_from(machine: Machine) -> None:
    with pytest.raises(GuestFault, match=f"jump to unmapped address {NOWHERE:#x}") as raised:
        machine.call(machine.symbol("jump_nowhere"))
    assert raised.value.where.startswith(f"{NOWHERE:#x}, reached from jump_nowhere+")
    assert raised.value.address == NOWHERE
    assert "call" in raised.value.last[-1]


def test_a_report_has_the_error_all_registers_and_the_last_instructions(machine: Machine) -> None:
    with pytest.raises(GuestFault) as raised:
        machine.call(machine.symbol("store_to"), machine.symbol("area_of"), 0x5A)
    report = raised.value.report()
    assert report.splitlines()[0] == str(raised.value)
    for name, value in raised.value.registers.items():
        assert f"{name:>6} {value:016x}" in report
    last = report.splitlines()[-1]
    assert "store_to+" in last
    assert "mov qword ptr [rdi], rsi" in last


def test_a_write_to_text_names_the_symbol_written_to(machine: Machine) -> None:
    target = machine.symbol("area_of") + 1
    with pytest.raises(GuestFault, match=rf"write to read-only address {target:#x} \(area_of\+0x1/0x10\)"):
        machine.call(machine.symbol("store_to"), target, 0)


def test_an_int3_that_nobody_claims_ends_the_call(machine: Machine) -> None:
    with pytest.raises(GuestFault, match="an int3 that no breakpoint handler claims") as raised:
        machine.call(machine.symbol("own_int3"))
    assert "own_int3+0x0" in raised.value.where


def test_breakpoint_handlers_are_asked_in_order_until_one_claims_it(machine: Machine) -> None:
    asked = []

    def mine(registers: dict[str, int], push: object) -> bool:
        asked.append(registers["rip"])
        return True

    def never(registers: dict[str, int], push: object) -> bool:
        raise AssertionError("claimed before")

    machine.traps.breakpoint_handlers += [mine, never]
    assert machine.call(machine.symbol("own_int3")) == 42
    assert asked == [machine.symbol("own_int3") + 1]


def test_a_trap_and_its_handling_are_two_steps_and_two_events(machine: Machine) -> None:
    machine.traps.breakpoint_handlers.append(lambda registers, push: True)
    task = machine.init_task
    call = machine.hub.call(task, machine.symbol("own_int3"))
    machine.hub.advance(task)
    assert [event.kind for event in machine.events][-1] is EventKind.TRAP
    assert not task.interruptible
    machine.hub.advance(task)
    assert [event.kind for event in machine.events][-1] is EventKind.EMULATE
    assert task.interruptible
    assert machine.hub.finish(task, call) == 42


def test_a_ud2_that_is_no_warn_of_ours_ends_the_call(machine: Machine) -> None:
    with pytest.raises(GuestFault, match="undefined instruction"):
        machine.call(machine.symbol("own_ud2"))
    assert machine.warnings == []


def test_a_call_has_an_aligned_stack_and_its_further_arguments_on_it(machine: Machine) -> None:
    assert machine.call(machine.symbol("sum_many"), *range(1, 10)) == 45
    for count in range(7, 12):
        task = machine.init_task
        machine.hub.call(task, machine.symbol("own_int3"), range(count))
        machine.hub.advance(task)
        rsp = task.cpu.registers()["rsp"]
        assert (rsp + 8) % 16 == 0
        words = [int.from_bytes(machine.space.read(rsp + 8 * n, 8), "little") for n in range(count - 5)]
        assert words == [machine.return_address, *range(6, count)]
        machine.hub.abandon(task)


def test_arguments_wider_than_a_register_are_cut_and_negative_ones_extended(machine: Machine) -> None:
    assert machine.call(machine.symbol("area_of"), -1, 2) == 1
    assert machine.call(machine.symbol("area_of"), 1 << 64, 5) == 5


def test_an_export_without_an_answer_fails_at_the_call_naming_the_caller(machine: Machine) -> None:
    with pytest.raises(KlpemuError, match="guest code called test_export") as raised:
        machine.call(machine.symbol("call_export"))
    assert "call_export+" in raised.value.where


def test_two_machines_do_not_share_anything() -> None:
    first, second = boot(), boot()
    first.call(first.symbol("store_to"), first.symbol("trace_counter"), 9)
    assert second.variable("trace_counter").get() == 0


def test_the_last_instruction_before_a_page_that_is_not_there_is_shown(machine: Machine) -> None:
    area = machine.area.module_alloc(4096, "code")
    machine.space.protect(area, 4096, Access.EXECUTE)
    machine.space.write(area + 4094, bytes.fromhex("0f0b"))
    with pytest.raises(GuestFault, match="undefined instruction") as raised:
        machine.call(area + 4094)
    assert raised.value.last[-1].endswith("ud2")
