"""klp_ftrace_handler: the way it takes through func_stack, its WARNs, and a stack that can be walked at any
time.
"""

from collections.abc import Callable

import pytest
from livepatches import Raw, fix_area

from emu.assembly import Instruction
from emu.stream import Stream, execute_stream, undone
from klpemu import Kernel
from patches.handler import KLP_UNDEFINED

EMPTY = "klp_ftrace_handler found an empty func_stack"
UNDEFINED = "a func is in transition, but the task's patch_state is KLP_UNDEFINED"
RECURSION = "no recursion bit left in klp_ftrace_handler, the call is not redirected"
ALL_RECURSION_BITS = 0b11 << 3  # the normal and the transition bit of TRACE_FTRACE_START


def warnings_of(kernel: Kernel) -> list[str]:
    return [warning.split(": ", 1)[1] for warning in kernel.machine.warnings]


def empty_the_stack(kernel: Kernel, raw: Raw) -> None:
    head = raw.member("klp_ops", raw.klp_ops(kernel.address_of("area_of")), "func_stack")
    raw.put(head, head)


def use_up_recursion(kernel: Kernel, raw: Raw) -> None:
    raw.put(raw.member("task_struct", raw.current(kernel), "trace_recursion"), ALL_RECURSION_BITS)


def transition_without_a_state(kernel: Kernel, raw: Raw) -> None:
    top = raw.funcs(raw.klp_ops(kernel.address_of("area_of")))[0]
    raw.put(raw.member("klp_func", top, "transition"), 1, 1)
    raw.put(raw.member("task_struct", raw.current(kernel), "patch_state"), KLP_UNDEFINED, 4)


@pytest.mark.parametrize(
    ("damage", "warning", "result"),
    [
        (empty_the_stack, EMPTY, 7),
        (use_up_recursion, RECURSION, 7),
        (transition_without_a_state, UNDEFINED, 120000),  # the kernel goes on with the newest func
    ],
    ids=["an empty func_stack", "used-up recursion bits", "KLP_UNDEFINED in transition"],
)
def test_what_must_not_be_is_a_warning_and_the_call_goes_on(
    damage: Callable[[Kernel, Raw], None], warning: str, result: int, stacked: Kernel, raw: Raw
) -> None:
    damage(stacked, raw)
    lines = len(stacked.log)
    assert stacked.call("area_of", 3, 4) == result
    assert warnings_of(stacked) == [warning]
    assert len(stacked.log) == lines + 1
    assert stacked.log[-1].startswith("WARNING: CPU: 0 PID: 1 at klp_ftrace_handler+0x")
    assert stacked.call("area_of", 3, 4) == result
    assert len(stacked.log) == lines + 1, "WARN_ON_ONCE"


def test_nothing_warns_on_the_way_of_a_good_call(stacked: Kernel) -> None:
    stacked.call("measure", 3, 4)
    assert stacked.machine.warnings == []


def test_a_used_normal_bit_is_retried_with_the_transition_bit(stacked: Kernel, raw: Raw) -> None:
    recursion = raw.member("task_struct", raw.current(stacked), "trace_recursion")
    raw.put(recursion, 1 << 3)
    assert stacked.call("area_of", 3, 4) == 120000
    assert raw.u64(recursion) == 1 << 3, "only its own bit is given back"
    assert stacked.machine.warnings == []


@pytest.mark.parametrize("damage", [None, empty_the_stack, transition_without_a_state])
def test_the_handler_gives_back_its_recursion_bit_and_preempt_count(
    damage: Callable[[Kernel, Raw], None] | None, stacked: Kernel, raw: Raw
) -> None:
    if damage is not None:
        damage(stacked, raw)
    gs = stacked.machine.cpus[0].gs_base
    before = raw.space.read(gs + raw.symbol("__preempt_count"), 4)
    stacked.call("area_of", 3, 4)
    assert raw.u64(raw.member("task_struct", raw.current(stacked), "trace_recursion")) == 0
    assert raw.space.read(gs + raw.symbol("__preempt_count"), 4) == before


def run_to(kernel: Kernel, address: int) -> Stream:
    """Execute a call of area_of up to an instruction; what it wrote stays until `undone` ends."""
    stream = execute_stream(kernel.machine, kernel.address_of("area_of"), address)
    assert stream.reached
    return stream


def handler_instructions(kernel: Kernel) -> list[Instruction]:
    trace = kernel.trace("area_of", 3, 4)
    return [each for place, each in trace.instructions if place.startswith("klp_ftrace_handler")]


def test_preemption_is_off_while_the_handler_looks_at_the_func_stack(stacked: Kernel, raw: Raw) -> None:
    (first,) = (each for each in handler_instructions(stacked) if str(each) == "mov r11, qword ptr [r10]")
    count = stacked.machine.cpus[0].gs_base + raw.symbol("__preempt_count")
    with undone(stacked.machine):
        run_to(stacked, first.address)
        assert raw.u64(count) & 0x7FFF_FFFF == 1


def test_the_return_address_is_found_through_rbp_at_each_instruction_of_the_handler(
    stacked: Kernel, raw: Raw
) -> None:
    """Behind the prologue rbp points at the caller's rbp, and the return address is above it."""
    back = raw.trampoline(raw.klp_ops(stacked.address_of("area_of"))) + 0x7E + 5
    inside = handler_instructions(stacked)
    assert [str(each) for each in inside[:2]] == ["push rbp", "mov rbp, rsp"]
    assert [str(each) for each in inside[-2:]] == ["pop rbp", "ret"]
    for number, instruction in enumerate(inside):
        with undone(stacked.machine):
            stream = run_to(stacked, instruction.address)
            if 2 <= number < len(inside) - 1:
                rbp = stream.after["rbp"]
                assert raw.u64(rbp) == stream.before["rbp"], "the frame of whoever called the function"
                assert raw.u64(rbp + 8) == back, str(instruction)
            else:
                pushed = 8 if number == 1 else 0
                assert raw.u64(stream.after["rsp"] + pushed) == back


@pytest.mark.parametrize("depth", [2, 3, 10])
def test_a_call_costs_the_same_however_many_versions_there_are(depth: int, kernel: Kernel, raw: Raw) -> None:
    kernel.enable(fix_area())
    one = len(kernel.trace("area_of", 3, 4).instructions)
    for number in range(1, depth):
        kernel.enable(fix_area(name=f"version_{number}"))
    assert len(raw.funcs(raw.klp_ops(kernel.address_of("area_of")))) == depth
    assert len(kernel.trace("area_of", 3, 4).instructions) == one
