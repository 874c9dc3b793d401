"""Where a frame pointer can be trusted, read from the code alone.

tools/objtool/check.c, validate_branch() and has_valid_stack_frame(), is what a kernel relies on;
arch/x86/kernel/unwind_frame.c is what it does with it.
"""

import re

import pytest
from machines import FIXTURES, image

from elf.unwind_row import FrameBase, UnwindRow
from emu.assembly import assemble, disassemble
from emu.frame_pointer import frame_pointer_rows
from klpemu import Kernel

START = 0x1000
FRAME = UnwindRow(FrameBase.BP, 16, -16, calls_only=True)


def framed(source: str, *functions: int) -> list[str]:
    """The instructions before which rbp points at a frame; `functions` are offsets, 0 if none is given."""
    code = assemble(source)
    rows = frame_pointer_rows({START: code}, [START + offset for offset in functions or (0,)])
    found = [(str(each), rows.row_at(each.address)) for each in disassemble(code, START)]
    assert all(row in (None, FRAME) for _, row in found)
    assert rows.row_at(START - 1) is None
    assert rows.row_at(START + len(code)) is None
    return [text for text, row in found if row is not None]


def test_a_frame_is_there_behind_its_prologue_and_up_to_its_epilogue() -> None:
    source = "nop\n push rbp\n xor eax, eax\n mov rbp, rsp\n push rbx\n inc rax\n pop rbx\n pop rbp\n ret"
    assert framed(source) == ["push rbx", "inc rax", "pop rbx", "pop rbp"]


def test_leave_undoes_a_frame_of_any_size() -> None:
    source = "push rbp\n mov rbp, rsp\n sub rsp, rdi\n nop\n leave\n inc rax\n ret"
    assert framed(source) == ["sub rsp, rdi", "nop", "leave"]


def test_the_stack_pointer_is_found_again_by_the_frame_pointer() -> None:
    source = (
        "push rbp\n mov rbp, rsp\n push rbx\n sub rsp, rdi\n lea rsp, [rbp - 8]\n pop rbx\n pop rbp\n ret"
    )
    assert framed(source) == ["push rbx", "sub rsp, rdi", "lea rsp, [rbp - 8]", "pop rbx", "pop rbp"]


def test_a_path_without_a_frame_beside_one_with_it() -> None:
    source = (
        "test rdi, rdi\n je bare\n push rbp\n mov rbp, rsp\n inc rax\n pop rbp\n ret\n bare:\n inc rdx\n ret"
    )
    assert framed(source) == ["inc rax", "pop rbp"]


@pytest.mark.parametrize(
    "source",
    [
        "mov rbp, rsp\n inc rax\n ret",
        "push rbx\n push rbp\n mov rbp, rsp\n inc rax\n ret",
        "sub rsp, 8\n push rbp\n mov rbp, rsp\n inc rax\n ret",
        "lea r10, [rsp + 8]\n and rsp, -32\n push rbp\n mov rbp, rsp\n inc rax\n ret",
        "push rbp\n push rbx\n mov rbp, rsp\n inc rax\n ret",
        "push rbx\n push rbp\n pop rcx\n mov rbp, rsp\n inc rax\n ret",
        "push rbp\n lea rbp, [rsp + 8]\n inc rax\n ret",
        "push rbp\n mov ebp, esp\n inc rax\n ret",
        "push rbp\n mov rbp, rdi\n mov rbp, rsp\n inc rax\n ret",
    ],
)
def test_anything_but_the_prologue_is_not_sure(source: str) -> None:
    assert framed(source) == []


@pytest.mark.parametrize(
    "change",
    [
        "mov rbp, rdi",
        "mov ebp, edi",
        "mov bpl, 1",
        "pop rbp",
        "xchg rax, rbp",
        "cmpxchg rax, rbp",
        "cmove rbp, rax",
        "lea rbp, [rbp + 8]",
        "add rbp, 8",
        "enter 8, 0",
        "add rsp, 16",
    ],
)
def test_a_frame_is_lost_when_its_pointer_changes(change: str) -> None:
    source = f"push rbp\n mov rbp, rsp\n push rbx\n {change}\n inc rax\n leave\n ret"
    assert framed(source) == ["push rbx", str(next(disassemble(assemble(change), 0)))]


@pytest.mark.parametrize(
    "harmless",
    ["mov rax, rbp", "cmp rbp, rax", "mov [rbp - 8], rax", "push rbp", "xchg rax, [rbp - 8]", "call rax"],
)
def test_reading_the_frame_pointer_does_no_harm(harmless: str) -> None:
    assert "inc rax" in framed(f"push rbp\n mov rbp, rsp\n sub rsp, 16\n {harmless}\n inc rax\n leave\n ret")


def test_paths_that_disagree_are_not_sure_from_where_they_meet() -> None:
    source = "push rbp\n test rdi, rdi\n je meet\n mov rbp, rsp\n inc rax\n meet:\n inc rdx\n pop rbp\n ret"
    assert framed(source) == ["inc rax"]


def test_a_loop_that_ends_without_its_frame_has_none_from_the_start() -> None:
    source = "push rbp\n mov rbp, rsp\n again:\n inc rax\n mov rbp, rdi\n dec rdx\n jne again\n ret"
    assert framed(source) == []


def test_code_that_is_jumped_to_with_a_frame_has_it() -> None:
    """A function's cold part; it is no function."""
    source = "push rbp\n mov rbp, rsp\n je cold\n leave\n ret\n cold:\n inc rax\n leave\n ret"
    assert framed(source) == ["je 0x1008", "leave", "inc rax", "leave"]


