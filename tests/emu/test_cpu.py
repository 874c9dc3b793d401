"""vCPUs: exact counts, faults that stay what they are, and translations that do not outlive their bytes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import boot, in_the_middle, registered

from emu.cpu import REGISTERS, UD2, Stop, StopKind
from emu.machine import Machine
from emu.paging import Access
from emu.stream import trace_call
from emu.traps import GuestFault

PAGE_FAULT = 14


def fault_of(machine: Machine, function: str, *arguments: int) -> Stop:
    cpu = machine.cpus[0]
    registers = dict(zip(("rdi", "rsi"), arguments, strict=False))
    in_the_middle(machine, cpu, machine.symbol(function), **registers)
    return cpu.run(1000)


def test_a_store_to_text_is_a_page_fault_with_its_address_in_cr2(machine: Machine) -> None:
    target = machine.symbol("area_of")
    before = machine.space.read(target, 16)
    stop = fault_of(machine, "store_to", target, 0x90)
    assert (stop.kind, stop.vector, stop.address) == (StopKind.FAULT, PAGE_FAULT, target)
    assert machine.kallsyms.describe(stop.rip).startswith("store_to+")
    assert machine.space.read(target, 16) == before


def test_a_store_to_read_only_data_is_a_page_fault(machine: Machine) -> None:
    target = machine.symbol("empty_hash")
    stop = fault_of(machine, "store_to", target, 1)
    assert (stop.vector, stop.address) == (PAGE_FAULT, target)


def test_a_jump_into_the_heap_is_a_page_fault_on_its_first_byte(machine: Machine) -> None:
    heap = machine.slab.kmalloc(64, "code")
    machine.space.write(heap, b"\xc3" * 64)
    cpu = machine.cpus[0]
    in_the_middle(machine, cpu, heap)
    stop = cpu.run(10)
    assert (stop.vector, stop.rip, stop.address) == (PAGE_FAULT, heap, heap)
    with pytest.raises(GuestFault, match="which is no text"):
        machine.call(heap)


def test_a_stack_that_overflows_runs_into_its_guard_page(machine: Machine) -> None:
    bottom = machine.init_task.stack_top - 4 * 4096
    with pytest.raises(GuestFault, match="access to unmapped address") as raised:
        machine.call(machine.symbol("overflow_stack"), 1)
    assert bottom - 4096 <= raised.value.registers["rsp"] <= bottom + 256
    assert machine.space.access(bottom - 1) is None
    assert machine.space.access(bottom) is not None


def test_each_of_many_faults_is_a_page_fault_and_none_a_double_fault(machine: Machine) -> None:
    for _ in range(4):
        assert fault_of(machine, "store_to", machine.symbol("area_of"), 0).vector == PAGE_FAULT
        assert fault_of(machine, "load_from", 0xFFFF_8881_0000_0000).vector == PAGE_FAULT
    assert machine.call(machine.symbol("area_of"), 3, 4) == 7


def test_registers_gs_and_vectors_survive_a_fault(machine: Machine) -> None:
    cpu = machine.cpus[0]
    vectors = bytes(range(256))
    values = {name: 0x0123_4567_0000_0000 + number for number, name in enumerate(REGISTERS[8:16])}
    cpu.set_vectors(vectors)
    in_the_middle(machine, cpu, machine.symbol("load_from"), rdi=0x1000, **values)
    assert cpu.run(100).kind is StopKind.FAULT
    after = cpu.registers()
    assert after == after | values | {"rdi": 0x1000}
    assert cpu.vectors() == vectors
    assert machine.call(machine.symbol("current_pid")) == 1


def test_vectors_are_sixteen_registers_of_sixteen_bytes(machine: Machine) -> None:
    with pytest.raises(ValueError, match="16"):
        machine.cpus[0].set_vectors(bytes(255))


def test_new_bytes_are_executed_by_every_vcpu_and_the_tracer_at_once() -> None:
    machine = boot(cpus=2)
    entry = machine.symbol("area_of")
    for answer in (1, 2, 3):
        machine.space.write(entry, b"\xb8" + answer.to_bytes(4, "little") + b"\xc3")  # mov eax, answer; ret
        for cpu in (*machine.cpus, machine.tracer):
            in_the_middle(machine, cpu, entry)
            cpu.run(100)
            assert cpu.registers()["rax"] == answer


def test_who_watches_memory_is_told_of_each_instruction_and_each_access() -> None:
    machine = boot()
    function, stack = machine.symbol("area_of"), machine.init_task.stack_base - 16
    fetched: list[tuple[int, int]] = []
    accessed: list[tuple[bool, int, int]] = []
    machine.cpus[0].watch_memory(
        lambda *instruction: fetched.append(instruction), lambda *access: accessed.append(access)
    )
    machine.call(function, 3, 4)
    assert fetched[0] == (function, 5)  # the NOP of its site
    assert (False, machine.space.physical(stack), 8) in accessed  # the return address


def test_an_undefined_instruction_is_watched_with_its_two_bytes() -> None:
    machine = boot()
    site = machine.symbol("area_of")
    machine.space.write(site, UD2)
    fetched: list[tuple[int, int]] = []
    machine.cpus[0].watch_memory(lambda *instruction: fetched.append(instruction), lambda *access: None)
    machine.cpus[0].set_registers({"rip": site})
    machine.cpus[0].run(1)
    assert fetched == [(site, 2)]


def test_new_bytes_across_a_page_boundary_are_executed(machine: Machine) -> None:
    area = machine.area.module_alloc(8192, "code")
    machine.space.protect(area, 8192, Access.EXECUTE)
    entry = area + 4096 - 3
    for answer in (1, 2):
        machine.space.write(entry, b"\xb8" + answer.to_bytes(4, "little") + b"\xc3")
        assert machine.call(entry) == answer


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(1, 25), min_size=1, max_size=6))
def test_a_count_is_exact_however_a_run_is_cut(counts: list[int]) -> None:
    machine = boot()
    registered(machine, ["area_of"])
    registered(machine, ["area_of"])
    entry = machine.symbol("measure")
    _, trace = trace_call(machine, entry, 3, 4)
    cpu = machine.cpus[0]
    in_the_middle(machine, cpu, entry, rdi=3, rsi=4)
    done = 0
    for count in counts:
        done += count
        if done >= len(trace):
            return
        assert cpu.run(count).kind is StopKind.BUDGET
        assert cpu.registers()["rip"] == trace[done]


def test_two_vcpus_have_their_own_gs_page_tables_and_registers() -> None:
    machine = boot(cpus=2)
    first, second = machine.tasks[:2]
    for number, task in enumerate((first, second)):
        for function, expected in (("smp_processor_id", number), ("current_pid", number + 1)):
            call = machine.hub.call(task, machine.symbol(function))
            assert machine.hub.finish(task, call) == expected


def test_ud2_stops_on_the_instruction_and_int3_behind_it(machine: Machine) -> None:
    cpu = machine.cpus[0]
    for function, kind, past in (("own_ud2", StopKind.UNDEFINED, 0), ("own_int3", StopKind.BREAKPOINT, 1)):
        at = machine.symbol(function)
        in_the_middle(machine, cpu, at)
        stop = cpu.run(10)
        assert (stop.kind, stop.rip) == (kind, at + past)


def test_the_cpu_has_no_source_of_randomness(machine: Machine) -> None:
    """RDRAND would make runs differ; on this CPU model it is undefined."""
    entry = machine.symbol("area_of")
    machine.space.write(entry, bytes.fromhex("0fc7f0c3"))  # rdrand eax; ret
    in_the_middle(machine, machine.cpus[0], entry)
    assert machine.cpus[0].run(10).kind is StopKind.UNDEFINED
