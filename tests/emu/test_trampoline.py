"""Private trampolines: the kernel's layout, byte for byte."""

import pytest
from machines import RECORDED, REGS, call_at, registered

from emu.cpu import StopKind
from emu.machine import Machine
from emu.memory import MemoryFault, read_u64
from emu.paging import Access
from emu.traps import GuestFault

SIZES = {0: 194 + 5 + 8, REGS: 327 + 5 + 8}


def test_a_private_trampoline_has_the_recorded_bytes_but_for_the_call(machine: Machine) -> None:
    recorded = RECORDED["private_trampoline"]
    theirs = bytearray.fromhex(recorded["tramp_bytes"])
    ops = registered(machine, ["area_of"])
    ours = bytearray(machine.space.read(ops.trampoline, len(theirs)))
    call = recorded["call_off"]
    assert ours[call : call + 5] == call_at(ops.trampoline + call, machine.symbol("trace_count"))
    ours[call : call + 5] = theirs[call : call + 5] = bytes(5)
    # The ops load has the same displacement in both: the distance to +199 does not depend on the address.
    assert ours == theirs


def test_the_pointer_to_the_ops_follows_the_return(machine: Machine) -> None:
    ops = registered(machine, ["area_of"])
    at = RECORDED["private_trampoline"]["ops_ptr_off"]
    assert at == 199
    assert read_u64(machine.space, ops.trampoline + at) == ops.address_


@pytest.mark.parametrize("flags", SIZES)
def test_size_is_code_return_and_pointer_and_the_rest_of_the_page_is_zero(
    machine: Machine, flags: int
) -> None:
    ops = registered(machine, ["area_of"], flags=flags)
    assert ops.trampoline_size == SIZES[flags]
    rest = machine.space.read(ops.trampoline + SIZES[flags], 4096 - SIZES[flags])
    assert rest == bytes(len(rest))
    assert read_u64(machine.space, ops.trampoline + SIZES[flags] - 8) == ops.address_


def test_a_regs_trampoline_is_the_common_one_with_its_jump_a_two_byte_nop(machine: Machine) -> None:
    ops = registered(machine, ["area_of"], flags=REGS)
    start, end = machine.symbol("ftrace_regs_caller"), machine.symbol("ftrace_regs_caller_end")
    jump = machine.symbol("ftrace_regs_caller_jmp") - start
    call, load = (
        machine.symbol("ftrace_regs_call") - start,
        machine.symbol("ftrace_regs_caller_op_ptr") - start,
    )
    assert end - start == 327
    common = bytearray(machine.space.read(start, end - start))
    assert common[jump] == 0x75
    common[jump : jump + 2] = bytes.fromhex("6690")
    common[call : call + 5] = call_at(ops.trampoline + call, machine.symbol("trace_count"))
    common[load + 3 : load + 7] = (327 + 5 - load - 7).to_bytes(4, "little")
    assert machine.space.read(ops.trampoline, 327) == common
    assert machine.space.read(ops.trampoline + 327, 5) == bytes.fromhex("c3cc000000")


def test_a_trampoline_has_a_page_of_its_own_that_is_text(machine: Machine) -> None:
    first, second = registered(machine, ["area_of"]), registered(machine, ["perimeter_of"])
    assert first.trampoline % 4096 == second.trampoline % 4096 == 0
    assert first.trampoline != second.trampoline
    assert machine.space.access(first.trampoline) is Access.EXECUTE
    with pytest.raises(GuestFault, match="write to read-only address"):
        machine.call(machine.symbol("store_to"), first.trampoline, 0)


def test_a_freed_trampoline_is_gone_and_a_jump_into_it_faults(machine: Machine) -> None:
    ops = registered(machine, ["area_of"])
    address = ops.trampoline
    machine.ftrace.unregister_ftrace_function(ops)
    assert ops.trampoline == 0
    assert machine.kallsyms.at(address) is None
    with pytest.raises(MemoryFault):
        machine.space.read(address, 1)
    machine.tracer.set_registers({"rip": address})
    assert machine.tracer.run(1).kind is StopKind.FAULT


def test_a_trampoline_shows_up_in_kallsyms_as_a_real_one_does(machine: Machine) -> None:
    ops = registered(machine, ["area_of"])
    assert machine.kallsyms.describe(ops.trampoline + 5) == "ftrace_trampoline+0x5/0xcf [__builtin__ftrace]"


def test_an_ops_that_keeps_its_trampoline_gets_its_call_poked_when_it_registers_again(
    machine: Machine,
) -> None:
    # Only an ops in the kernel image itself is not DYNAMIC and keeps its trampoline.
    static = machine.view("ftrace_ops", machine.symbol("witness"))
    machine.space.protect(static.address_ & ~0xFFF, 4096, Access.WRITE)
    static.func = machine.symbol("trace_count")
    static.private = machine.symbol("trace_counter")
    machine.ftrace.ftrace_set_filter_ip(static, machine.symbol("area_of"), remove=False)
    machine.ftrace.register_ftrace_function(static)
    address = static.trampoline
    machine.ftrace.unregister_ftrace_function(static)
    assert static.trampoline == address
    static.func = machine.symbol("clobber")
    machine.ftrace.register_ftrace_function(static)
    assert static.trampoline == address
    call = address + 0x7E
    assert machine.space.read(call, 5) == call_at(call, machine.symbol("clobber"))


def test_where_a_return_needs_a_thunk_a_trampoline_ends_with_a_jump_to_it(machine: Machine) -> None:
    thunk = machine.symbol("measure")
    asked = []

    def return_thunk_at(address: int) -> int:
        asked.append(address)
        return thunk

    machine.trampolines._return_thunk_at = return_thunk_at
    ops = registered(machine, ["area_of"])
    end = ops.trampoline + SIZES[0] - 8 - 5
    assert asked == [end]
    assert machine.space.read(end, 5) == b"\xe9" + call_at(end, thunk)[1:]
    assert read_u64(machine.space, end + 5) == ops.address_
