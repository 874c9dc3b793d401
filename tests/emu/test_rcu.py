"""Grace periods and syncs: what another vCPU may be in the middle of, and what it has to do first."""

from collections.abc import Callable

import pytest
from machines import boot, call, is_gone, run_to_the_end, spawn, step

from emu.events import EventKind
from emu.machine import Machine
from emu.memory import read_u32
from emu.rwlock import write_locked
from emu.schedules import RoundRobin, Seeded
from emu.task import GuestCall, Program, Service, Task

FOREVER = 1 << 40
INTERRUPTS = ("text_poke_sync", "ftrace_sync_ipi")
CPUS = ("synchronize_rcu_tasks_rude", "klp_synchronize_transition", "synchronize_rcu")
TASKS = ("synchronize_rcu_tasks",)


@pytest.fixture
def machine() -> Machine:
    """Two vCPUs, and every service stops at its doors."""
    machine = boot(cpus=2)
    machine.hub.schedule = Seeded(0)
    return machine


def advance_until(machine: Machine, task: Task, holds: Callable[[], bool]) -> Task:
    """Only this task goes on, one step or instruction after the other."""
    for _ in range(2000):
        if holds():
            return task
        machine.hub.advance(task, 1)
    raise AssertionError("it never came to this")


# What the other vCPU is in the middle of.


def idles(machine: Machine) -> None:
    assert machine.sched.runqueues[1].is_idle


def executes_guest_code(machine: Machine) -> Task:
    task = spawn(machine, "other", call(machine, "crunch", FOREVER), cpu=1, kthread=True)
    return advance_until(machine, task, lambda: task.in_guest)


def could_be_preempted(machine: Machine) -> None:
    machine.sched.full_preemption = True
    executes_guest_code(machine)


def has_preemption_off(machine: Machine) -> None:
    could_be_preempted(machine)
    at = machine.cpus[1].gs_base + machine.vmlinux.symbols["__preempt_count"]
    machine.space.write(at, (read_u32(machine.space, at) + 1).to_bytes(4, "little"))


def is_in_an_int3(machine: Machine) -> None:
    machine.sched.full_preemption = True
    machine.traps.breakpoint_handlers.append(lambda registers, push: True)
    task = spawn(machine, "other", call(machine, "own_int3"), cpu=1, kthread=True)
    advance_until(machine, task, lambda: isinstance(task.top, GuestCall) and task.top.breakpoint is not None)


def is_in_a_service(machine: Machine) -> None:
    def body() -> None:
        for _ in range(1000):
            machine.hub.door("here")

    task = machine.tasks[1]
    machine.hub.serve(task, "service", body)
    for _ in range(3):
        machine.hub.advance(task)
    assert task.running


def spins_for_a_lock(machine: Machine) -> None:
    def body() -> None:
        with write_locked(machine, "tasklist_lock"):
            pass

    machine.space.write(machine.symbol("tasklist_lock"), b"\xff")
    task = machine.tasks[1]
    machine.hub.serve(task, "service", body)
    advance_until(machine, task, lambda: isinstance(task.top, Service) and task.top.spins)


def sleeps(machine: Machine) -> None:
    task = spawn(machine, "other", call(machine, "nap", 4000), cpu=1, kthread=True)
    advance_until(machine, task, lambda: task.in_guest and not task.running)


def is_in_user_space(machine: Machine) -> None:
    task = spawn(machine, "other", step("user", 4000), cpu=1)
    advance_until(machine, task, lambda: isinstance(task.top, Service) and task.top.in_user_space)
    assert task.running


def is_between_two_system_calls(machine: Machine) -> None:
    task = spawn(machine, "other", call(machine, "both_steps"), cpu=1, repeat=None)
    advance_until(machine, task, lambda: task.in_guest)
    advance_until(machine, task, lambda: isinstance(task.top, Program) and task.quiescent)
    assert task.running


def is_on_its_way_to_user_space(machine: Machine) -> None:
    task = spawn(machine, "other", call(machine, "both_steps"), cpu=1, repeat=None)
    advance_until(machine, task, lambda: task.in_guest)
    advance_until(machine, task, lambda: isinstance(task.top, Program))
    assert not task.quiescent


def is_a_kthread_between_two_calls(machine: Machine) -> None:
    task = spawn(machine, "other", call(machine, "both_steps"), cpu=1, kthread=True, repeat=None)
    advance_until(machine, task, lambda: task.in_guest)
    advance_until(machine, task, lambda: isinstance(task.top, Program))
    assert task.running


def has_one_preempted_and_is_in_user_space(machine: Machine) -> Task:
    machine.sched.full_preemption = True
    task = executes_guest_code(machine)
    is_in_user_space(machine)
    assert task.preempted
    return task


def waits_in_the_queue_of_an_idle_vcpu(machine: Machine) -> Task:
    return spawn(machine, "other", call(machine, "nap", 4), cpu=1, kthread=True)


