"""The scheduler: who is current, who waits in the queue, who may be taken off, and what survives a switch."""

from collections.abc import Sequence
from typing import Any

import pytest
from machines import (
    Checked,
    assert_consistent,
    boot,
    call,
    results,
    run_to_the_end,
    spawn,
    step,
    struct_of,
)
from register_probe import boot_with_probes

from elf.errors import KlpemuError
from emu.events import EventKind
from emu.machine import Machine
from emu.memory import read_u64
from emu.schedules import Explicit, RoundRobin, Seeded
from emu.task import Task
from emu.thread_info import (
    PF_IDLE,
    PF_KTHREAD,
    TASK_INTERRUPTIBLE,
    TASK_NEW,
    TASK_RUNNING,
    TASK_UNINTERRUPTIBLE,
    TIF_NOTIFY_SIGNAL,
    TIF_PATCH_PENDING,
    set_tsk_thread_flag,
)

FOREVER = 1 << 40


def state_of(machine: Machine, task: Task) -> int:
    return int(struct_of(machine, task).__state)


def per_cpu(machine: Machine, cpu: int, symbol: str) -> int:
    return read_u64(machine.space, machine.cpus[cpu].gs_base + machine.vmlinux.symbols[symbol])


@pytest.fixture
def smp() -> Machine:
    """Two vCPUs that take turns."""
    machine = boot(cpus=2)
    machine.hub.schedule = RoundRobin()
    return machine


# Who is current.


def test_every_vcpu_begins_with_its_idle_task() -> None:
    machine = boot(cpus=3)
    for number, rq in enumerate(machine.sched.runqueues):
        struct = struct_of(machine, rq.idle)
        assert struct.comm.rstrip(b"\0") == f"swapper/{number}".encode()
        assert struct.flags == PF_IDLE | PF_KTHREAD
        assert (struct.pid, struct.thread_info.cpu, struct.on_cpu) == (0, number, 1)
        assert struct.group_leader == struct.address_
        assert machine.sched.task_curr(rq.idle)
        assert per_cpu(machine, number, "cpu_current_top_of_stack") == rq.idle.stack_top
    assert machine.sched.runqueues[0].idle.struct == machine.symbol("init_task")
    assert_consistent(machine)


def test_guest_code_finds_its_task_through_gs(smp: Machine) -> None:
    tasks = [
        spawn(smp, f"t{number}", call(smp, "current_pid"), call(smp, "smp_processor_id"), cpu=number % 2)
        for number in range(4)
    ]
    pids = [smp.pid_of(task) for task in tasks]
    run_to_the_end(smp, *tasks)
    assert [results(task) for task in tasks] == [[pid, number % 2] for number, pid in enumerate(pids)]


def test_a_vcpu_whose_task_sleeps_is_idle_even_while_another_works(smp: Machine) -> None:
    sleeper = spawn(smp, "sleeper", call(smp, "nap", 1000), cpu=0)
    spawn(smp, "busy", call(smp, "crunch", FOREVER), cpu=1)
    smp.run(lambda: False, 10)
    rq = smp.sched.rq_of(sleeper)
    assert rq.curr is rq.idle
    assert per_cpu(smp, 0, "current_task") == rq.idle.struct
    assert struct_of(smp, sleeper).on_cpu == 0
    assert_consistent(smp)


def test_the_stack_canary_is_the_current_tasks() -> None:
    machine = boot_with_probes()
    first, second = (
        spawn(
            machine,
            name,
            call(machine, "stack_canary"),
            call(machine, "nap", 4),
            call(machine, "stack_canary"),
        )
        for name in ("first", "second")
    )
    struct_of(machine, first).stack_canary = 0x1111
    struct_of(machine, second).stack_canary = 0x2222
    run_to_the_end(machine, first, second)
    assert results(first) == [0x1111, 1, 0x1111]
    assert results(second) == [0x2222, 1, 0x2222]


def test_a_task_stays_on_its_vcpu() -> None:
    machine = boot(cpus=4)
    machine.hub.schedule = Seeded(5)
    machine.sched.full_preemption = True
    where = [call(machine, "smp_processor_id"), call(machine, "nap", 4)]
    tasks = [spawn(machine, f"t{number}", *where, cpu=number % 4, repeat=5) for number in range(8)]
    run_to_the_end(machine, *tasks)
    assert [results(task) for task in tasks] == [[number % 4, 1] * 5 for number in range(8)]


