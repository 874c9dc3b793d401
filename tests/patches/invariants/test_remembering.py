"""With and without remembering the same is found: along random sequences, and whatever is damaged."""

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from livepatches import fix_area, fix_area2

from emu.restore_point import RestorePoint
from klpemu import Kernel
from klpemu.fuzz.grammar import Grammar
from klpemu.fuzz.sequence_runner import SequenceRunner
from klpemu.fuzz.world import world_of
from patches.invariants.finding import Report
from patches.invariants.subject import Subject
from patches.invariants.verify import verify
from patches.variants import variants

BUGS = (
    "",
    "museum:nops-for-ever",
    "museum:stack-before-transition",
    "museum:return-not-rebased",
    "museum:plain-store",
)


@pytest.fixture(scope="module")
def patched() -> Kernel:
    kernel = Kernel.load()
    kernel.enable(fix_area())
    kernel.enable(fix_area2())
    return kernel


def same(kernel: Kernel, subject: Subject | None = None, step: str = "") -> Report:
    """What is found with remembering, which must be what is found without."""
    state = subject or kernel.subject()
    remembered = verify(state, step, kernel.remembered)
    full = verify(replace(state), step)
    assert remembered.findings == full.findings
    assert remembered.checks == full.checks
    return full


@pytest.mark.parametrize("bug", BUGS)
def test_along_random_sequences(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_of(None, None, None, "qemu64", (), (), (bug,) if bug else ())
    checked = 0

    def compared(kernel: Kernel, step: str = "", subject: Subject | None = None) -> Report:
        nonlocal checked
        checked += 1
        return Report.merged([same(kernel, subject, step), kernel.witnessed(step)], step)

    monkeypatch.setattr(Kernel, "verify", compared)
    monkeypatch.setattr(Kernel, "verify_what_changed", compared, raising=True)
    with variants(world.variants):
        runner, grammar = SequenceRunner(world), Grammar(world)
        for seed in range(6):
            runner.run(grammar.sequence(random.Random(f"{bug}/{seed}")), thorough=True)
    assert checked > 6


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_byte_is_damaged_in_the_arena_itself(patched: Kernel, data: st.DataObject) -> None:
    space = patched.machine.space
    slab = patched.machine.slab
    places = [at + offset for at, (size, _) in slab.live.items() for offset in range(-8, size + 8)]
    symbols = patched.machine.vmlinux.symbols
    names = ("klp_patches", "klp_ops", "ftrace_ops_list", "ftrace_pages_start", "modules", "area_of")
    places += [symbols[name] + offset for name in names for offset in range(16)]
    places += [symbols["klp_ftrace_handler"] + offset for offset in range(0xD8)]
    at = [
        space.physical(each) for each in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=3))
    ]
    flip = data.draw(st.integers(1, 255))
    before = [space.arena.bytes[each] for each in at]
    for each in at:
        space.arena.bytes[each] ^= flip
    for page in {each >> 12 << 12 for each in at}:  # what was translated before is executed no more
        for virtual in space.pages_of({page >> 12})[page >> 12]:
            space.drop_translations(virtual << 12, 4096)
    try:
        same(patched)
    finally:
        for each, byte in zip(reversed(at), reversed(before), strict=True):
            space.arena.bytes[each] = byte
        for each in at:
            space.arena.bytes[each] = before[at.index(each)]
            for virtual in space.pages_of({each >> 12})[each >> 12]:
                space.drop_translations(virtual << 12, 4096)
    assert same(patched).holds


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_word_guest_code_damages(patched: Kernel, data: st.DataObject) -> None:
    """Such a store is no event."""
    machine = patched.machine
    words = [at + offset for at, (size, _) in machine.slab.live.items() for offset in range(0, size - 7, 8)]
    at, value = data.draw(st.sampled_from(words)), data.draw(st.integers(0, (1 << 64) - 1))
    before = machine.space.read(at, 8)
    machine.call(machine.symbol("store_to"), at, value)
    try:
        same(patched)
    finally:
        machine.space.write(at, before)
    assert same(patched).holds


def test_a_restored_kernel_is_judged_as_it_is(patched: Kernel) -> None:
    kernel = Kernel.load()
    point = RestorePoint(kernel.machine, kernel)
    for _ in range(2):
        kernel.enable(fix_area())
        assert same(kernel).holds
        ops = kernel.machine.space.read(kernel.machine.vmlinux.symbols["klp_ops"], 8)
        func_stack = int.from_bytes(ops, "little")
        kernel.machine.space.write(func_stack, bytes(8))
        assert not same(kernel).holds
        point.restore()
        assert same(kernel).holds


def test_what_only_the_handler_has_loaded_belongs_to_a_stream(patched: Kernel) -> None:
    machine = patched.machine
    assert same(patched).holds
    head = machine.view("klp_ops", next(iter(patched.klp.ops())).address_).func_stack
    at = machine.view("klp_func", head.next - machine.layouts.offsetof("klp_func", "stack_node")).member_(
        "new_func"
    )
    before = machine.space.read(at, 8)
    machine.space.write(at, machine.symbol("perimeter_of").to_bytes(8, "little"))
    try:
        found = {each.invariant for each in same(patched).findings}
        assert "calls_reach_the_expected_function" in found
    finally:
        machine.space.write(at, before)
    assert same(patched).holds
