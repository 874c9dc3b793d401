"""What is on the stack of a task that does not run: it is walked from there, and goes on from there."""

from itertools import pairwise
from typing import Any

import pytest
from machines import assert_consistent, boot, call, results, run_to_the_end, spawn, step, struct_of
from register_probe import boot_with_probes

from emu.machine import Machine
from emu.memory import PAGE_SIZE, read_u64
from emu.schedules import Explicit, RoundRobin
from emu.task import Service, Task
from emu.unwind import StackTrace

FOREVER = 1 << 40


@pytest.fixture
def machine() -> Machine:
    """One vCPU, tasks in order of arrival."""
    machine = boot_with_probes()
    machine.hub.schedule = RoundRobin()
    return machine


def asleep(machine: Machine, *operations: Any, **options: Any) -> Task:
    task = spawn(machine, "sleeper", *operations, **options)
    machine.run(lambda: False, 4)
    assert not task.running
    return task


def frame_of(machine: Machine, task: Task) -> Any:
    """The struct inactive_task_frame that thread.sp points to."""
    sp = struct_of(machine, task).thread.sp
    return machine.layouts.view("inactive_task_frame", machine.space, sp)


def walk(machine: Machine, task: Task) -> StackTrace:
    return machine.unwinder.walk_task(task.struct)


def names_on(machine: Machine, task: Task) -> list[str]:
    """The functions on a task's stack, innermost first; it must be walked reliably."""
    trace = walk(machine, task)
    assert trace.unreliable == ""
    return [machine.kallsyms.describe(each).split("+")[0] for each in trace.entries]


# Asleep.


def test_a_task_asleep_in_an_export_has_the_exports_caller_on_top(machine: Machine) -> None:
    task = asleep(machine, call(machine, "nap_below", 3, 1000))
    assert names_on(machine, task) == ["msleep", "nap", *["nap_below"] * 4]


def test_the_frame_of_an_export_is_that_of_a_function_with_a_frame_pointer(machine: Machine) -> None:
    task = asleep(machine, call(machine, "nap", 1000))
    frame = frame_of(machine, task)
    assert frame.ret_addr == machine.symbol("msleep") + 3
    pushed = read_u64(machine.space, frame.bp + 8)
    assert machine.kallsyms.describe(pushed).startswith("nap+")
    assert frame.bp + 16 > frame.address_ + 56


def test_a_task_asleep_in_guest_code_in_a_service_in_guest_code_is_walked_to_its_end(
    machine: Machine,
) -> None:
    def export(machine: Machine, registers: dict[str, int]) -> int:
        machine.on_stack(40)
        return machine.hub.call_guest(machine.symbol("nap_below"), 1, 1000)

    machine.traps.exports["test_export"] = export
    task = asleep(machine, call(machine, "call_export"))
    inner = ["msleep", "nap", "nap_below", "nap_below"]
    assert names_on(machine, task) == [*inner, "test_export", "call_export"]


def test_the_same_below_a_service_that_no_guest_code_has_called(machine: Machine) -> None:
    task = spawn(machine, "t", step("sleep", 4), kthread=True)
    service = machine.hub.serve(task, "outer", lambda: machine.hub.call_guest(machine.symbol("nap"), 1000))
    machine.run(lambda: False, 4)
    assert names_on(machine, task) == ["msleep", "nap"]
    machine.run(lambda: service.finished)
    assert service.result == 1


@pytest.mark.parametrize("kthread", [False, True])
def test_a_task_that_has_not_begun_has_an_empty_stack(machine: Machine, kthread: bool) -> None:
    task = spawn(machine, "t", call(machine, "nap", 4), kthread=kthread)
    assert walk(machine, task) == StackTrace(())


def test_a_task_that_was_used_and_rests_has_an_empty_stack(machine: Machine) -> None:
    machine.call(machine.symbol("nap"), 4)
    assert walk(machine, machine.init_task) == StackTrace(())


def test_a_task_that_sleeps_in_a_service_of_its_own_has_an_empty_stack(machine: Machine) -> None:
    assert walk(machine, asleep(machine, step("sleep", 1000))) == StackTrace(())


def test_in_user_space_a_task_has_an_empty_stack_when_it_is_preempted(machine: Machine) -> None:
    task = spawn(machine, "t", step("user", 1000))
    other = spawn(machine, "other", call(machine, "nap", 40))
    machine.run(lambda: other.running)
    assert task.queued
    assert walk(machine, task) == StackTrace(())


def test_what_a_sleeping_task_keeps_is_on_its_stack_and_not_elsewhere(machine: Machine) -> None:
    """Change callee-saved registers in the frame at thread.sp, and the task goes on with these."""

    def export(machine: Machine, registers: dict[str, int]) -> None:
        machine.traps.exports["msleep"](machine, registers | {"rdi": 40})

    machine.traps.exports["test_export"] = export
    task = asleep(machine, call(machine, "keep_across_export", 5))
    frame = frame_of(machine, task)
    for wrong, name in enumerate(("bx", "r12", "r13", "r14", "r15")):
        setattr(frame, name, getattr(frame, name) + 1 + wrong)
    machine.space.write(frame.bp, (read_u64(machine.space, frame.bp) + 1).to_bytes(8, "little"))
    run_to_the_end(machine, task)
    assert results(task) == [6]


