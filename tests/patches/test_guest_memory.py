"""Guest memory is the truth: after a raw store, and nothing else, the next guest call does what memory now
says.

Nothing of klpemu's own is called between the store and the call.
"""

import pytest
from livepatches import Raw, fix_area

from emu.ftrace import FtraceOpsFl
from klpemu import Kernel
from patches.handler import KLP_PATCHED, KLP_UNPATCHED


def swap_neighbours(raw: Raw, head: int) -> None:
    """Swap the only two nodes of a list by storing six pointers."""
    first, second = raw.u64(head), raw.u64(raw.u64(head))
    for at, following, before in ((head, second, first), (second, first, head), (first, head, second)):
        raw.put(at, following)
        raw.put(at + 8, before)


def test_swapping_two_stack_nodes_swaps_the_versions(stacked: Kernel, raw: Raw) -> None:
    head = raw.member("klp_ops", raw.klp_ops(stacked.address_of("area_of")), "func_stack")
    assert stacked.call("area_of", 3, 4) == 120000
    swap_neighbours(raw, head)
    assert stacked.call("area_of", 3, 4) == 12
    assert stacked.call("perimeter_of", 3, 4) == 1400, "the other function's func_stack was not touched"
    swap_neighbours(raw, head)
    assert stacked.call("area_of", 3, 4) == 120000
    assert stacked.verify().holds


def test_setting_nop_makes_the_original_run(stacked: Kernel, raw: Raw) -> None:
    top = raw.funcs(raw.klp_ops(stacked.address_of("area_of")))[0]
    raw.put(raw.member("klp_func", top, "nop"), 1, 1)
    assert stacked.call("area_of", 3, 4) == 7
    assert stacked.call("measure", 3, 4) == 7 * 1000 + 1400, "calls made by guest code, too"
    raw.put(raw.member("klp_func", top, "nop"), 0, 1)
    assert stacked.call("area_of", 3, 4) == 120000
    assert stacked.verify().holds


@pytest.mark.parametrize(
    ("patch_state", "result"),
    [(KLP_UNPATCHED, 12), (KLP_PATCHED, 120000)],
    ids=["an unpatched task runs the version below", "a patched task runs the newest"],
)
def test_in_transition_the_task_decides(stacked: Kernel, raw: Raw, patch_state: int, result: int) -> None:
    top = raw.funcs(raw.klp_ops(stacked.address_of("area_of")))[0]
    state = raw.member("task_struct", raw.current(stacked), "patch_state")
    raw.put(raw.member("klp_func", top, "transition"), 1, 1)
    raw.put(state, patch_state, 4)
    assert stacked.call("area_of", 3, 4) == result
    assert stacked.call("perimeter_of", 3, 4) == 1400, (
        "a func that is not in transition does not ask the task"
    )
    raw.put(raw.member("klp_func", top, "transition"), 0, 1)
    raw.put(state, -1, 4)
    assert stacked.call("area_of", 3, 4) == 120000
    assert stacked.verify().holds


def test_an_unpatched_task_runs_the_original_if_there_is_no_version_below(kernel: Kernel, raw: Raw) -> None:
    kernel.enable(fix_area())
    only = raw.funcs(raw.klp_ops(kernel.address_of("area_of")))[0]
    raw.put(raw.member("klp_func", only, "transition"), 1, 1)
    raw.put(raw.member("task_struct", raw.current(kernel), "patch_state"), KLP_UNPATCHED, 4)
    assert kernel.call("area_of", 3, 4) == 7


def test_the_patch_state_that_counts_is_that_of_the_current_task(stacked: Kernel, raw: Raw) -> None:
    top = raw.funcs(raw.klp_ops(stacked.address_of("area_of")))[0]
    raw.put(raw.member("klp_func", top, "transition"), 1, 1)
    raw.put(raw.member("task_struct", raw.current(stacked), "patch_state"), KLP_PATCHED, 4)
    raw.put(raw.member("task_struct", raw.symbol("init_task"), "patch_state"), KLP_UNPATCHED, 4)
    assert stacked.call("area_of", 3, 4) == 120000
    raw.put(stacked.machine.cpus[0].gs_base + raw.symbol("current_task"), raw.symbol("init_task"))
    assert stacked.call("area_of", 3, 4) == 12, "as soon as another task is current"