#                                        interrupts, schedules, all tasks have slept
HOLDS = {
    idles: (True, True, True),
    executes_guest_code: (True, False, False),
    could_be_preempted: (True, True, False),
    has_preemption_off: (True, False, False),
    is_in_an_int3: (False, False, False),
    is_in_a_service: (True, False, False),
    spins_for_a_lock: (True, False, False),
    sleeps: (True, True, True),
    is_in_user_space: (True, True, True),
    is_between_two_system_calls: (True, True, True),
    is_on_its_way_to_user_space: (True, False, False),
    is_a_kthread_between_two_calls: (True, False, False),
    has_one_preempted_and_is_in_user_space: (True, True, False),
    waits_in_the_queue_of_an_idle_vcpu: (True, True, False),
}


def begin(machine: Machine, what: str) -> Service:
    """The first task waits; nobody else has gone on yet."""
    first = machine.init_task
    service = machine.hub.serve(first, what, lambda: machine.synchronize(what))
    for _ in range(6):
        if not service.finished and first in machine.sched.candidates():
            machine.hub.advance(first)
    return service


@pytest.mark.parametrize(
    ("what", "column"),
    [(what, column) for column, names in enumerate((INTERRUPTS, CPUS, TASKS)) for what in names],
)
@pytest.mark.parametrize("other", HOLDS, ids=lambda other: other.__name__)
def test_a_wait_is_over_at_once_only_where_nobody_is_in_the_middle(
    machine: Machine, other: Callable[[Machine], object], what: str, column: int
) -> None:
    other(machine)
    assert begin(machine, what).finished == HOLDS[other][column]


def test_the_end_of_a_wait_is_an_event(machine: Machine) -> None:
    begin(machine, "synchronize_rcu")
    assert [event.note for event in machine.events if event.kind is EventKind.SYNC] == ["synchronize_rcu"]


def test_a_sync_of_interrupts_keeps_its_vcpu_and_a_grace_period_does_not(machine: Machine) -> None:
    is_in_an_int3(machine)
    for what, spins in (("text_poke_sync", True), ("synchronize_rcu_tasks", False)):
        service = begin(machine, what)
        assert not service.finished
        assert service.spins == spins
        assert machine.init_task.running == spins
        machine.hub.abandon(machine.init_task)


def test_a_wait_ends_when_the_int3_is_dealt_with(machine: Machine) -> None:
    is_in_an_int3(machine)
    service = begin(machine, "text_poke_sync")
    machine.hub.advance(machine.sched.runqueues[1].curr)
    machine.run(lambda: service.finished, 10)
    assert service.finished


def goes_to_sleep(machine: Machine, what: str) -> Service:
    task = spawn(machine, "other", call(machine, "nap", 4000), cpu=1, kthread=True)
    advance_until(machine, task, lambda: task.in_guest)
    service = begin(machine, what)
    assert not service.finished
    advance_until(machine, task, lambda: not task.running)
    return service


@pytest.mark.parametrize("what", [*CPUS, *TASKS])
def test_a_grace_period_ends_when_the_other_goes_to_sleep(machine: Machine, what: str) -> None:
    service = goes_to_sleep(machine, what)
    machine.run(lambda: service.finished, 3)
    assert service.finished


@pytest.mark.parametrize("what", [*CPUS, *TASKS])
def test_a_sleep_in_the_meantime_counts_even_if_it_is_over_again(machine: Machine, what: str) -> None:
    """Nobody has looked while the task slept, and when somebody does it executes kernel code as before."""
    task = spawn(machine, "other", call(machine, "nap", 4000), cpu=1, kthread=True)
    between = spawn(machine, "between", call(machine, "nap", 4000), cpu=1, kthread=True)
    advance_until(machine, task, lambda: task.in_guest)
    service = begin(machine, what)
    assert not service.finished
    advance_until(machine, task, lambda: not task.running)
    advance_until(machine, between, lambda: between.in_guest and not between.running)
    machine.sched.try_to_wake_up(task)
    machine.hub.advance(task, 1)
    assert task.running
    assert not task.quiescent
    first = machine.init_task
    assert first in machine.sched.candidates()
    machine.hub.advance(first)
    assert service.finished


@pytest.mark.parametrize("what", [*CPUS, *TASKS])
def test_a_grace_period_ends_when_the_other_reaches_user_space(machine: Machine, what: str) -> None:
    task = spawn(machine, "other", call(machine, "both_steps"), step("user", 4000), cpu=1)
    advance_until(machine, task, lambda: task.in_guest)
    service = begin(machine, what)
    assert not service.finished
    advance_until(machine, task, lambda: task.quiescent)
    assert task.running, "it has not slept, nor has its vCPU switched"
    machine.hub.advance(machine.init_task)
    assert service.finished