def test_an_event_says_who_was_switched_for_whom(smp: Machine) -> None:
    task = spawn(smp, "t", call(smp, "nap", 4), cpu=1)
    run_to_the_end(smp, task)
    notes = [event.note for event in smp.events if event.kind is EventKind.SWITCH]
    assert notes == ["swapper/1 -> t", "t -> swapper/1", "swapper/1 -> t", "t -> swapper/1"]


# Switches, counted.


def test_voluntary_and_involuntary_switches_are_counted_apart() -> None:
    machine = boot()
    machine.hub.schedule = RoundRobin()
    machine.sched.full_preemption = True
    spawn(machine, "other", call(machine, "crunch", FOREVER), kthread=True)
    task = spawn(machine, "task", call(machine, "nap", 4), call(machine, "crunch", FOREVER), kthread=True)
    machine.run(lambda: task.program.now.startswith("crunch"), 1000)
    voluntary = struct_of(machine, task).nvcsw
    machine.run(lambda: struct_of(machine, task).nivcsw == 3, 1000)
    assert struct_of(machine, task).nvcsw == voluntary == 1


def test_every_switch_of_a_vcpu_is_counted(smp: Machine) -> None:
    rq = smp.sched.runqueues[1]
    before = rq.nr_switches
    run_to_the_end(smp, spawn(smp, "t", call(smp, "nap", 4), call(smp, "nap", 4), cpu=1))
    assert (
        rq.nr_switches - before == len([event for event in smp.events if event.kind is EventKind.SWITCH]) == 6
    )


# Waking up.


def test_only_who_sleeps_in_one_of_the_states_is_woken(smp: Machine) -> None:
    task = spawn(smp, "t", call(smp, "nap", 4000), kthread=True)
    assert not smp.sched.try_to_wake_up(task), "it is in the queue"
    smp.run(lambda: False, 5)
    assert state_of(smp, task) == TASK_UNINTERRUPTIBLE
    assert not smp.sched.try_to_wake_up(task, TASK_INTERRUPTIBLE)
    assert not task.queued
    assert smp.sched.try_to_wake_up(task, TASK_UNINTERRUPTIBLE)
    assert task.queued
    assert state_of(smp, task) == TASK_RUNNING
    assert not smp.sched.try_to_wake_up(task), "it is awake"


def test_a_task_that_was_never_started_is_not_woken(smp: Machine) -> None:
    init = smp.tasks[1]
    assert state_of(smp, init) == TASK_NEW
    assert not smp.sched.try_to_wake_up(init)
    assert not init.queued


def test_whoever_gets_a_wild_pointer_to_a_task_says_so(smp: Machine) -> None:
    with pytest.raises(KlpemuError, match="pointer to no task_struct"):
        smp.call(smp.symbol("wake_up_process"), 0x1234)
    assert smp.call(smp.symbol("area_of"), 3, 4) == 7


def asleep(task: Task) -> bool:
    return not task.running and not task.queued


def stop_before_schedule(machine: Machine, task: Task) -> None:
    """Let the task run sys_pause() until it has stored its state, and has not called schedule() yet."""
    machine.hub.schedule = Explicit([(task.name, 1)] * 40)
    machine.run(lambda: state_of(machine, task) == TASK_INTERRUPTIBLE)


def test_a_wake_up_between_the_state_and_schedule_is_not_lost() -> None:
    machine = boot()
    task = spawn(machine, "pauser", call(machine, "sys_pause"), kthread=True)
    stop_before_schedule(machine, task)
    assert machine.sched.try_to_wake_up(task)
    run_to_the_end(machine, task)


def test_nobody_sleeps_interruptibly_while_there_is_a_signal() -> None:
    """signal_pending_state() in __schedule(); the signal's own wake-up came while the task was awake."""
    machine = boot()
    task = spawn(machine, "pauser", call(machine, "sys_pause"))
    set_tsk_thread_flag(machine, task.struct, TIF_NOTIFY_SIGNAL)
    assert not machine.sched.try_to_wake_up(task, TASK_INTERRUPTIBLE)
    machine.run(lambda: asleep(task), 100)
    assert struct_of(machine, task).thread_info.flags & TIF_NOTIFY_SIGNAL == 0, "it has been to user space"


def test_a_signal_does_not_end_an_uninterruptible_sleep() -> None:
    machine = boot()
    task = spawn(machine, "napper", call(machine, "nap", 400))
    set_tsk_thread_flag(machine, task.struct, TIF_NOTIFY_SIGNAL)
    start = machine.timers.now
    run_to_the_end(machine, task)
    assert machine.timers.now - start >= 100


