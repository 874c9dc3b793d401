"""Putting a machine back: what runs afterwards runs as on a machine that was just booted."""

import hashlib
from typing import Any

import pytest

from emu.events import Event
from emu.restore_point import RestorePoint, Suspended
from klpemu import Func, Kernel, Patch

AREA = Patch("fix_area", {"vmlinux": [Func("area_of", "fixed_area_of")]}, "builtin:fix_area.o")
SHAPES = Patch(
    "fix_shapes",
    {"vmlinux": [Func("perimeter_of", "checked_perimeter_of")]},
    "builtin:fix_shapes.o",
    replace=True,
)


def one_way(kernel: Kernel) -> None:
    kernel.tasks.spawn("caller", ["many_calls(20)"], repeat=3)
    kernel.enable(AREA)
    kernel.tasks.wait_for_transition()
    kernel.enable(SHAPES)
    kernel.tasks.wait_for_transition()
    kernel.load_module("builtin:lamp.ko")
    kernel.tasks.spawn("sleeper", ["nap(250)", "both_steps()"], repeat=None)
    kernel.tasks.run(100)


def another_way(kernel: Kernel) -> None:
    kernel.load_module("builtin:endbr.o")
    kernel.tasks.spawn("sleeper", ["transact(250)", "fork", "both_steps()"], repeat=3)
    kernel.tasks.run(100)
    kernel.insmod("builtin:klp_lamp.ko")
    kernel.tasks.run(300)


def seen(kernel: Kernel) -> tuple[list[Event], list[str], list[str], int, Any]:
    """Everything that one can see of a kernel: its events, log, memory, time, and what the checks say."""
    arena = kernel.machine.space.arena
    memory = [hashlib.sha256(arena.bytes[at.start : at.stop]).hexdigest() for at in arena.in_use()]
    return [*kernel.machine.events], list(kernel.log), memory, kernel.machine.timers.now, kernel.verify()


def test_a_run_after_another_is_the_run_alone() -> None:
    alone = Kernel.load(cpus=2, observe=True)
    one_way(alone)
    expected = seen(alone)
    kernel = Kernel.load(cpus=2, observe=True)
    point = RestorePoint(kernel.machine, kernel)
    for _ in range(2):
        another_way(kernel)
        point.restore()
        one_way(kernel)
        assert seen(kernel) == expected
        point.restore()


def test_text_that_has_changed_since_is_executed_as_it_was() -> None:
    kernel = Kernel.load()
    point = RestorePoint(kernel.machine, kernel)
    assert kernel.call("area_of", 3, 4) == 7
    kernel.enable(AREA)
    assert kernel.call("area_of", 3, 4) == 12
    point.restore()
    assert kernel.call("area_of", 3, 4) == 7
    assert kernel.enabled == []


def test_text_at_the_restore_point_may_be_patched() -> None:
    kernel = Kernel.load()
    kernel.enable(AREA)
    point = RestorePoint(kernel.machine, kernel)
    kernel.disable(AREA)
    kernel.tasks.wait_for_transition()
    assert kernel.call("area_of", 3, 4) == 7
    point.restore()
    assert kernel.call("area_of", 3, 4) == 12
    kernel.verify().raise_for_findings()


def test_frames_that_nobody_has_are_zero_again() -> None:
    kernel = Kernel.load()
    arena = kernel.machine.space.arena
    point = RestorePoint(kernel.machine, kernel)
    taken = arena.writable_frames(3), arena.image_frames(2)
    for frame in taken:
        arena.bytes[frame : frame + 16] = b"left by a run..."
    point.restore()
    assert (arena.writable_frames(3), arena.image_frames(2)) == taken
    assert all(arena.bytes[frame : frame + 16] == bytes(16) for frame in taken)


def test_registers_are_put_back() -> None:
    kernel = Kernel.load()
    cpu = kernel.machine.cpus[0]
    before = cpu.registers(), cpu.vectors()
    point = RestorePoint(kernel.machine, kernel)
    cpu.set_registers({"rax": 0x1234, "eflags": 0x246})
    cpu.set_vectors(bytes(range(256)))
    point.restore()
    assert (cpu.registers(), cpu.vectors()) == before


def test_a_service_under_way_cannot_be_copied() -> None:
    kernel = Kernel.load(cpus=2)
    kernel.tasks.spawn("sleeper", ["nap(2500)"])
    kernel.tasks.run(20)
    with pytest.raises(Suspended, match="under way"):
        RestorePoint(kernel.machine, kernel)


def test_a_task_in_the_middle_of_guest_code_is_copied() -> None:
    kernel = Kernel.load(cpus=2)
    task = kernel.tasks.spawn("caller", ["many_calls(5000)"], cpu=1)
    kernel.machine.run(lambda: task.in_guest, 1)
    assert task.in_guest
    point = RestorePoint(kernel.machine, kernel)
    ends = []
    for _ in range(2):
        kernel.tasks.run(1000, lambda: task.dead)
        ends.append((task.dead, task.program.results[-1], kernel.machine.timers.now))
        point.restore()
    assert ends[0] == ends[1]
    assert ends[0][1] == ("many_calls(5000)", 35000)
    assert task.in_guest


def test_one_goes_back_and_forth_between_restore_points() -> None:
    kernel = Kernel.load(cpus=2)
    early = RestorePoint(kernel.machine, kernel)
    kernel.machine.slab.kmalloc(1 << 20, "something by a test")
    kernel.enable(AREA)
    kernel.load_module("builtin:lamp.ko")
    late = RestorePoint(kernel.machine, kernel)
    assert late.size > early.size
    kernel.tasks.wait_for_transition()
    expected = seen(kernel)
    for _ in range(2):
        early.restore()
        assert kernel.call("area_of", 3, 4) == 7
        late.restore()
        kernel.tasks.wait_for_transition()
        assert seen(kernel) == expected


def test_what_a_run_has_resolved_is_not_resolved_in_the_next() -> None:
    kernel = Kernel.load(cpus=2)
    kernel.insmod("builtin:klp_lamp.ko")
    kernel.tasks.wait_for_transition()
    point = RestorePoint(kernel.machine, kernel)
    kernel.load_module("builtin:lamp.ko")  # now klp relocations of klp_lamp have their targets
    kernel.verify().raise_for_findings()
    point.restore()
    kernel.verify().raise_for_findings()


def test_who_watches_basic_blocks_watches_for_good_and_is_told_once() -> None:
    kernel = Kernel.load()
    first: list[int] = []
    kernel.machine.cpus[0].observe(first.append)
    point = RestorePoint(kernel.machine, kernel)
    second: list[int] = []
    kernel.machine.cpus[0].observe(second.append)
    point.restore()
    first.clear()
    kernel.call("area_of", 6, 7)
    assert first.count(kernel.machine.symbol("area_of")) == 1
    assert second == first


def test_an_object_with_slots_gets_back_what_was_set_and_loses_what_was_not() -> None:
    class Slotted:
        __slots__ = ("absent", "number", "numbers")

    kernel, each = Kernel.load(), Slotted()
    each.number, each.numbers = 1, [1]
    whole = Slotted()
    whole.absent, whole.number, whole.numbers = 1, 2, [3]
    point = RestorePoint(kernel.machine, [each, whole])
    kept = each.numbers
    each.absent, each.number = 5, 2
    each.numbers.append(2)
    whole.number = 7
    whole.numbers = []
    del whole.absent
    point.restore()
    assert not hasattr(each, "absent")
    assert (each.number, each.numbers) == (1, [1])
    assert each.numbers is kept
    assert (whole.absent, whole.number, whole.numbers) == (1, 2, [3])
