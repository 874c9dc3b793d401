"""Preemption: who may be taken off a vCPU, and what survives it."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import (
    Checked,
    boot,
    call,
    registered,
    results,
    run_to_the_end,
    spawn,
    struct_of,
)
from register_probe import boot_with_probes

from emu.events import EventKind
from emu.machine import Machine
from emu.memory import read_u32
from emu.schedules import Explicit, RoundRobin, Seeded
from emu.thread_info import (
    TASK_UNINTERRUPTIBLE,
)

FOREVER = 1 << 40


# Who may be taken off.


@pytest.mark.parametrize("schedule", [RoundRobin(), Seeded(1), Seeded(2)])
def test_nobody_is_taken_off_without_full_preemption(schedule: Any) -> None:
    machine = boot()
    machine.hub.schedule = schedule
    worker = spawn(machine, "worker", call(machine, "crunch", 2000), kthread=True)
    waiting = spawn(machine, "waiting", call(machine, "both_steps"), kthread=True)
    machine.run(lambda: worker.running)
    machine.run(lambda: bool(results(worker)), 1000)
    assert results(worker) == [0x11 * 2000]
    assert results(waiting) == []
    assert struct_of(machine, worker).nivcsw == 0


def test_a_task_that_offers_the_vcpu_lets_others_run_in_turn() -> None:
    machine = boot()
    machine.hub.schedule = RoundRobin()
    tasks = [spawn(machine, f"t{number}", call(machine, "work", 50), kthread=True) for number in range(3)]
    run_to_the_end(machine, *tasks)
    switches = [event.note.split(" -> ")[1] for event in machine.events if event.kind is EventKind.SWITCH]
    assert switches[:9] == ["t0", "t1", "t2"] * 3
    assert [results(task) for task in tasks] == [[0x11 * 50]] * 3


def test_an_offer_of_the_vcpu_is_no_sleep() -> None:
    """preempt_schedule_common(): __state says how the next schedule() goes, not this one."""
    machine = boot()
    task, other = (spawn(machine, name, call(machine, "area_of", 3, 4), kthread=True) for name in ("a", "b"))

    def body() -> str:
        struct = machine.view("task_struct", task.struct)
        struct.__state = TASK_UNINTERRUPTIBLE
        machine.sched.preempt_schedule("an offer")
        return f"{other.dead}, {struct.__state}"

    service = machine.hub.serve(task, "offers", body)
    machine.run(lambda: service.finished, 100)
    assert service.result == f"True, {TASK_UNINTERRUPTIBLE}"


def places_of_preemption(machine: Machine, points: int) -> list[int]:
    """Where a task that computes is interrupted, after each of its first instructions."""
    machine.sched.full_preemption = True
    task, other = (
        spawn(machine, name, call(machine, "crunch", FOREVER), kthread=True) for name in ("task", "other")
    )
    machine.hub.schedule = Explicit([("task", 1)] * 2 + [("other", 1)] * 2 + [("task", 1)])
    machine.run(lambda: other.in_guest and task.running)
    places = []
    for _ in range(points):
        machine.hub.schedule = Explicit([("task", 1), ("other", 1)])
        machine.run(lambda: other.running)
        places.append(machine.unwinder.walk_task(task.struct).entries[1])
        machine.hub.schedule = Explicit([("task", 1)])
        machine.run(lambda: task.running)
    return places


def test_full_preemption_lets_a_task_be_taken_off_between_any_two_instructions() -> None:
    machine = boot()
    places = places_of_preemption(machine, 60)
    names = {machine.kallsyms.describe(place).split("+")[0] for place in places}
    assert names == {"crunch", "both_steps", "step_one", "step_two"}
    assert all(first != second for first, second in pairwise(places))


def test_a_trampoline_of_ftrace_can_be_preempted(machine: Machine) -> None:
    """Nothing there disables preemption: this is what synchronize_rcu_tasks() is for."""
    registered(machine, ["step_one"])
    names = {machine.kallsyms.describe(each).split("+")[0] for each in places_of_preemption(machine, 40)}
    assert {"ftrace_trampoline", "trace_count"} <= names


def preempt_count(machine: Machine) -> int:
    return machine.cpus[0].gs_base + machine.vmlinux.symbols["__preempt_count"]


def test_a_preemption_count_keeps_the_task_on(machine: Machine) -> None:
    task = spawn(machine, "task", call(machine, "crunch", FOREVER), kthread=True)
    machine.hub.schedule = Explicit([("task", 50)] * 3)
    machine.sched.full_preemption = True
    machine.run(lambda: task.running and task.in_guest)
    assert machine.sched.preemptible(task)
    kept = read_u32(machine.space, preempt_count(machine))
    machine.space.write(preempt_count(machine), (kept + 1).to_bytes(4, "little"))
    assert not machine.sched.preemptible(task)
    spawn(machine, "other", call(machine, "both_steps"), kthread=True)
    assert machine.sched.candidates() == [task]
    machine.space.write(preempt_count(machine), kept.to_bytes(4, "little"))
    assert [each.name for each in machine.sched.candidates()] == ["task", "other"]


def test_nobody_is_taken_off_in_the_exception_of_an_int3(machine: Machine) -> None:
    task = spawn(machine, "task", call(machine, "own_int3"), kthread=True)
    spawn(machine, "other", call(machine, "both_steps"), kthread=True)
    machine.sched.full_preemption = True
    machine.traps.breakpoint_handlers.append(lambda registers, push: True)
    machine.hub.schedule = Explicit([("task", 1)] * 2)
    machine.run(lambda: any(event.kind is EventKind.TRAP for event in machine.events))
    assert not machine.sched.preemptible(task)
    assert machine.sched.candidates() == [task]


def test_nobody_is_taken_off_in_a_service(machine: Machine) -> None:
    task = spawn(machine, "task", call(machine, "call_export"), kthread=True)
    spawn(machine, "other", call(machine, "both_steps"), kthread=True)
    machine.sched.full_preemption = True
    seen = []

    def export(machine: Machine, registers: dict[str, int]) -> int:
        for _ in range(5):
            machine.hub.door("here")
            seen.append(machine.hub.current)
        return 0

    machine.traps.exports["test_export"] = export
    machine.hub.schedule = Seeded(3)
    machine.run(lambda: len(seen) == 5, 100)
    assert seen == [task] * 5
    assert struct_of(machine, task).nivcsw == 0 or task.preempted is False


# What survives.


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1 << 30), cpus=st.integers(1, 3))
def test_no_register_changes_however_often_a_task_is_taken_off(seed: int, cpus: int) -> None:
    machine = boot_with_probes(cpus=cpus)
    machine.hub.schedule = Checked(machine, seed)
    machine.sched.full_preemption = True
    tasks = [
        spawn(machine, f"t{number}", call(machine, "keep_registers", number << 20, 400), cpu=number % cpus)
        for number in range(2 * cpus + 1)
    ]
    taken = dict.fromkeys(tasks, 0)

    def ended() -> bool:
        for task in tasks:
            if not task.dead:
                taken[task] = struct_of(machine, task).nivcsw
        return all(task.dead for task in tasks)

    assert machine.run(ended, 50_000)
    assert [results(task) for task in tasks] == [[0]] * len(tasks)
    assert sum(taken.values()) > len(tasks)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_registers_survive_guest_code_in_a_service_in_guest_code_that_is_preempted(seed: int) -> None:
    machine = boot_with_probes(cpus=2)
    inner: list[int] = []

    def export(machine: Machine, registers: dict[str, int]) -> int:
        inner.append(machine.hub.call_guest(machine.symbol("keep_registers"), len(inner) << 24, 300))
        machine.hub.call_guest(machine.symbol("nap"), 4)
        return 0

    machine.traps.exports["test_export"] = export
    machine.hub.schedule = Seeded(seed)
    machine.sched.full_preemption = True
    tasks = [
        spawn(machine, f"t{number}", call(machine, "keep_across_export", number << 16), cpu=number % 2)
        for number in range(4)
    ]
    run_to_the_end(machine, *tasks)
    assert inner == [0] * 4
    assert [results(task) for task in tasks] == [[0]] * 4


def test_a_task_taken_off_hundreds_of_times_computes_the_same() -> None:
    machine = boot()
    machine.hub.schedule = Seeded(11)
    machine.sched.full_preemption = True
    first, second = (spawn(machine, name, call(machine, "crunch", 3000)) for name in ("first", "second"))
    machine.run(lambda: first.dead or second.dead)
    taken = max(struct_of(machine, each).nivcsw for each in (first, second) if not each.dead)
    run_to_the_end(machine, first, second)
    assert taken > 100
    assert results(first) == results(second) == [0x11 * 3000]
