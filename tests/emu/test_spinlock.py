"""Spinlocks: one holder, and its vCPU is not taken away."""

import pytest
from interleavings import interleavings
from machines import boot, call, spawn, step

from emu.hub import RunToCompletion
from emu.machine import Machine
from emu.memory import read_u32
from emu.schedules import Explicit, RoundRobin
from emu.spinlock import spin_locked
from emu.traps import GuestFault


def preempt_count(machine: Machine) -> int:
    return read_u32(machine.space, machine.cpus[0].gs_base + machine.vmlinux.symbols["__preempt_count"])


def test_the_lock_is_held_and_preemption_off_while_the_block_runs(machine: Machine) -> None:
    lock = machine.slab.kzalloc(4, "raw_spinlock_t")
    count = preempt_count(machine)

    def body() -> tuple[int, int]:
        with spin_locked(machine, lock):
            return read_u32(machine.space, lock), preempt_count(machine)

    assert machine.service("locks", body) == (1, count + 1)
    assert (read_u32(machine.space, lock), preempt_count(machine)) == (0, count)


def test_an_error_in_the_block_releases_the_lock(machine: Machine) -> None:
    lock = machine.slab.kzalloc(4, "raw_spinlock_t")
    count = preempt_count(machine)

    def body() -> None:
        with spin_locked(machine, lock):
            raise ValueError("a bug of ours")

    with pytest.raises(ValueError, match="bug"):
        machine.service("fails", body)
    assert (read_u32(machine.space, lock), preempt_count(machine)) == (0, count)


def test_two_are_never_both_inside() -> None:
    machine = boot(cpus=3)
    lock = machine.slab.kzalloc(4, "raw_spinlock_t")
    tasks = machine.tasks[:3]
    tried = 0
    for schedule in interleavings(2):
        machine.hub.schedule = schedule
        inside: list[int] = []
        seen = []

        def body(inside: list[int] = inside, seen: list[int] = seen) -> None:
            with spin_locked(machine, lock):
                inside.append(1)
                machine.hub.door("inside")
                seen.append(len(inside))
                inside.pop()

        services = [machine.hub.serve(task, "locks", body) for task in tasks]
        for task, service in zip(tasks, services, strict=True):
            machine.hub.finish(task, service)
        assert seen == [1, 1, 1]
        tried += 1
    assert tried > 50


def test_guest_code_that_is_called_with_the_lock_held_keeps_its_vcpu(machine: Machine) -> None:
    lock = machine.slab.kzalloc(4, "raw_spinlock_t")
    machine.sched.full_preemption = True
    spawn(machine, "other", call(machine, "both_steps"), kthread=True)
    held: list[bool] = []

    def body() -> None:
        with spin_locked(machine, lock):
            machine.hub.call_guest(machine.symbol("both_steps"))
            held.append(True)
        machine.hub.call_guest(machine.symbol("both_steps"))

    task = spawn(machine, "task", kthread=True)
    service = machine.hub.serve(task, "locks", body)
    machine.hub.schedule = Explicit([("task", 1)] * 12)
    while not held:
        machine.hub.advance(task, 1)
        assert [each.name for each in machine.sched.candidates()] == ["task"]
    offered = set()
    while not service.finished:
        offered.add(len(machine.sched.candidates()))
        machine.hub.advance(task, 1)
    assert offered == {1, 2}, "behind the lock it can be preempted"


def test_an_abandoned_service_releases_what_it_holds_without_waiting_for_anybody() -> None:
    machine = boot(cpus=2)
    lock = machine.slab.kzalloc(4, "raw_spinlock_t")
    first = machine.tasks[0]
    machine.hub.schedule = Explicit([("init", 1)] * 5)

    def body() -> None:
        try:
            machine.hub.wait(lambda: False, "for ever")
        finally:
            with spin_locked(machine, lock):
                pass

    machine.hub.serve(first, "waits", body)
    for _ in range(2):
        machine.hub.advance(first)
    machine.space.write(lock, b"\x01\0\0\0")  # another vCPU holds it
    machine.hub.abandon(first)
    machine.hub.schedule = RunToCompletion()
    assert machine.call(machine.symbol("area_of"), 3, 4) == 7


@pytest.mark.parametrize("kthread", [False, True])
def test_a_task_that_faults_with_a_lock_held_leaves_its_vcpu_preemptible(kthread: bool) -> None:
    """make_task_dead() sets preempt_count to what it is where nothing is held; the lock stays as it is."""
    machine = boot()
    machine.hub.schedule = RoundRobin()
    lock = machine.slab.kzalloc(4, "raw_spinlock_t")
    count = preempt_count(machine)
    task = spawn(machine, "task", step("sleep", 4000), kthread=kthread)

    def body() -> None:
        machine.hub.call_guest(machine.symbol("_raw_spin_lock"), lock)
        assert preempt_count(machine) == count + 1
        machine.hub.call_guest(machine.symbol("jump_nowhere"))

    machine.hub.serve(task, "faults", body)
    with pytest.raises(GuestFault):
        machine.run(lambda: False, 20)
    assert preempt_count(machine) == count
    assert read_u32(machine.space, lock) == 1


def test_an_abandoned_task_gives_back_only_its_own_vcpus_count(machine: Machine) -> None:
    machine.hub.schedule = RoundRobin()
    sleeper = spawn(machine, "sleeper", call(machine, "nap", 4000))
    machine.run(lambda: False, 4)
    at = machine.cpus[0].gs_base + machine.vmlinux.symbols["__preempt_count"]
    machine.space.write(at, (preempt_count(machine) + 1).to_bytes(4, "little"))
    raised = preempt_count(machine)
    machine.hub.abandon(sleeper)
    assert preempt_count(machine) == raised
