"""A traced call, explained."""

import pytest

from klpemu import Func, Kernel, Patch
from klpemu.call_trace import call_trace
from klpemu.fixtures import fixture


@pytest.fixture(scope="module")
def patched() -> Kernel:
    """A kernel with fix_area on area_of."""
    kernel = Kernel.load()
    kernel.enable(
        Patch("fix_area", {"vmlinux": [Func("area_of", "fixed_area_of")]}, code=fixture("fix_area.o"))
    )
    return kernel


def test_a_redirected_call_says_what_each_function_is_for(patched: Kernel) -> None:
    trace = call_trace(patched, "area_of", [3, 4])
    assert trace.returned == 12
    assert [(visit.function, visit.role) for visit in trace.visits] == [
        ("area_of", ""),
        ("ftrace_trampoline", "private trampoline of one ftrace_ops"),
        ("klp_ftrace_handler", "takes the func on top of func_stack"),
        ("ftrace_trampoline", "private trampoline of one ftrace_ops"),
        ("fixed_area_of", "replacement, from patch fix_area"),
    ]


def test_the_site_is_marked_and_every_way_out_of_a_function_names_where_it_leads(patched: Kernel) -> None:
    trace = call_trace(patched, "area_of", [3, 4])
    (site,) = trace.visits[0].instructions
    assert site.comment.startswith("fentry site, -> ftrace_trampoline+0x0/")
    lasts = [visit.instructions[-1].comment for visit in trace.visits]
    firsts = [visit.instructions[0].place for visit in trace.visits]
    assert [comment.rpartition("-> ")[2] for comment in lasts] == [*firsts[1:], ""]
    comments = [each.comment for each in trace.instructions if each.comment]
    assert len(comments) == len(trace.visits) - 1


def test_a_function_that_calls_itself_is_passed_again(patched: Kernel) -> None:
    trace = call_trace(patched, "fib", [2])
    assert trace.returned == 1
    starts = [visit.instructions[0].place.partition("/")[0] for visit in trace.visits]
    assert starts[:2] == ["fib+0x0", "fib+0x0"]
    assert starts.count("fib+0x0") == 3


def test_the_trace_is_what_was_executed(patched: Kernel) -> None:
    executed = [instruction.address for _, instruction in patched.trace("area_of", 3, 4).instructions]
    trace = call_trace(patched, "area_of", [3, 4])
    assert [each.instruction.address for each in trace.instructions] == executed


def test_att_syntax_is_for_every_instruction(patched: Kernel) -> None:
    trace = call_trace(patched, "fib", [1], att=True)
    assert any("%rdi" in str(each.instruction) for each in trace.instructions)