def test_that_is_so_while_another_vcpu_works(machine: Machine) -> None:
    machine = boot_with_probes(cpus=2)
    machine.hub.schedule = RoundRobin()
    machine.traps.exports["test_export"] = lambda machine, registers: machine.traps.exports["msleep"](
        machine, registers | {"rdi": 40}
    )
    spawn(machine, "busy", call(machine, "crunch", FOREVER), cpu=1)
    task = asleep(machine, call(machine, "keep_across_export", 5))
    frame_of(machine, task).r12 += 1
    machine.run(lambda: bool(results(task)), 100)
    assert results(task) == [1]


def test_a_return_address_that_is_changed_while_the_task_sleeps_is_returned_to(machine: Machine) -> None:
    task = asleep(machine, call(machine, "nap", 40))
    slot = frame_of(machine, task).bp + 8
    machine.space.write(slot, machine.symbol("own_ud2").to_bytes(8, "little"))
    with pytest.raises(Exception, match="own_ud2"):
        machine.run(lambda: False, 100)


# Taken off.


def preempted(machine: Machine, operation: Any, instructions: int) -> Task:
    """A task that was taken off after so many instructions of guest code."""
    machine.sched.full_preemption = True
    task = spawn(machine, "task", operation, kthread=True)
    other = spawn(machine, "other", call(machine, "crunch", FOREVER), kthread=True)
    machine.hub.schedule = Explicit([("task", 1), ("task", instructions), ("other", 1), ("other", 1)])
    machine.run(lambda: other.in_guest)
    assert task.preempted
    return task


def regs_of(machine: Machine, task: Task) -> Any:
    """The pt_regs that lie above the inactive_task_frame of a task that was interrupted."""
    sp = struct_of(machine, task).thread.sp + machine.layouts.sizeof("inactive_task_frame")
    return machine.layouts.view("pt_regs", machine.space, sp)


def test_an_interrupted_task_has_a_pt_regs_with_what_the_cpu_held(machine: Machine) -> None:
    before: dict[str, int] = {}
    switch = machine.sched.frames.interrupt
    machine.sched.frames.interrupt = lambda task, registers: (
        before.update(registers) or switch(task, registers)
    )
    task = preempted(machine, call(machine, "keep_registers", 7, FOREVER), 90)
    regs = regs_of(machine, task)
    for name in ("ip", "sp", "ax", "bx", "cx", "dx", "si", "di", "bp"):
        assert getattr(regs, name) == before[f"r{name}"]
    assert [getattr(regs, f"r{number}") for number in range(8, 16)] == [
        before[f"r{number}"] for number in range(8, 16)
    ]
    assert regs.flags == before["eflags"]
    assert regs.ax == 0x5A5A_0000_0000_0000 + 7
    assert (regs.cs, regs.ss, regs.orig_ax) == (0x10, 0x18, (1 << 64) - 1)
    assert frame_of(machine, task).ret_addr == machine.symbol("asm_sysvec_apic_timer_interrupt") + 3


def test_the_pt_regs_lie_as_the_cpu_pushes_them(machine: Machine) -> None:
    """SDM Vol. 3A, 6.14.2: RSP is aligned to 16 before SS is pushed."""
    offsets = set()
    for instructions in range(2, 12):
        machine = boot()
        task = preempted(machine, call(machine, "crunch", FOREVER), instructions)
        regs = regs_of(machine, task)
        top = regs.address_ + machine.layouts.sizeof("pt_regs")
        assert top == regs.sp & ~15
        offsets.add(regs.sp - top)
    assert offsets == {0, 8}


def test_an_interrupted_task_is_walked_from_the_instruction_that_comes_next(machine: Machine) -> None:
    task = preempted(machine, call(machine, "crunch", FOREVER), 30)
    interrupt, first, *callers = walk(machine, task).entries
    assert interrupt == machine.symbol("asm_sysvec_apic_timer_interrupt") + 3
    assert first == regs_of(machine, task).ip
    assert names_on(machine, task)[-1] == "crunch"
    assert callers


def test_an_interrupted_task_goes_on_with_its_pt_regs(machine: Machine) -> None:
    task = preempted(machine, call(machine, "keep_registers", 7, 50), 120)
    regs = regs_of(machine, task)
    for name in ("ax", "bx", "cx", "dx", "si", "di", "bp", *(f"r{number}" for number in range(8, 16))):
        setattr(regs, name, getattr(regs, name) + 1)
    regs.flags &= ~1
    machine.hub.schedule = Explicit([("task", 10_000)])
    machine.run(lambda: bool(results(task)), 10)
    assert results(task) == [16]


