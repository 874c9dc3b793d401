"""The unwinder against a shadow call stack at random preemption points, frame for frame.

A task executes one instruction at a time and is really preempted: another one gets the vCPU, and the stack is
walked from thread.sp.  Where no interrupt could take the vCPU (in the handler, in the exception of an int3)
the walk begins at the registers.  The stack must be found as it is, everywhere but where the return address
of a trampoline's frame has been replaced: there the kernel gives up, too, and so must we.
"""

from collections.abc import Callable
from typing import Any

import pytest
from preemption import Preemption, UnwinderPoints
from shadow_stack import ShadowedTask

from emu.ftrace_ops import FtraceOpsFl
from emu.machine import Machine
from emu.schedules import Explicit
from emu.text_poke import INT3
from klpemu import Func, Kernel, Patch

PLAIN: list[tuple[str, tuple[int | str, ...]]] = [
    ("fib", (7,)),
    ("ack", (2, 2)),
    ("measure", (3, 4)),
    ("many_calls", (4,)),
    ("call_many", ("area_of", 3, 3, 4)),
    ("sum_many", (1, 2, 3, 4, 5, 6, 7, 8, 9)),
    ("sum_var", (7, 1, 2, 3, 4, 5, 6, 7)),
    ("make_box", ("div_errors", 1, 2)),
    ("make_pair", (1, 2)),
    ("call_pointer", ("tail_inner", 5)),
    ("tail_outer", (5,)),
    ("checked_div", (9, 2)),
    ("checked_div", (9, 0)),
    ("mix", (2,)),
    ("call_same_one", (1,)),
    ("call_twin", (1,)),
    ("work", (3,)),
]
FIXED = ("sum_many", "sum_var", "make_box", "make_pair", "mix", "fib", "tail_outer", "tail_inner")


@pytest.fixture
def kernel() -> Kernel:
    return Kernel.load(cpus=2)


def enabled(kernel: Kernel, code: str, replacements: dict[str, str], objname: str = "vmlinux") -> None:
    """Patch functions, and let the transition end."""
    funcs = [Func(old, new) for old, new in replacements.items()]
    kernel.enable(Patch(code, {objname: funcs}, code=f"builtin:{code}.o"))
    kernel.tasks.wait_for_transition()


def call_at_random(preemption: Preemption, calls: list[tuple[str, tuple[int | str, ...]]]) -> None:
    function, arguments = preemption.random.choice(calls)
    symbol = preemption.machine.symbol
    preemption.call(function, *(symbol(each) if isinstance(each, str) else each for each in arguments))


def test_functions_that_nobody_patches(kernel: Kernel, points: UnwinderPoints) -> None:
    preemption = Preemption(kernel.machine, points, "plain")
    while preemption.total < 2500:
        call_at_random(preemption, PLAIN)
    assert preemption.counts["fixtures"] > 2300


def test_functions_that_are_patched(kernel: Kernel, points: UnwinderPoints) -> None:
    enabled(kernel, "fix_all", {name: f"fixed_{name}" for name in (*FIXED, "call_pointer", "checked_div")})
    enabled(kernel, "fix_area", {name: f"fixed_{name}" for name in ("area_of", "perimeter_of")})
    preemption = Preemption(kernel.machine, points, "patched")
    while preemption.total < 2500:
        call_at_random(preemption, PLAIN)
    for kind in ("fixtures", "replacements", "trampolines", "handlers"):
        assert preemption.counts[kind] > 100, kind


@pytest.mark.parametrize("flags", [0, int(FtraceOpsFl.SAVE_REGS)], ids=["caller", "regs caller"])
def test_two_ops_on_one_site_and_the_list_function(
    kernel: Kernel, points: UnwinderPoints, flags: int
) -> None:
    machine = kernel.machine
    trace(machine, "area_of", "fib", flags=flags)
    trace(machine, "fib", flags=flags)
    enabled(kernel, "fix_area", {"area_of": "fixed_area_of"})
    preemption = Preemption(machine, points, f"list function {flags}")
    while preemption.total < 1000:
        call_at_random(preemption, [("many_calls", (3,)), ("fib", (4,))])
    for kind in ("list function", "trampolines", "handlers"):
        assert preemption.counts[kind] > 30, kind


def trace(machine: Machine, *functions: str, flags: int = 0) -> Any:
    """A tracing ops on these functions, registered."""
    ops = machine.view("ftrace_ops", machine.slab.kzalloc(machine.layouts.sizeof("ftrace_ops"), "ftrace_ops"))
    ops.func = machine.symbol("trace_count")
    ops.flags = flags
    ops.private = machine.slab.kzalloc(8, "counter")
    for name in functions:
        machine.ftrace.ftrace_set_filter_ip(ops, machine.symbol(name), remove=False)
    machine.ftrace.register_ftrace_function(ops)
    return ops


