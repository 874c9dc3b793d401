"""The unwinder against a shadow call stack, frame for frame, at every instruction of real calls."""

from pathlib import Path

import pytest
from machines import FIXTURES as BUILD
from machines import IPMODIFY, REGS, boot, image, registered
from shadow_stack import execute_with_shadow

from elf.image import Image
from emu.fork import new_task
from emu.machine import Machine
from emu.memory import read_u64
from emu.task import Task
from emu.unwind import Unwinder

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
def still() -> Machine:
    """A machine on which nothing changes."""
    return boot()


@pytest.mark.parametrize(("function", "arguments"), CALLS, ids=[name for name, _ in CALLS])
def test_every_frame_is_found_at_every_instruction(
    still: Machine, function: str, arguments: tuple[int, ...]
) -> None:
    unwinder = still.unwinder
    points = 0
    for registers, expected in execute_with_shadow(still, still.symbol(function), *arguments):
        trace = unwinder.walk(registers)
        assert trace.unreliable == ""
        assert list(trace.entries) == expected, still.kallsyms.describe(registers["rip"])
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


def asleep(machine: Machine, function: str, *arguments: int) -> Task:
    """A task that is asleep in a call."""
    task = new_task(machine, "sleeper", machine.cpus[0])
    machine.hub.call(task, machine.symbol(function), arguments)
    while task.running or task.queued:
        machine.hub.advance(task)
    return task


def test_a_stack_of_a_hundred_frames_is_too_deep(machine: Machine) -> None:
    """MAX_STACK_ENTRIES of kernel/livepatch/transition.c; stack_trace_consume_entry() refuses the last."""
    deepest = asleep(machine, "nap_below", 96, 1000)  # msleep, nap, and nap_below 97 times
    too_deep = asleep(machine, "nap_below", 97, 1000)
    trace = machine.unwinder.walk_task(deepest.struct)
    assert (len(trace.entries), trace.unreliable) == (99, "")
    trace = machine.unwinder.walk_task(too_deep.struct)
    assert (len(trace.entries), trace.unreliable) == (100, "more than 100 frames")


def test_a_task_is_not_walked_on_the_stack_of_another(machine: Machine) -> None:
    task, other = asleep(machine, "nap", 1000), asleep(machine, "nap", 1000)
    at = machine.layouts.offsetof("task_struct", "thread.sp")
    for wrong in (machine.space.read(other.struct + at, 8), bytes(8)):
        machine.space.write(task.struct + at, wrong)
        assert "not on the task's stack" in machine.unwinder.walk_task(task.struct).unreliable


@pytest.mark.parametrize("place", ["data", "elsewhere on the stack", "stack", "nowhere", "behind all text"])
def test_a_return_address_that_is_no_text_is_unreliable(machine: Machine, place: str) -> None:
    """unwind_get_return_address(): __kernel_text_address()."""
    task = asleep(machine, "nap_below", 2, 1000)
    first = machine.unwinder.walk_task(task.struct)
    assert [machine.kallsyms.describe(each).split("+")[0] for each in first.entries[1:]] == [
        "nap",
        *["nap_below"] * 3,
    ]
    slot = next(
        at
        for at in range(task.stack_top - 512, task.stack_top, 8)
        if read_u64(machine.space, at) == first.entries[2]
    )
    text = max(group.start + group.size for group in machine.vmlinux.placement.groups[:1])
    wrong = {
        "data": machine.symbol("div_errors"),
        "elsewhere on the stack": slot,
        "stack": task.stack_top,
        "nowhere": 0,
        "behind all text": text,
    }[place]
    machine.space.write(slot, wrong.to_bytes(8, "little"))
    trace = machine.unwinder.walk_task(task.struct)
    assert trace.unreliable.startswith("no unwind information for ")
    assert trace.entries == (*first.entries[:2], wrong)


def test_the_layout_that_counts_is_that_of_the_call_and_not_of_what_follows(machine: Machine) -> None:
    """A call that does not return may be followed by code of another path, with another layout."""
    task = asleep(machine, "nap", 1000)
    behind_push = machine.symbol("both_steps") + 6
    rows = [machine.unwinder.row_at(behind_push - back) for back in (1, 0)]
    assert [row and row.offset for row in rows] == [8, 16]
    (nap,) = machine.unwinder.walk_task(task.struct).entries[1:]
    slot = (task.stack_base & ~15) - 8
    assert read_u64(machine.space, slot) == machine.return_address
    for at, word in ((slot, behind_push), (slot + 8, machine.return_address), (slot + 16, 0)):
        machine.space.write(at, word.to_bytes(8, "little"))
    trace = machine.unwinder.walk_task(task.struct)
    assert trace.entries[1:] == (nap, behind_push)
    assert trace.unreliable == ""


def test_a_call_that_goes_on_in_another_function_is_unreliable_even_if_text_lies_before_that(
    machine: Machine,
) -> None:
    """The byte before tail_inner is the last of overflow_stack, which says nothing about this frame."""
    before = machine.kallsyms.at(machine.symbol("tail_inner") - 1)
    assert before is not None
    assert before.name == "overflow_stack"
    assert machine.unwinder.row_at(machine.symbol("tail_inner") - 1) is not None
    target = machine.symbol("tail_inner")
    registered(machine, ["area_of"], func="redirect", flags=IPMODIFY | REGS, private=target)
    reasons = []
    for registers, expected in execute_with_shadow(machine, machine.symbol("area_of"), 3, 4):
        trace = machine.unwinder.walk(registers)
        if target in expected[1:]:
            reasons.append(trace.unreliable)
        else:
            assert (list(trace.entries), trace.unreliable) == (expected, "")
    assert len(reasons) > 10
    assert all("tail_inner+0x0/0x10 is about to be entered" in reason for reason in reasons)


@pytest.mark.parametrize("damage", [(4, b"\x05"), (8, b"\x09"), (0, b"\xff\xff")])
def test_a_damaged_table_makes_stacks_unreliable_and_breaks_nothing(
    machine: Machine, tmp_path: Path, damage: tuple[int, bytes]
) -> None:
    data = bytearray((BUILD / "fix_steps.o").read_bytes())
    table = next(section for section in image("fix_steps.o").sections if section.name == ".eh_frame")
    at, fill = damage
    data[table.offset + at : table.offset + at + len(fill)] = fill
    path = tmp_path / "damaged.o"
    path.write_bytes(data)
    loaded = machine.modules.load_module(Image.open(path))
    function = machine.kallsyms.address_of("new_nap", loaded.name)
    assert machine.unwinder.row_at(function) is None


def test_the_stack_must_go_up_through_an_interrupt_too(machine: Machine) -> None:
    """unwind_next_frame(): "stack going in the wrong direction?"."""
    machine.sched.full_preemption = True
    task, other = (new_task(machine, name, machine.cpus[0]) for name in ("worker", "other"))
    machine.hub.call(task, machine.symbol("fib"), (9,))
    machine.hub.advance(task, 30)
    machine.hub.call(other, machine.symbol("area_of"), (3, 4))
    machine.hub.advance(other)
    assert task.preempted
    assert machine.unwinder.walk_task(task.struct).unreliable == ""
    regs = read_u64(machine.space, task.struct + machine.layouts.offsetof("task_struct", "thread.sp")) + 56
    at = regs + machine.layouts.offsetof("pt_regs", "sp")
    machine.space.write(at, regs.to_bytes(8, "little"))
    assert "wrong direction" in machine.unwinder.walk_task(task.struct).unreliable