def test_a_tail_call_leaves_the_other_function_as_it_is() -> None:
    callee = "push rbp\n mov rbp, rsp\n inc rax\n leave\n ret"
    caller = "push rbp\n mov rbp, rsp\n leave\n jmp callee"
    source = f"callee:\n {callee}\n caller:\n {caller}"
    assert framed(source, 0, len(assemble(callee))) == ["inc rax", "leave", "leave"]


def test_a_function_that_is_jumped_to_with_a_frame_is_not_sure() -> None:
    callee = "push rbp\n mov rbp, rsp\n inc rax\n leave\n ret"
    caller = "push rbp\n mov rbp, rsp\n jmp callee"
    source = f"callee:\n {callee}\n caller:\n {caller}"
    assert framed(source, 0, len(assemble(callee))) == ["jmp 0x1000"]


def test_what_follows_a_call_that_does_not_return_is_another_function() -> None:
    first = "push rbp\n mov rbp, rsp\n call rax"
    source = f"{first}\n push rbp\n mov rbp, rsp\n inc rax\n leave\n ret"
    assert framed(source, 0, len(assemble(first))) == ["call rax", "inc rax", "leave"]


def test_bytes_that_are_no_code_end_a_path() -> None:
    code = assemble("push rbp\n mov rbp, rsp\n inc rax") + b"\x06"
    rows = frame_pointer_rows({START: code}, [START])
    assert rows.row_at(START + 4) == FRAME
    assert frame_pointer_rows({}, [START]).row_at(START) is None


def asleep(kernel: Kernel, function: str, *arguments: int) -> tuple[list[str], str]:
    """The functions on the stack of a task that sleeps in a call of a function, and why no more."""
    machine = kernel.machine
    call = f"{function}({', '.join(map(str, arguments))})"
    task = kernel.tasks.spawn("sleeper", [call])
    kernel.tasks.run(20)
    trace = machine.unwinder.walk_task(task.struct)
    return [machine.kallsyms.describe(each).split("+")[0] for each in trace.entries], trace.unreliable


@pytest.fixture
def frames() -> Kernel:
    """The built-in kernel, and a module without unwind tables."""
    kernel = Kernel.load()
    kernel.load_module(FIXTURES / "frames.o")
    return kernel


def test_the_fixture_has_no_table() -> None:
    names = {section.name for section in image("frames.o").sections if section.is_alloc}
    assert not {".eh_frame", ".orc_unwind", ".orc_unwind_ip"} & names


@pytest.mark.parametrize(
    ("function", "arguments", "stack"),
    [
        ("framed_nap", (1000,), ["framed_nap"]),
        ("framed_nap_below", (2, 1000), ["framed_nap", *["framed_nap_below"] * 3]),
        ("framed_tail", (1000,), ["framed_nap"]),
        ("framed_array", (5, 1000), ["framed_array"]),
        ("framed_checked", (1000,), ["framed_checked"]),
        ("framed_checked", (60,), ["framed_checked.cold"]),
    ],
)
def test_a_task_asleep_in_code_with_frame_pointers_only(
    frames: Kernel, function: str, arguments: tuple[int, ...], stack: list[str]
) -> None:
    assert asleep(frames, function, *arguments) == (["msleep", *stack], "")


def test_a_function_without_a_frame_among_them_makes_the_stack_unreliable(frames: Kernel) -> None:
    stack, unreliable = asleep(frames, "framed_above_bare", 1000)
    assert stack == ["msleep", "bare_nap"]
    assert unreliable.startswith("no unwind information for bare_nap+")


def test_an_interrupted_function_with_a_frame_pointer_is_unreliable_wherever_it_is(frames: Kernel) -> None:
    """arch_stack_walk_reliable() with CONFIG_FRAME_POINTER: registers of kernel mode are on the stack."""
    machine = frames.machine
    machine.sched.full_preemption = True
    task = frames.tasks.spawn("worker", ["framed_fib(12)"])
    other = frames.tasks.spawn("other", ["area_of(3, 4)"], repeat=None)
    machine.hub.advance(task)
    reasons = set()
    for instructions in (3, 20, *[1] * 60):
        machine.hub.advance(task, instructions)
        machine.hub.advance(other)
        assert task.preempted
        trace = machine.unwinder.walk_task(task.struct)
        assert len(trace.entries) == 2
        reasons.add(re.sub(r"framed_fib\+\S+ \[frames\]", "...", trace.unreliable))
    assert reasons == {
        "interrupted in ..., which has nothing but a frame pointer",
        "no unwind information for ...",
    }


def test_a_frame_pointer_into_nowhere_is_unreliable(frames: Kernel) -> None:
    machine = frames.machine
    task = frames.tasks.spawn("sleeper", ["framed_nap_below(2, 1000)"])
    frames.tasks.run(20)
    assert machine.unwinder.walk_task(task.struct).unreliable == ""
    sp = machine.layouts.view("task_struct", machine.space, task.struct).thread.sp
    bp = machine.layouts.view("inactive_task_frame", machine.space, sp).bp
    # What would be the outermost frame if it was on the stack, and which lies above it.
    elsewhere = machine.symbol("flag_queue")
    machine.space.write(elsewhere + 8, machine.return_address.to_bytes(8, "little"))
    for wrong in (0, bp, bp - 64, elsewhere, task.stack_top):
        machine.space.write(bp, wrong.to_bytes(8, "little"))
        trace = machine.unwinder.walk_task(task.struct)
        assert trace.unreliable, hex(wrong)
        assert len(trace.entries) <= 3
