"""Views: no second copy, the kernel's names, and stores that are events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import boot

from elf.errors import KlpemuError
from emu.events import EventKind
from emu.list import init_list_head, list_add_tail
from emu.machine import Machine
from emu.memory import MemoryFault
from emu.view import GuestVariable, container_of, list_for_each_entry

SHARED = boot()
OPS = SHARED.slab.kzalloc(SHARED.layouts.sizeof("ftrace_ops"), "ftrace_ops")
TASK = SHARED.slab.kzalloc(SHARED.layouts.sizeof("task_struct"), "task_struct")


@given(value=st.integers(0, (1 << 64) - 1))
def test_two_views_of_one_struct_always_agree(value: int) -> None:
    first, second = SHARED.view("ftrace_ops", OPS), SHARED.view("ftrace_ops", OPS)
    first.private = value
    assert second.private == value
    offset = SHARED.layouts.offsetof("ftrace_ops", "private")
    assert SHARED.space.read(OPS + offset, 8) == value.to_bytes(8, "little")
    assert first == second
    assert hash(first) == hash(second)


@given(value=st.integers(-(1 << 31), (1 << 31) - 1))
def test_a_signed_member_reads_back_signed(value: int) -> None:
    task = SHARED.view("task_struct", TASK)
    task.patch_state = value
    assert task.patch_state == value


@given(name=st.binary(max_size=16))
def test_an_array_of_bytes_is_padded_with_zeroes(name: bytes) -> None:
    task = SHARED.view("task_struct", TASK)
    task.comm = b"x" * 16
    task.comm = name
    assert task.comm == name.ljust(16, b"\0")


def test_bytes_that_do_not_fit_an_array_are_refused(machine: Machine) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        machine.view("task_struct", machine.init_task.struct).comm = b"x" * 17


def test_a_number_that_does_not_fit_its_member_is_refused(machine: Machine) -> None:
    with pytest.raises(KlpemuError, match="does not fit a member of 4 bytes"):
        machine.view("task_struct", machine.init_task.struct).pid = 1 << 31


def test_members_the_struct_does_not_have_are_refused_both_ways(machine: Machine) -> None:
    task = machine.view("task_struct", machine.init_task.struct)
    with pytest.raises(AttributeError, match="struct task_struct has no member 'pidd'"):
        _ = task.pidd
    with pytest.raises(AttributeError):
        task.pidd = 1
    with pytest.raises(KlpemuError, match="no member nowhere"):
        machine.layouts.offsetof("task_struct", "nowhere")
    with pytest.raises(KlpemuError, match="no struct nothing"):
        machine.layouts.sizeof("nothing")


def test_a_view_of_nothing_faults_when_it_is_used(machine: Machine) -> None:
    view = machine.view("ftrace_ops", 8)
    with pytest.raises(MemoryFault):
        _ = view.func


def test_offsets_reach_into_nested_structs(machine: Machine) -> None:
    layouts = machine.layouts
    assert layouts.offsetof("ftrace_ops", "local_hash.filter_hash") == (
        layouts.offsetof("ftrace_ops", "local_hash") + layouts.offsetof("ftrace_ops_hash", "filter_hash")
    )
    # What a real 6.1 has, too.
    assert layouts.offsetof("klp_func", "stack_node") == 0x70
    assert layouts.offsetof("pt_regs", "ip") == 0x80


def test_container_of_undoes_taking_the_address_of_a_member(machine: Machine) -> None:
    ops = machine.view("klp_ops", 0xFFFF_8880_0000_1000)
    assert container_of(ops.fops, "klp_ops", "fops") == ops
    assert container_of(ops.func_stack, "klp_ops", "func_stack") == ops
    assert ops.member_("func_stack") == ops.func_stack.address_


def test_a_pointer_is_followed_by_its_type_and_null_is_none(machine: Machine) -> None:
    ops = machine.view("ftrace_ops", machine.symbol("ftrace_list_end"))
    assert ops.follow_("func_hash") == ops.local_hash
    assert ops.follow_("next") is None
    with pytest.raises(TypeError, match="not a pointer to a struct"):
        ops.follow_("flags")


def test_list_for_each_entry_gives_the_structs_in_order(machine: Machine) -> None:
    head = machine.list_head("klp_patches")
    patches = []
    for _ in range(4):
        patch = machine.view("klp_patch", machine.slab.kzalloc(machine.layouts.sizeof("klp_patch"), "patch"))
        list_add_tail(patch.list, head)
        patches.append(patch)
    assert list(list_for_each_entry(head, "klp_patch", "list")) == patches


def test_an_empty_list_has_no_entries(machine: Machine) -> None:
    head = machine.list_head("klp_patches")
    init_list_head(head)
    assert list(list_for_each_entry(head, "klp_patch", "list")) == []


def test_guest_code_sees_what_a_view_stores_and_the_other_way_round(machine: Machine) -> None:
    task = machine.view("task_struct", machine.init_task.struct)
    task.pid = 4711
    assert machine.call(machine.symbol("current_pid")) == 4711
    counter = machine.variable("trace_counter")
    machine.call(machine.symbol("store_to"), counter.address, 12)
    assert counter.get() == 12


def test_every_store_through_a_view_is_an_event_with_the_bytes_before_and_after(machine: Machine) -> None:
    start = machine.events.total
    task = machine.view("task_struct", machine.init_task.struct)
    task.pid = 0x0102
    (event,) = machine.events.since(start)
    assert (event.kind, event.address) == (EventKind.STORE, task.member_("pid"))
    assert (event.before, event.after) == (bytes.fromhex("01000000"), bytes.fromhex("02010000"))


def test_a_variable_holds_numbers_and_addresses_of_views(machine: Machine) -> None:
    variable = machine.variable("klp_transition_patch")
    patch = machine.view("klp_patch", 0xFFFF_8880_0000_2000)
    variable.set(patch)
    assert variable.get() == patch.address_
    signed = GuestVariable(machine.shared, machine.symbol("klp_target_state"), "<i")
    signed.set(-1)
    assert signed.get() == -1