def test_changing_new_func_changes_where_the_call_ends(stacked: Kernel, raw: Raw) -> None:
    top = raw.funcs(raw.klp_ops(stacked.address_of("area_of")))[0]
    at = raw.member("klp_func", top, "new_func")
    before = raw.put(at, stacked.address_of("fix_area:fixed_perimeter_of"))
    assert stacked.call("area_of", 3, 4) == 14
    raw.space.write(at, before)
    assert stacked.call("area_of", 3, 4) == 120000
    assert stacked.verify().holds


def register_counter(kernel: Kernel, raw: Raw, function: str) -> tuple[int, int]:
    """Trace a function with an ops of our own; returns the address of its ops and of what it counts."""
    machine = kernel.machine
    size = machine.layouts.sizeof("ftrace_ops")
    ops = machine.view("ftrace_ops", machine.slab.kzalloc(size, "ftrace_ops of a test"))
    ops.func = machine.symbol("trace_count")
    ops.flags = FtraceOpsFl.DYNAMIC
    ops.private = machine.slab.kzalloc(8, "counter of a test")
    location = machine.ftrace.ftrace_location(kernel.address_of(function))

    def register() -> None:
        machine.ftrace.ftrace_set_filter_ip(ops, location, remove=False)
        machine.ftrace.register_ftrace_function(ops)

    machine.service("register", register)
    return ops.address_, ops.private


def hash_entry(raw: Raw, ops: int) -> int:
    """The only entry in the filter hash of an ops."""
    hashes = raw.view("ftrace_ops_hash", raw.view("ftrace_ops", ops).func_hash)
    return raw.u64(raw.view("ftrace_hash", hashes.filter_hash).buckets)


def test_changing_a_hash_entry_changes_whom_the_list_function_calls(stacked: Kernel, raw: Raw) -> None:
    tracer, counter = register_counter(stacked, raw, "area_of")
    klp = raw.member("klp_ops", raw.klp_ops(stacked.address_of("area_of")), "fops")
    assert stacked.call("area_of", 3, 4) == 120000
    assert raw.u64(counter) == 1
    other, _ = stacked.site_of("perimeter_of")

    at = raw.member("ftrace_func_entry", hash_entry(raw, tracer), "ip")
    before = raw.put(at, other)
    assert stacked.call("area_of", 3, 4) == 120000
    assert raw.u64(counter) == 1, "the tracer no longer wants area_of"
    raw.space.write(at, before)
    stacked.call("area_of", 3, 4)
    assert raw.u64(counter) == 2

    at = raw.member("ftrace_func_entry", hash_entry(raw, klp), "ip")
    before = raw.put(at, other)
    assert stacked.call("area_of", 3, 4) == 7, "livepatch no longer wants area_of: the original runs"
    assert raw.u64(counter) == 3
    raw.space.write(at, before)
    assert stacked.call("area_of", 3, 4) == 120000
    assert stacked.verify().holds


def test_unlinking_an_ops_from_ftrace_ops_list_takes_it_out_of_the_call(stacked: Kernel, raw: Raw) -> None:
    tracer, counter = register_counter(stacked, raw, "area_of")
    head = raw.symbol("ftrace_ops_list")
    assert raw.u64(head) == tracer, "the newest ops is first"
    before = raw.put(head, raw.view("ftrace_ops", tracer).next)
    assert stacked.call("area_of", 3, 4) == 120000
    assert raw.u64(counter) == 0
    raw.space.write(head, before)
    assert stacked.call("area_of", 3, 4) == 120000
    assert raw.u64(counter) == 1


def test_writing_the_nop_into_a_site_makes_the_original_run(stacked: Kernel, raw: Raw) -> None:
    site, call = stacked.site_of("area_of")
    raw.space.write(site, bytes.fromhex("0f1f440000"))
    assert stacked.call("area_of", 3, 4) == 7
    raw.space.write(site, call)
    assert stacked.call("area_of", 3, 4) == 120000
