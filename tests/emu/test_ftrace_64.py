"""The entry code: its bytes against a real kernel's, and exactly which registers survive it."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import DESTROYED, RECORDED, REGS, boot, count_of, new_ops, registered

from emu.assembly import disassemble
from emu.machine import Machine
from emu.memory import read_u64
from emu.stream import EFLAGS_ARITHMETIC, Stream, execute_stream

SITE = "area_of"


def code_of(machine: Machine, start: str, end: str) -> bytes:
    at = machine.symbol(start)
    return machine.space.read(at, machine.symbol(end) - at)


def test_ftrace_caller_has_the_bytes_of_a_real_kernel_but_for_three_displacements(machine: Machine) -> None:
    recorded = RECORDED["private_trampoline"]
    theirs = bytearray.fromhex(recorded["tramp_bytes"])[:194]
    ours = bytearray(code_of(machine, "ftrace_caller", "ftrace_caller_end"))
    for code in (ours, theirs):
        code[0x67 + 3 : 0x67 + 7] = bytes(4)  # the load of the ops
        code[0x7E + 1 : 0x7E + 5] = bytes(4)  # the call
    assert ours == theirs


@pytest.mark.parametrize(
    "label", ["ftrace_call", "ftrace_caller_op_ptr", "ftrace_caller_end"], ids=lambda label: label
)
def test_labels_lie_where_they_lie_in_the_recorded_ftrace_caller(machine: Machine, label: str) -> None:
    recorded = {name: int(address, 16) for name, address in RECORDED["symbols"].items()}
    assert machine.symbol(label) - machine.symbol("ftrace_caller") == (
        recorded[label] - recorded["ftrace_caller"]
    )


@pytest.mark.parametrize(
    "label",
    ["ftrace_regs_call", "ftrace_regs_caller_op_ptr", "ftrace_regs_caller_jmp", "ftrace_regs_caller_end"],
)
def test_labels_lie_where_they_lie_in_the_recorded_ftrace_regs_caller(machine: Machine, label: str) -> None:
    recorded = {name: int(address, 16) for name, address in RECORDED["symbols"].items()}
    assert machine.symbol(label) - machine.symbol("ftrace_regs_caller") == (
        recorded[label] - recorded["ftrace_regs_caller"]
    )


def test_the_common_trampolines_load_function_trace_op(machine: Machine) -> None:
    for label in ("ftrace_caller_op_ptr", "ftrace_regs_caller_op_ptr"):
        at = machine.symbol(label)
        code = machine.space.read(at, 7)
        assert code[:3].hex() == "488b15"
        assert at + 7 + int.from_bytes(code[3:], "little", signed=True) == machine.symbol("function_trace_op")


def test_all_of_the_entry_code_decodes_and_ends_in_a_return(machine: Machine) -> None:
    for start, end in (
        ("ftrace_caller", "ftrace_caller_end"),
        ("ftrace_regs_caller", "ftrace_regs_caller_end"),
        ("arch_ftrace_ops_list_func", "arch_ftrace_ops_list_func_end"),
    ):
        decoded = list(disassemble(code_of(machine, start, end), machine.symbol(start)))
        assert not [each for each in decoded if each.mnemonic == ".byte"]
    assert machine.space.read(machine.symbol("ftrace_caller_end"), 1) == b"\xc3"


# Registers.

PASSED_ON = ("rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "rbp")  # save_mcount_regs
CALLEE_SAVED = ("rbx", "r12", "r13", "r14", "r15")  # psABI 3.2.1, kept by the handler


def private(machine: Machine) -> None:
    registered(machine, [SITE], func="clobber")


def common(machine: Machine) -> None:
    registered(machine, [SITE], func="clobber")
    registered(machine, [SITE])


def private_regs(machine: Machine) -> None:
    registered(machine, [SITE], func="clobber", flags=REGS)


def common_regs(machine: Machine) -> None:
    registered(machine, [SITE], func="clobber", flags=REGS)
    registered(machine, [SITE])


def redirected(machine: Machine) -> Stream:
    site = machine.symbol(SITE)
    stream = execute_stream(machine, site, site + 5)
    assert stream.reached, stream.stop
    return stream


WAYS = pytest.mark.parametrize("way", [private, common, private_regs, common_regs])
WAYS_WITHOUT_REGS = pytest.mark.parametrize("way", [private, common])
WAYS_WITH_REGS = pytest.mark.parametrize("way", [private_regs, common_regs])


@WAYS
def test_arguments_rbp_and_what_a_callee_saves_survive(
    machine: Machine, way: Callable[[Machine], None]
) -> None:
    way(machine)
    stream = redirected(machine)
    kept = (*PASSED_ON, *CALLEE_SAVED, "rsp")
    assert {name: stream.after[name] for name in kept} == {name: stream.before[name] for name in kept}


@WAYS
def test_the_stack_above_and_the_vectors_are_not_touched(
    machine: Machine, way: Callable[[Machine], None]
) -> None:
    way(machine)
    stream = redirected(machine)
    assert stream.stack_after == stream.stack_before
    assert stream.vectors_after == stream.vectors_before


@WAYS_WITHOUT_REGS
def test_ftrace_caller_loses_r10_r11_and_the_arithmetic_flags(
    machine: Machine, way: Callable[[Machine], None]
) -> None:
    way(machine)
    stream = redirected(machine)
    assert stream.after["r10"] == DESTROYED
    assert stream.after["r11"] == DESTROYED
    assert stream.before["eflags"] & EFLAGS_ARITHMETIC == EFLAGS_ARITHMETIC
    assert stream.after["eflags"] & EFLAGS_ARITHMETIC != EFLAGS_ARITHMETIC


@WAYS_WITH_REGS
def test_ftrace_regs_caller_keeps_r10_and_the_flags_and_loses_r11(
    machine: Machine, way: Callable[[Machine], None]
) -> None:
    way(machine)
    stream = redirected(machine)
    assert stream.after["r10"] == stream.before["r10"]
    assert stream.after["r11"] == DESTROYED
    assert stream.after["eflags"] == stream.before["eflags"]


def test_the_handler_gets_ip_the_parents_ip_its_ops_and_the_saved_registers(machine: Machine) -> None:
    ops = registered(machine, [SITE])
    site = machine.symbol(SITE)
    handler = machine.symbol("trace_count")
    stream = execute_stream(machine, site, handler)
    at_entry = stream.after
    assert at_entry["rdi"] == site
    assert at_entry["rsi"] == machine.return_address
    assert at_entry["rdx"] == ops.address_
    regs = machine.view("pt_regs", at_entry["rcx"])
    assert (regs.ax, regs.cx, regs.dx, regs.si, regs.di, regs.r8, regs.r9, regs.bp) == tuple(
        stream.before[name] for name in PASSED_ON
    )
    assert regs.ip == site + 5
    assert regs.sp == stream.before["rsp"]
    assert regs.orig_ax == 0


def test_the_regs_trampoline_fills_the_whole_of_pt_regs(machine: Machine) -> None:
    registered(machine, [SITE], flags=REGS)
    site = machine.symbol(SITE)
    stream = execute_stream(machine, site, machine.symbol("trace_count"))
    regs = machine.view("pt_regs", stream.after["rcx"])
    for member, name in (("bx", "rbx"), ("r10", "r10"), ("r11", "r11"), ("r12", "r12"), ("r15", "r15")):
        assert getattr(regs, member) == stream.before[name]
    assert regs.flags == stream.before["eflags"]
    assert (regs.cs, regs.ss) == (0x10, 0x18)
    assert regs.sp == stream.before["rsp"]


@WAYS
def test_where_the_handler_says_the_call_goes(machine: Machine, way: Callable[[Machine], None]) -> None:
    way(machine)
    assert machine.call(machine.symbol(SITE), 3, 4) == 7


def test_stack_arguments_and_hidden_result_pointers_survive_a_traced_call(machine: Machine) -> None:
    for name in ("sum_many", "sum_var", "make_box", "mix"):
        registered(machine, [name], func="clobber")
        registered(machine, [name])
    assert machine.call(machine.symbol("sum_many"), *range(1, 10)) == 45
    assert machine.call(machine.symbol("sum_var"), 6, 1, 2, 3, 4, 5, 6) == 21
    box = machine.slab.kzalloc(24, "box")
    assert machine.call(machine.symbol("make_box"), box, 1, 2, 3) == box
    assert [read_u64(machine.space, box + 8 * word) for word in range(3)] == [1, 2, 3]


# The list function.


def test_the_list_function_calls_the_newest_ops_first(machine: Machine) -> None:
    buffer = machine.slab.kzalloc(8 * 8, "order")
    ops = [registered(machine, [SITE], func="record_order", private=buffer) for _ in range(4)]
    machine.call(machine.symbol(SITE), 1, 2)
    assert read_u64(machine.space, buffer) == 4
    order = [read_u64(machine.space, buffer + 8 + 8 * index) for index in range(4)]
    assert order == [each.address_ for each in reversed(ops)]


def test_the_list_function_passes_over_ops_that_want_other_sites(machine: Machine) -> None:
    here, also_here = registered(machine, [SITE]), registered(machine, [SITE, "measure"])
    elsewhere = registered(machine, ["measure", "perimeter_of"])
    machine.call(machine.symbol(SITE), 1, 2)
    assert [count_of(machine, each) for each in (here, also_here, elsewhere)] == [1, 1, 0]


def test_the_list_function_obeys_a_raw_change_of_a_hash_entry(machine: Machine) -> None:
    first, second = registered(machine, [SITE]), registered(machine, [SITE])
    entry = read_u64(machine.space, machine.ftrace.ops_list.filter(second).buckets)
    offset = machine.layouts.offsetof("ftrace_func_entry", "ip")
    machine.space.write(entry + offset, (machine.symbol(SITE) + 1).to_bytes(8, "little"))
    machine.call(machine.symbol(SITE), 1, 2)
    assert (count_of(machine, first), count_of(machine, second)) == (1, 0)


def test_the_list_function_obeys_a_notrace_hash(machine: Machine) -> None:
    first, second = registered(machine, [SITE]), registered(machine, [SITE])
    hashes = machine.ftrace.ops_list.hashes(second)
    hashes.notrace_hash = hashes.filter_hash
    machine.call(machine.symbol(SITE), 1, 2)
    assert (count_of(machine, first), count_of(machine, second)) == (1, 0)
    hashes.notrace_hash = 0
    machine.call(machine.symbol(SITE), 1, 2)
    assert (count_of(machine, first), count_of(machine, second)) == (2, 1)


@settings(max_examples=25)
@given(extra=st.sets(st.sampled_from(
    ["area_of", "perimeter_of", "measure", "fib", "ack", "tail_inner", "tail_outer", "checked_div"]
)))  # fmt: skip
def test_the_list_function_finds_a_site_in_hashes_of_every_size(extra: set[str]) -> None:
    machine = boot()
    plain, wanting = registered(machine, [SITE]), new_ops(machine, extra | {"measure"})
    machine.ftrace.register_ftrace_function(wanting)
    machine.call(machine.symbol(SITE), 1, 2)
    assert count_of(machine, plain) == 1
    assert count_of(machine, wanting) == (SITE in extra)


def test_with_no_recursion_bit_left_the_list_function_calls_nobody(machine: Machine) -> None:
    first, second = registered(machine, [SITE]), registered(machine, [SITE])
    task = machine.view("task_struct", machine.init_task.struct)
    task.trace_recursion = 1 << 8 | 1 << 9
    assert machine.call(machine.symbol(SITE), 1, 2) == 3
    assert (count_of(machine, first), count_of(machine, second)) == (0, 0)
    assert task.trace_recursion == 1 << 8 | 1 << 9


def test_the_list_function_leaves_recursion_bits_and_preemption_count_as_they_were(machine: Machine) -> None:
    registered(machine, [SITE])
    registered(machine, [SITE])
    count = machine.cpus[0].gs_base + machine.vmlinux.symbols["__preempt_count"]
    before = machine.space.read(count, 4)
    machine.call(machine.symbol(SITE), 1, 2)
    assert machine.space.read(count, 4) == before
    assert machine.view("task_struct", machine.init_task.struct).trace_recursion == 0