def test_sites_that_another_vcpu_is_in_the_middle_of_poking(kernel: Kernel, points: UnwinderPoints) -> None:
    """The task executes int3s; the poke goes on only between its instructions.

    A trampoline whose ops has left ftrace_ops_list is code that nobody knows any more
    (ftrace_ops_trampoline()).
    """
    machine = kernel.machine
    ops = trace(machine, "area_of")
    site = machine.ftrace.ftrace_location(machine.symbol("area_of"))
    poker = machine.init_task
    assert poker.cpu is not machine.cpus[-1]

    def toggle() -> None:
        while True:
            machine.ftrace.unregister_ftrace_function(ops)
            machine.ftrace.register_ftrace_function(ops)

    def poke() -> None:
        """On to some later door; what holds an int3 stays so for a while."""
        random = preemption.random
        if machine.space.read(site, 1)[0] == INT3 and random.random() < 0.9:
            return
        for _ in range(random.randint(0, 8)):
            if poker in machine.sched.candidates():
                machine.hub.advance(poker)

    def unreliable(shadow: ShadowedTask) -> bool:
        listed = ops.address_ in [each.address_ for each in machine.ftrace.each_ops()]
        trampoline = range(ops.trampoline, ops.trampoline + ops.trampoline_size)
        return shadow.redirected or (not listed and any(each in trampoline for each in shadow.frames))

    machine.hub.schedule = Explicit([])
    machine.hub.serve(poker, "toggle", toggle)
    preemption = Preemption(machine, points, "poke", meanwhile=poke, unreliable=unreliable)
    while preemption.total < 1500:
        call_at_random(preemption, [("many_calls", (6,)), ("call_many", ("area_of", 6, 3, 4))])
    machine.hub.abandon(poker)
    for kind in ("breakpoints", "trampolines", "handlers"):
        assert preemption.counts[kind] > 10, kind


def test_callbacks_of_a_service_that_guest_code_has_called(kernel: Kernel, points: UnwinderPoints) -> None:
    """Guest code calls an export, whose service calls guest code, which may sleep in an export."""
    enabled(kernel, "fix_area", {"area_of": "fixed_area_of"})
    machine = kernel.machine
    callbacks = [("measure", (3, 4)), ("tail_outer", (5,)), ("sum_many", range(9)), ("nap", (4,))]

    def call_back(machine: Machine, registers: dict[str, int]) -> int:
        function, arguments = preemption.random.choice(callbacks)
        return machine.hub.call_guest(machine.symbol(function), *arguments)

    machine.traps.exports["msleep_interruptible"] = call_back
    preemption = Preemption(machine, points, "callbacks")
    while preemption.total < 700:
        preemption.call("nap_interruptible", 1)
    for kind in ("callbacks", "trampolines", "asleep", "exports"):
        assert preemption.counts[kind] > 10, kind


def deliveries(kernel: Kernel) -> Callable[[], None]:
    """Another task on the first vCPU that ends whatever the watched one waits for."""
    machine = kernel.machine
    other = machine.init_task

    def wake() -> None:
        for function in ("deliver", "raise_flag"):
            call = machine.hub.call(other, machine.symbol(function), (1,))
            while not call.finished:
                machine.hub.advance(other)

    return wake


def test_tasks_asleep_and_on_their_way_to_sleep(kernel: Kernel, points: UnwinderPoints) -> None:
    """Whatever has put them to sleep, at whatever depth, and below redirected calls."""
    enabled(kernel, "fix_steps", {name: f"new_{name}" for name in ("step_one", "step_two", "nap")})
    preemption = Preemption(kernel.machine, points, "asleep", wake=deliveries(kernel))
    random = preemption.random
    while preemption.counts["asleep"] < 200:
        preemption.call("raise_flag", 0)
        call_at_random(
            preemption,
            [
                ("nap_below", (random.randint(0, 20), random.randint(1, 50))),
                ("transact", (5,)),
                ("nap_with_mutex", (5,)),
                ("await_delivery", ()),
                ("await_flag", ()),
                ("nap_interruptible", (3,)),
            ],
        )


def test_code_that_has_nothing_but_frame_pointers(kernel: Kernel, points: UnwinderPoints) -> None:
    """Its frames are found where they wait in a call.  The kernel's rule with CONFIG_FRAME_POINTER holds for
    what was interrupted in it; bare_nap has no frame pointer; and at its site a function has none yet.
    """
    kernel.load_module("builtin:frames.o")
    enabled(kernel, "fix_steps", {"framed_nap": "new_nap"}, "frames")
    machine = kernel.machine
    bare = range(kernel.address_of("bare_nap"), kernel.address_of("framed_above_bare"))
    sites = [site + 5 for site in machine.modules.objects["frames"].sites]

    def unreliable(shadow: ShadowedTask) -> bool:
        interrupted = machine.kallsyms.module_of(shadow.next_instruction or 0) == "frames"
        bad = any(each in bare or each in sites for each in shadow.returns)
        return shadow.redirected or interrupted or bad

    preemption = Preemption(machine, points, "frames", unreliable=unreliable, modules="frame pointers")
    random = preemption.random
    while preemption.total < 1500:
        function, arguments = random.choice(
            [
                ("framed_nap_below", (random.randint(0, 9), 4)),
                ("framed_tail", (4,)),
                ("framed_array", (random.randint(1, 8), 4)),
                ("framed_checked", (random.choice([4, 104]),)),
                ("framed_fib", (4,)),
                ("framed_above_bare", (4,)),
            ]
        )
        entry = kernel.address_of(function)
        if random.random() < 0.5:
            preemption.call("call_many", entry, 2, *arguments, *([0] * (2 - len(arguments))))
        else:
            preemption.call(entry, *arguments)
    for kind in ("asleep", "frame pointers", "trampolines", "exports"):
        assert preemption.counts[kind] > 50, kind