def test_an_interrupted_task_goes_on_where_its_pt_regs_say(machine: Machine) -> None:
    task = preempted(machine, call(machine, "crunch", FOREVER), 1)
    regs = regs_of(machine, task)
    assert regs.ip != machine.symbol("area_of")
    regs.ip, regs.di, regs.si = machine.symbol("area_of"), 20, 22
    machine.hub.schedule = Explicit([("task", 10_000)])
    machine.run(lambda: bool(results(task)), 10)
    assert results(task) == [42]


# Stacks.


def test_a_user_task_has_the_registers_of_its_user_space_on_top(machine: Machine) -> None:
    task = spawn(machine, "t", call(machine, "nap", 4))
    size = machine.layouts.sizeof("pt_regs")
    regs = machine.layouts.view("pt_regs", machine.space, task.stack_top - size)
    assert (regs.cs & 3, regs.ss & 3) == (3, 3), "user mode"
    assert regs.ip < 1 << 47
    kthread = spawn(machine, "k", call(machine, "nap", 4), kthread=True)
    assert machine.space.read(kthread.stack_top - size, size) == bytes(size)


def test_the_registers_of_user_space_are_left_alone(machine: Machine) -> None:
    size = machine.layouts.sizeof("pt_regs")
    task = asleep(machine, call(machine, "nap_below", 5, 4), call(machine, "nap", 4000))
    fresh = spawn(machine, "fresh", call(machine, "nap", 4))
    assert machine.space.read(task.stack_top - size, size) == machine.space.read(fresh.stack_top - size, size)


def test_every_stack_has_a_guard_page_below_it(machine: Machine) -> None:
    tasks = [spawn(machine, f"t{number}", call(machine, "nap", 4)) for number in range(20)]
    for task in (*tasks, *machine.tasks, machine.sched.runqueues[0].idle):
        bottom = struct_of(machine, task).stack
        assert machine.space.access(bottom - 1) is None
        assert machine.space.access(bottom) is not None
        assert machine.space.access(task.stack_top - 1) is not None
    tops = sorted(task.stack_top for task in tasks)
    assert all(high - low >= 4 * PAGE_SIZE + PAGE_SIZE for low, high in pairwise(tops))


def test_what_a_service_puts_on_the_stack_stays_clear_of_what_it_calls(machine: Machine) -> None:
    seen = []

    def export(machine: Machine, registers: dict[str, int]) -> int:
        first, second = machine.on_stack(100), machine.on_stack(24)
        assert first % 16 == second % 16 == 0
        assert second + 24 <= first
        assert first + 100 <= registers["rsp"]
        machine.space.write(first, b"\xa5" * 100)
        machine.space.write(second, b"\x5a" * 24)
        machine.hub.call_guest(machine.symbol("nap_below"), 4, 4)
        seen.append(machine.space.read(first, 100) + machine.space.read(second, 24))
        return 0

    machine.traps.exports["test_export"] = export
    task = spawn(machine, "t", call(machine, "call_export"))
    run_to_the_end(machine, task)
    assert seen == [b"\xa5" * 100 + b"\x5a" * 24]


def test_what_was_put_on_the_stack_is_gone_with_its_service(machine: Machine) -> None:
    where = []
    for _ in range(2):
        machine.service("puts", lambda: where.append(machine.on_stack(64)))
    assert where[0] == where[1]


def test_a_task_torn_out_of_guest_code_goes_on_on_another_stack(machine: Machine) -> None:
    """What it has put on the old one is on a wait queue still."""
    task = machine.init_task
    old = task.stack_top
    with pytest.raises(Exception, match="deadlock"):
        machine.call(machine.symbol("await_flag"))
    assert task.stack_top != old
    assert_consistent(machine)
    assert machine.call(machine.symbol("both_steps")) == 0x11
    machine.call(machine.symbol("raise_flag"), 5)
    assert machine.call(machine.symbol("await_flag")) == 5


def test_a_task_torn_out_while_it_is_current_is_current_on_its_new_stack(machine: Machine) -> None:
    def export(machine: Machine, registers: dict[str, int]) -> None:
        raise ValueError("a bug of ours")

    old = machine.init_task.stack_top
    machine.traps.exports["test_export"] = export
    with pytest.raises(ValueError, match="bug"):
        machine.call(machine.symbol("call_export"))
    assert machine.sched.runqueues[0].curr is machine.init_task
    assert machine.init_task.stack_top != old
    assert_consistent(machine)


def test_a_service_that_fails_without_guest_code_keeps_its_stack(machine: Machine) -> None:
    old = machine.init_task.stack_top
    with pytest.raises(Exception, match="deadlock"):
        machine.service("waits", lambda: machine.hub.wait(lambda: False, "nothing"))
    assert machine.init_task.stack_top == old
    assert not any(isinstance(each, Service) for each in machine.init_task.activities)
