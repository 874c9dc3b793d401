"""The last instructions: exactly those that a trace of the same call ends with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from machines import Steps, boot

from emu.flight_recorder import LAST_INSTRUCTIONS, STRIDE
from emu.fork import THREAD_SIZE
from emu.machine import Machine
from emu.paging import Access
from emu.stream import traced
from emu.task import Task
from emu.traps import GuestFault

MANY_STACKS = 100


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


class Portions:
    """Guest code gets so many instructions at a time."""

    interleaves = False

    def __init__(self, size: int) -> None:
        self.size = size

    def pick(self, tasks: Sequence[Task], finishing: Task) -> tuple[Task, int | None]:
        return finishing, self.size


@pytest.mark.parametrize("rounds", [1, 2, 5, 6, 50])
def test_single_steps_are_remembered_across_entries(rounds: int) -> None:
    _, executed = fault_and_trace("late_fault", rounds)
    machine = boot()
    machine.hub.schedule = Portions(1)
    with pytest.raises(GuestFault) as raised:
        machine.call(machine.symbol("late_fault"), rounds)
    assert addresses(raised.value) == executed[-LAST_INSTRUCTIONS:]


def test_a_longer_entry_after_single_steps_begins_the_record_anew(machine: Machine) -> None:
    machine.hub.schedule = Steps([(0, 1)] * 5)  # nop, dec, jnz, nop, dec; then all the rest
    with pytest.raises(GuestFault) as raised:
        machine.call(machine.symbol("late_fault"), 3)
    start = machine.symbol("late_fault")
    jnz = start + 4
    assert addresses(raised.value) == [jnz, start, start + 1, jnz, jnz + 2]


def test_what_another_vcpu_does_in_between_is_not_in_the_record() -> None:
    machine = boot(cpus=2)
    first, second = machine.tasks[:2]
    machine.hub.schedule = Steps([(0, None), (1, 20), (0, None)])
    machine.hub.call(second, machine.symbol("measure"), (3, 4))
    call = machine.hub.call(first, machine.symbol("own_int3"))
    with pytest.raises(GuestFault) as raised:
        machine.hub.finish(first, call)
    assert addresses(raised.value) == [machine.symbol("own_int3")]


def test_every_stack_is_found_by_the_addresses_in_it(machine: Machine) -> None:
    frames = []
    for _ in range(MANY_STACKS):
        top = machine.stacks.alloc()
        frame = machine.stacks.frame_of(top - 1)
        assert frame is not None
        assert machine.stacks.frame_of(top - THREAD_SIZE) == frame
        assert machine.stacks.frame_of(top) is None  # the next one's guard page
        machine.space.write(top - 8, top.to_bytes(8, "little"))
        end = frame + THREAD_SIZE
        assert machine.space.arena.bytes[end - 8 : end] == top.to_bytes(8, "little")
        frames.append(frame)
    assert machine.stacks.frame_of(top + THREAD_SIZE) is None  # no stack yet
    assert machine.stacks.frame_of(machine.symbol("area_of")) is None
    assert len({*frames}) == MANY_STACKS
    ends = [(frame, frame + THREAD_SIZE - 1) for frame in frames]
    assert all(any(first in each and last in each for each in machine.stacks.blocks) for first, last in ends)
    assert len(machine.stacks.blocks) < 10


def test_only_the_stack_of_the_running_task_is_copied(machine: Machine) -> None:
    cpu = machine.cpus[0]
    cpu.set_registers({"rsp": machine.init_task.stack_top - 64})

    def copied() -> int:
        return sum(end - start for start, end in machine.recorder._spans(cpu.stack_pointer()))

    before, page_tables = copied(), machine.space.arena.in_use()[0].stop
    for _ in range(MANY_STACKS):
        machine.stacks.alloc()
    assert machine.space.arena.in_use()[0].stop - page_tables > MANY_STACKS * THREAD_SIZE // 2
    assert copied() - before < 4 * THREAD_SIZE


def goes_elsewhere_the_second_time(machine: Machine) -> int:
    """Guest code that takes another branch if the word at its argument holds what it has stored there."""
    text = machine.area.module_alloc(4096, "guest code")
    machine.space.protect(text, 4096, Access.EXECUTE)
    # cmp qword [rdi], 0; jne +4; mov [rdi], rdi; nop; ud2
    machine.space.write(text, bytes.fromhex("48833f00 7504 48893f 90 0f0b"))
    return text


def test_the_stack_that_the_call_runs_on_is_put_back_for_the_repetition(machine: Machine) -> None:
    text = goes_elsewhere_the_second_time(machine)
    with pytest.raises(GuestFault) as raised:
        machine.call(text, machine.init_task.stack_top - THREAD_SIZE)
    assert addresses(raised.value) == [text, text + 4, text + 6, text + 9, text + 10]


def test_there_is_no_record_if_the_repetition_ends_otherwise(machine: Machine) -> None:
    """What lies on another task's stack is not put back."""
    text = goes_elsewhere_the_second_time(machine)
    other = machine.stacks.alloc() - 64
    with pytest.raises(GuestFault) as raised:
        machine.call(text, other)
    assert raised.value.address == text + 10
    assert raised.value.last == []
    assert machine.space.read(other, 8) == other.to_bytes(8, "little")
