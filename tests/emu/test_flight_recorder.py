"""The last instructions: exactly those that a trace of the same call ends with."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from machines import boot

from emu.flight_recorder import LAST_INSTRUCTIONS, STRIDE
from emu.machine import Machine
from emu.stream import traced
from emu.traps import GuestFault


@contextmanager
def untraced(machine: Machine) -> Iterator[list[int]]:
    """As `traced`, but nothing is."""
    yield []


def fault_and_trace(
    function: str, *arguments: int, budget: int | None = None
) -> tuple[GuestFault, list[int]]:
    """The fault of a call, and all that the same call executes on the tracing vCPU of another machine."""
    found = []
    for way in (untraced, traced):
        machine = boot()
        if budget is not None:
            machine.hub.instruction_budget = budget
        with way(machine) as executed, pytest.raises(GuestFault) as raised:
            machine.call(machine.symbol(function), *arguments)
        found.append(raised.value)
    return found[0], executed


def addresses(fault: GuestFault) -> list[int]:
    return [int(line.split()[0], 16) for line in fault.last]


@pytest.mark.parametrize(
    "rounds", [1, 2, 5, STRIDE // 3 - 1, STRIDE // 3, STRIDE // 3 + 1, STRIDE // 3 + 6, STRIDE, STRIDE + 3]
)
def test_the_last_instructions_before_a_fault_are_those_of_a_full_trace(rounds: int) -> None:
    fault, executed = fault_and_trace("late_fault", rounds)
    assert len(executed) == 3 * rounds + 1
    assert addresses(fault) == executed[-LAST_INSTRUCTIONS:]


def test_the_last_instructions_of_a_deep_recursion_are_those_of_a_full_trace() -> None:
    fault, executed = fault_and_trace("overflow_stack", 1)
    assert addresses(fault) == executed[-LAST_INSTRUCTIONS:]
    assert len(fault.last) == 16


@pytest.mark.parametrize("budget", [3, 16, 1000, 1001, 2 * STRIDE, 2 * STRIDE + 1])
def test_the_last_instructions_of_a_spent_budget_are_those_of_a_full_trace(budget: int) -> None:
    fault, executed = fault_and_trace("late_fault", 10 * STRIDE, budget=budget)
    assert len(executed) == budget
    assert addresses(fault) == executed[-LAST_INSTRUCTIONS:]


def test_looking_back_leaves_memory_and_registers_as_they_were_at_the_fault(machine: Machine) -> None:
    with pytest.raises(GuestFault) as raised:
        machine.call(machine.symbol("store_to"), machine.symbol("area_of"), 5)
    assert machine.cpus[0].registers() == raised.value.registers
    counter = machine.slab.kzalloc(8, "counter")
    machine.call(machine.symbol("store_to"), counter, 7)
    assert machine.space.read(counter, 1) == b"\x07"


def test_without_the_recorder_a_fault_has_no_last_instructions(machine: Machine) -> None:
    machine.recorder.enabled = False
    with pytest.raises(GuestFault) as raised:
        machine.call(machine.symbol("jump_nowhere"))
    assert raised.value.last == []


@pytest.mark.parametrize("budget", [5, 500, STRIDE + 50])
def test_looking_back_from_a_spent_budget_does_not_go_on_from_there(machine: Machine, budget: int) -> None:
    machine.hub.instruction_budget = budget
    with pytest.raises(GuestFault) as raised:
        machine.call(machine.symbol("late_fault"), 10 * STRIDE)
    assert machine.cpus[0].registers() == raised.value.registers
    assert raised.value.registers["rip"] == raised.value.address