def test_a_preempted_task_keeps_the_state_that_it_has_set() -> None:
    """SM_PREEMPT: on its way to schedule() it stays in the queue, and sleeps when it gets there."""
    machine = boot()
    task = spawn(machine, "pauser", call(machine, "sys_pause"), kthread=True)
    other = spawn(machine, "other", call(machine, "both_steps"), kthread=True)
    stop_before_schedule(machine, task)
    machine.sched.full_preemption = True
    machine.hub.schedule = Explicit([("other", 1)])
    machine.run(lambda: other.running)
    assert task.preempted
    assert (task.queued, state_of(machine, task)) == (True, TASK_INTERRUPTIBLE)
    run_to_the_end(machine, other)
    machine.run(lambda: False, 10)
    assert asleep(task)
    assert state_of(machine, task) == TASK_INTERRUPTIBLE


def test_a_preempted_task_on_its_way_to_sleep_can_be_woken() -> None:
    machine = boot()
    task = spawn(machine, "pauser", call(machine, "sys_pause"))
    other = spawn(machine, "other", call(machine, "both_steps"), kthread=True)
    stop_before_schedule(machine, task)
    machine.sched.full_preemption = True
    machine.hub.schedule = Explicit([("other", 1)])
    machine.run(lambda: other.running)
    assert machine.sched.try_to_wake_up(task)
    assert state_of(machine, task) == TASK_RUNNING
    machine.run(lambda: asleep(task), 100)
    assert "return to user space" in switch_points(machine, task), "so this is not the first pause"


# Locks and the idle loop.


def test_a_task_whose_runqueue_lock_is_held_does_not_begin_to_run(smp: Machine) -> None:
    task = spawn(smp, "t", call(smp, "both_steps"))
    with smp.sched.task_rq_locked(task):
        assert smp.sched.candidates() == []
    assert smp.sched.candidates() == [task]


def switch_points(machine: Machine, task: Task) -> list[str]:
    return [
        event.note
        for event in machine.events
        if event.kind is EventKind.SWITCH_POINT and event.address == task.struct
    ]


def test_an_idle_vcpu_that_is_woken_goes_through_its_idle_loop_once(smp: Machine) -> None:
    rq = smp.sched.runqueues[1]
    smp.sched.wake_up_if_idle(rq)
    smp.sched.wake_up_if_idle(rq)
    smp.run(lambda: not rq.idle.activities, 10)
    assert switch_points(smp, rq.idle) == ["idle loop"]
    assert_consistent(smp)


def test_a_vcpu_that_works_is_not_woken_from_idling(smp: Machine) -> None:
    spawn(smp, "busy", call(smp, "crunch", FOREVER), cpu=1)
    smp.run(lambda: False, 3)
    rq = smp.sched.runqueues[1]
    assert not rq.is_idle
    smp.sched.wake_up_if_idle(rq)
    assert rq.idle.activities == []


def test_an_idle_task_that_is_pending_updates_its_patch_state_when_its_vcpu_goes_idle(smp: Machine) -> None:
    updated = []
    smp.klp_update_patch_state = updated.append
    rq = smp.sched.runqueues[1]
    task = spawn(smp, "t", call(smp, "nap", 40), cpu=1)
    smp.run(lambda: task.running)
    set_tsk_thread_flag(smp, rq.idle.struct, TIF_PATCH_PENDING)
    smp.run(lambda: False, 5)
    assert updated == [rq.idle.struct]


@pytest.mark.parametrize("seed", range(6))
def test_guest_memory_says_at_every_step_what_the_scheduler_does(seed: int) -> None:
    machine = boot(cpus=2)
    machine.hub.schedule = Checked(machine, seed)
    machine.sched.full_preemption = bool(seed % 2)
    programs: Sequence[Sequence[Any]] = (
        (call(machine, "nap", 8), step("fork"), call(machine, "nap_with_mutex", 4)),
        (call(machine, "work", 20), step("yield"), step("sleep", 8)),
        (step("user", 20), call(machine, "crunch", 20)),
        (call(machine, "deliver"), call(machine, "nap_interruptible", 12), call(machine, "await_delivery")),
    )
    tasks = [spawn(machine, f"t{index}", *ops, cpu=index % 2) for index, ops in enumerate(programs)]
    run_to_the_end(machine, *tasks)
    assert machine.slab.corruptions(machine.space) == []