@pytest.mark.parametrize("what", [*CPUS, *TASKS])
def test_not_all_have_to_be_out_of_the_way_at_one_moment(what: str) -> None:
    machine = boot(cpus=3)
    machine.hub.schedule = Seeded(0)
    one, two = (
        spawn(machine, f"t{cpu}", call(machine, "both_steps"), cpu=cpu, repeat=None) for cpu in (1, 2)
    )
    for task in (one, two):
        advance_until(machine, task, lambda task=task: task.in_guest)
    service = begin(machine, what)
    advance_until(machine, one, lambda: one.quiescent)
    assert machine.init_task not in machine.sched.candidates()
    advance_until(machine, one, lambda: one.in_guest)
    advance_until(machine, two, lambda: two.quiescent)
    assert not one.quiescent
    assert machine.init_task in machine.sched.candidates()
    machine.hub.advance(machine.init_task)
    assert service.finished


def test_being_taken_off_is_enough_for_the_vcpu_and_not_for_the_task(machine: Machine) -> None:
    """The difference between rude and not: who was preempted in a trampoline is there still."""
    machine.sched.full_preemption = True
    task = executes_guest_code(machine)
    at = machine.cpus[1].gs_base + machine.vmlinux.symbols["__preempt_count"]
    count = read_u32(machine.space, at)
    machine.space.write(at, (count + 1).to_bytes(4, "little"))
    rude, waits = machine.init_task, spawn(machine, "waits", kthread=True)
    machine.run(lambda: is_gone(machine, waits), 10)
    service = machine.hub.serve(rude, "rude", lambda: machine.synchronize("synchronize_rcu_tasks_rude"))
    advance_until(machine, rude, lambda: not rude.running)
    machine.space.write(at, count.to_bytes(4, "little"))
    other = spawn(machine, "behind", call(machine, "both_steps"), cpu=1, kthread=True)
    machine.hub.advance(other, 1)
    assert task.preempted
    assert rude in machine.sched.candidates()
    machine.hub.finish(rude, service)
    tasks = begin(machine, "synchronize_rcu_tasks")
    run_to_the_end(machine, other)
    machine.run(lambda: False, 20)
    assert not tasks.finished, "the preempted one has not slept"


def test_a_task_that_exits_in_the_meantime_is_not_waited_for(machine: Machine) -> None:
    task = spawn(machine, "other", call(machine, "both_steps"), cpu=1, kthread=True)
    advance_until(machine, task, lambda: task.in_guest)
    service = begin(machine, "synchronize_rcu_tasks")
    assert not service.finished
    advance_until(machine, task, lambda: is_gone(machine, task))
    machine.run(lambda: service.finished, 3)
    assert service.finished


def test_a_task_that_begins_after_the_wait_did_is_not_waited_for(machine: Machine) -> None:
    task = executes_guest_code(machine)
    service = begin(machine, "synchronize_rcu_tasks")
    other = spawn(machine, "later", call(machine, "crunch", FOREVER), cpu=1, kthread=True)
    machine.sched.full_preemption = True
    machine.hub.advance(other, 1)
    machine.hub.advance(other, 1)
    assert other.in_guest
    machine.hub.abandon(task)
    machine.run(lambda: service.finished, 5)
    assert service.finished


@pytest.mark.parametrize("what", [*INTERRUPTS, *CPUS, *TASKS])
def test_with_nobody_in_the_way_nobody_gives_the_vcpu_up(what: str) -> None:
    machine = boot()
    machine.service("first", lambda: None)
    machine.service("waits", lambda: machine.synchronize(what))
    assert [event.note for event in machine.events if event.kind is EventKind.SWITCH] == ["swapper/0 -> init"]


def test_two_that_wait_do_not_wait_for_each_other() -> None:
    machine = boot(cpus=3)
    machine.hub.schedule = RoundRobin()
    for what in (*CPUS, *TASKS):
        services = [
            machine.hub.serve(task, what, lambda what=what: machine.synchronize(what))
            for task in machine.tasks[:3]
        ]
        for task, service in zip(machine.tasks[:3], services, strict=True):
            machine.hub.finish(task, service)


@pytest.mark.parametrize("what", [*INTERRUPTS, *CPUS, *TASKS])
@pytest.mark.parametrize("seed", range(3))
def test_among_tasks_that_sleep_now_and_then_every_wait_ends(what: str, seed: int) -> None:
    machine = boot(cpus=3)
    machine.hub.schedule = Seeded(seed)
    machine.sched.full_preemption = bool(seed % 2)
    for number in range(6):
        nap = call(machine, "nap", number)
        spawn(
            machine,
            f"t{number}",
            call(machine, "crunch", 40),
            nap,
            cpu=number % 3,
            repeat=None,
            kthread=number < 3,
        )
    machine.run(lambda: False, 5)
    before = machine.timers.now
    machine.service("waits", lambda: machine.synchronize(what))
    assert machine.timers.now - before < 100


@pytest.mark.parametrize("what", CPUS)
def test_a_vcpu_that_only_offers_itself_has_scheduled(what: str) -> None:
    """cond_resched() in a long loop: the work that was queued on this vCPU runs there."""
    machine = boot(cpus=2)
    machine.hub.schedule = RoundRobin()
    spawn(machine, "busy", call(machine, "work", FOREVER), cpu=1, kthread=True)
    machine.run(lambda: False, 5)
    machine.service("waits", lambda: machine.synchronize(what))
    assert machine.timers.now < 20
