"""The unwinder against a shadow call stack, frame for frame, at every instruction of real calls."""

from pathlib import Path

import pytest
from shadow_stack import execute_with_shadow

from elf.image import Image
from emu.machine import Machine
from emu.unwind import Unwinder

BUILD = Path(__file__).parents[2] / "fixtures" / "build"
CALLS: list[tuple[str, tuple[int, ...]]] = [
    ("area_of", (3, 4)),
    ("measure", (3, 4)),
    ("many_calls", (5,)),
    ("fib", (9,)),
    ("ack", (2, 4)),
    ("tail_outer", (5,)),
    ("sum_many", (1, 2, 3, 4, 5, 6, 7, 8, 9)),
    ("checked_div", (9, 0)),
    ("call_twin", (1,)),
]


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine(Image.open(str(BUILD / "kernel.o")))


@pytest.mark.parametrize(("function", "arguments"), CALLS, ids=[name for name, _ in CALLS])
def test_every_frame_is_found_at_every_instruction(
    machine: Machine, function: str, arguments: tuple[int, ...]
) -> None:
    unwinder = Unwinder(machine)
    points = 0
    for registers, expected in execute_with_shadow(machine, machine.symbol(function), *arguments):
        trace = unwinder.walk(registers)
        assert trace.unreliable == ""
        assert list(trace.entries) == expected, machine.kallsyms.describe(registers["rip"])
        points += 1
    assert points > 2


def test_a_hooked_return_address_is_recovered_in_one_place(machine: Machine) -> None:
    """unwind_recover_ret_addr(): whoever hooks returns tells the unwinder the real addresses."""
    unwinder = Unwinder(machine)
    hooked = 0x1234
    seen = []

    def recover(address: int, slot: int) -> int:
        seen.append(slot)
        return machine.return_address if address == hooked else address

    unwinder.recover_return_address = recover
    registers, _ = next(execute_with_shadow(machine, machine.symbol("area_of"), 3, 4))
    machine.space.write(registers["rsp"], hooked.to_bytes(8, "little"))
    trace = unwinder.walk(registers)
    assert trace.entries == (registers["rip"],)
    assert trace.unreliable == ""
    assert seen == [registers["rsp"]]


def test_unknown_code_makes_a_stack_unreliable(machine: Machine) -> None:
    unwinder = Unwinder(machine)
    registers, _ = next(execute_with_shadow(machine, machine.symbol("area_of"), 3, 4))
    registers["rip"] = 0xFFFF_FFFF_DEAD_B000
    trace = unwinder.walk(registers)
    assert trace.unreliable == "no unwind information for 0xffffffffdeadb000"


def test_a_stack_pointer_into_nowhere_is_unreliable(machine: Machine) -> None:
    unwinder = Unwinder(machine)
    registers, _ = next(execute_with_shadow(machine, machine.symbol("area_of"), 3, 4))
    registers["rsp"] = 0xFFFF_C900_7000_0000
    assert "not readable" in unwinder.walk(registers).unreliable


def test_the_tables_of_an_unloaded_module_are_forgotten(machine: Machine) -> None:
    """A module of the same name may come back with other code at other places."""
    unwinder = machine.unwinder
    for code in ("fix_area.o", "fix_all.o"):
        loaded = machine.modules.load_module(Image.open(str(BUILD / code)), "again")
        for text in loaded.placement.groups[:1]:
            assert unwinder.row_at(text.start) is not None, code
        machine.modules.unload_module("again")
