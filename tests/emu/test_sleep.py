"""Kernel functions that give the CPU up for a time: how long, in which state, and what they return."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interleavings import interleavings
from machines import boot, call, results, run_to_the_end, spawn, struct_of

from elf.errors import KlpemuError
from emu.machine import Machine
from emu.schedules import RoundRobin, Seeded
from emu.task import Task
from emu.thread_info import (
    TASK_INTERRUPTIBLE,
    TASK_RUNNING,
    TASK_UNINTERRUPTIBLE,
    TIF_NOTIFY_SIGNAL,
    TIF_SIGPENDING,
    clear_tsk_thread_flag,
    set_tsk_thread_flag,
)
from emu.timer import HZ

LONG_MAX = (1 << 63) - 1
UINT_MAX = 0xFFFF_FFFF


@pytest.fixture
def machine() -> Machine:
    """Two vCPUs that take turns."""
    machine = boot(cpus=2)
    machine.hub.schedule = RoundRobin()
    return machine


def timed(machine: Machine, function: str, *arguments: int) -> tuple[int, int]:
    """What a call on the host's behalf returns, and how many jiffies it takes."""
    start = machine.timers.now
    result = machine.call(machine.symbol(function), *arguments)
    return result, machine.timers.now - start


def asleep(machine: Machine, function: str, *arguments: int, kthread: bool = True) -> Task:
    """A task that is in the middle of a call."""
    task = spawn(machine, "sleeper", call(machine, function, *arguments), kthread=kthread)
    machine.run(lambda: False, 4)
    assert not task.running
    assert not task.queued
    return task


# msleep.


@settings(max_examples=40, deadline=None)
@given(msecs=st.integers(0, 100_000), seed=st.integers(0, 1000))
def test_msleep_takes_at_least_as_long_as_it_says_and_no_two_jiffies_more(msecs: int, seed: int) -> None:
    machine = boot()
    machine.hub.schedule = Seeded(seed)
    machine.timers.spend(seed * 9)
    _, jiffies = timed(machine, "msleep", msecs)
    assert msecs * HZ / 1000 <= jiffies <= -(-msecs * HZ // 1000) + 2


def test_msleep_takes_an_unsigned_int(machine: Machine) -> None:
    _, jiffies = timed(machine, "msleep", (1 << 32) + 40)
    assert 10 <= jiffies <= 12


@pytest.mark.parametrize(
    ("function", "arguments", "state"),
    [
        ("msleep", (400,), TASK_UNINTERRUPTIBLE),
        ("msleep_interruptible", (400,), TASK_INTERRUPTIBLE),
        ("schedule_timeout_interruptible", (100,), TASK_INTERRUPTIBLE),
        ("schedule_timeout_uninterruptible", (100,), TASK_UNINTERRUPTIBLE),
        ("usleep_range_state", (400_000, 500_000, TASK_UNINTERRUPTIBLE), TASK_UNINTERRUPTIBLE),
        ("usleep_range_state", (400_000, 500_000, TASK_INTERRUPTIBLE), TASK_INTERRUPTIBLE),
        ("sys_pause", (), TASK_INTERRUPTIBLE),
    ],
)
def test_each_sleeps_in_its_state(
    machine: Machine, function: str, arguments: tuple[int, ...], state: int
) -> None:
    task = asleep(machine, function, *arguments)
    assert struct_of(machine, task).__state == state
    assert struct_of(machine, task).on_rq == 0


def test_a_spurious_wake_up_does_not_shorten_msleep(machine: Machine) -> None:
    task = asleep(machine, "msleep", 400)
    for _ in range(5):
        assert machine.sched.try_to_wake_up(task)
        machine.run(lambda: False, 10)
    assert results(task) == []
    start = machine.timers.now
    machine.run(lambda: bool(results(task)))
    assert 46 <= machine.timers.now - start <= 48


@pytest.mark.parametrize("flag", [TIF_SIGPENDING, TIF_NOTIFY_SIGNAL])
def test_a_signal_ends_msleep_interruptible_and_it_says_what_was_left(machine: Machine, flag: int) -> None:
    task = asleep(machine, "msleep_interruptible", 400, kthread=False)
    machine.run(lambda: False, 46)
    set_tsk_thread_flag(machine, task.struct, flag)
    assert machine.sched.try_to_wake_up(task, TASK_INTERRUPTIBLE)
    machine.run(lambda: bool(results(task)), 10)
    assert results(task) == [(101 - 50) * 4]


def test_msleep_interruptible_that_nobody_interrupts_leaves_nothing(machine: Machine) -> None:
    result, jiffies = timed(machine, "msleep_interruptible", 400)
    assert result == 0
    assert jiffies >= 100


def test_msleep_interruptible_does_not_begin_to_sleep_with_a_signal(machine: Machine) -> None:
    set_tsk_thread_flag(machine, machine.init_task.struct, TIF_SIGPENDING)
    assert timed(machine, "msleep_interruptible", 400) == (101 * 4, 0)


def test_a_wait_that_is_negative_as_int_has_no_end(machine: Machine) -> None:
    task = asleep(machine, "msleep_interruptible", UINT_MAX)
    machine.run(lambda: False, 1_000_000)
    assert results(task) == []
    assert machine.timers.next_expiry is None
    set_tsk_thread_flag(machine, task.struct, TIF_SIGPENDING)
    machine.sched.try_to_wake_up(task)
    machine.run(lambda: bool(results(task)), 10)
    assert results(task) == [UINT_MAX - 3], (
        "jiffies_to_msecs() of a number that is far too large, as unsigned int"
    )


@pytest.mark.parametrize("usecs", [0, 1, 3999, 4000, 4001, 100_000])
def test_usleep_range_takes_as_many_jiffies_as_the_microseconds_need(machine: Machine, usecs: int) -> None:
    _, jiffies = timed(machine, "usleep_range_state", usecs, usecs + 10, TASK_UNINTERRUPTIBLE)
    assert jiffies == -(-usecs // 4000)


# schedule_timeout.


@pytest.mark.parametrize("jiffies", [1, 2, 100])
@pytest.mark.parametrize("kind", ["interruptible", "uninterruptible"])
def test_a_timeout_that_passes_leaves_nothing(machine: Machine, kind: str, jiffies: int) -> None:
    assert timed(machine, f"schedule_timeout_{kind}", jiffies) == (0, jiffies)


def test_a_timeout_of_nothing_ends_with_the_next_jiffy(machine: Machine) -> None:
    assert timed(machine, "schedule_timeout_uninterruptible", 0) == (0, 1)


def test_a_wake_up_ends_a_timeout_and_it_says_what_was_left(machine: Machine) -> None:
    task = asleep(machine, "schedule_timeout_uninterruptible", 100)
    machine.run(lambda: False, 30)
    machine.sched.try_to_wake_up(task)
    machine.run(lambda: bool(results(task)), 5)
    assert results(task) == [66]
    assert machine.timers.next_expiry is None, "its timer is gone with it"


def test_in_task_running_a_timeout_is_an_offer_and_all_of_it_is_left(machine: Machine) -> None:
    assert timed(machine, "schedule_timeout", 100) == (100, 0)


def test_without_a_limit_it_sleeps_until_it_is_woken(machine: Machine) -> None:
    task = asleep(machine, "schedule_timeout_uninterruptible", LONG_MAX)
    machine.run(lambda: False, 1_000_000)
    assert results(task) == []
    machine.sched.try_to_wake_up(task)
    machine.run(lambda: bool(results(task)), 5)
    assert results(task) == [LONG_MAX]


@pytest.mark.parametrize(
    "function",
    ["schedule_timeout", "schedule_timeout_interruptible", "schedule_timeout_uninterruptible"],
)
def test_a_negative_timeout_is_complained_of_and_not_slept(machine: Machine, function: str) -> None:
    """printk("schedule_timeout: wrong timeout value %lx"), and the state is TASK_RUNNING again."""
    assert timed(machine, function, (1 << 64) - 5) == (0, 0)
    assert machine.log.lines == ["schedule_timeout: wrong timeout value fffffffffffffffb"]
    assert timed(machine, "schedule", 0) == (0, 0)


def test_a_task_that_is_abandoned_in_a_timeout_leaves_no_timer(machine: Machine) -> None:
    call_ = machine.hub.call(machine.init_task, machine.symbol("nap"), (4000,))
    machine.run(lambda: False, 10)
    assert not call_.finished
    machine.hub.abandon(machine.init_task)
    assert machine.timers.next_expiry is None
    assert machine.call(machine.symbol("area_of"), 3, 4) == 7


def test_a_deadlock_without_a_limit_is_reported(machine: Machine) -> None:
    with pytest.raises(KlpemuError, match="deadlock: init waits for schedule_timeout_uninterruptible"):
        machine.call(machine.symbol("schedule_timeout_uninterruptible"), LONG_MAX)


# Offering the CPU.


def test_cond_resched_says_whether_anybody_else_ran(machine: Machine) -> None:
    assert machine.call(machine.symbol("__cond_resched")) == 0
    task = spawn(machine, "asks", call(machine, "__cond_resched"), kthread=True)
    other = spawn(machine, "other", call(machine, "both_steps"), kthread=True)
    run_to_the_end(machine, task, other)
    assert results(task) == [1]


def test_cond_resched_does_not_sleep_whatever_the_state(machine: Machine) -> None:
    """It is SM_PREEMPT: between set_current_state() and schedule() it only lets others run."""
    task = spawn(machine, "asks", kthread=True)
    other = spawn(machine, "other", call(machine, "both_steps"), kthread=True)

    def body() -> int:
        struct_of(machine, task).__state = TASK_UNINTERRUPTIBLE
        machine.hub.call_guest(machine.symbol("__cond_resched"))
        state = struct_of(machine, task).__state
        struct_of(machine, task).__state = TASK_RUNNING
        return int(state)

    service = machine.hub.serve(task, "asks", body)
    run_to_the_end(machine, other, jiffies=20)
    machine.run(lambda: service.finished, 20)
    assert service.result == TASK_UNINTERRUPTIBLE


# Waking.


def test_wake_up_process_says_whether_the_task_slept(machine: Machine) -> None:
    task = asleep(machine, "msleep", 400)
    wake = machine.symbol("wake_up_process")
    assert machine.call(wake, task.struct) == 1
    machine.run(lambda: False, 5)
    assert machine.call(wake, machine.init_task.struct) == 0, "it is the one that asks"


def wake_once_asleep(machine: Machine, task: Task) -> None:
    """The kernel's recipe: the condition first, then the wake-up."""
    machine.space.write(machine.symbol("div_errors"), b"\x01")
    machine.hub.door("between the condition and the wake-up")
    machine.sched.try_to_wake_up(task)


def test_a_wake_up_between_state_and_schedule_is_never_lost() -> None:
    """set_current_state(); if (!condition) schedule(): under every order of the doors."""
    machine = boot(cpus=2)
    first, second = machine.tasks[:2]
    condition = machine.symbol("div_errors")
    slept = 0
    for schedule in interleavings(2):
        machine.hub.schedule = schedule
        machine.space.write(condition, b"\x00")

        def wait() -> int:
            times = 0
            while True:
                machine.view("task_struct", first.struct).__state = TASK_UNINTERRUPTIBLE
                machine.hub.door("the state is set")
                if machine.shared.read(condition, 1) == b"\x01":
                    break
                machine.hub.door("the condition was not there yet")
                machine.sched.schedule("the condition")
                times += 1
            machine.view("task_struct", first.struct).__state = TASK_RUNNING
            return times

        waiter = machine.hub.serve(first, "waits", wait)
        waker = machine.hub.serve(second, "wakes", lambda: wake_once_asleep(machine, first))
        slept += machine.hub.finish(first, waiter)
        machine.hub.finish(second, waker)
    assert slept


@pytest.mark.parametrize("function", ["sys_pause", "nap_interruptible"])
def test_a_fake_signal_is_never_lost(function: str) -> None:
    """The flag first, then the wake-up; on the way to sleep at any instruction."""
    machine = boot(cpus=2)
    first, second = machine.tasks[:2]
    outcomes = set()
    for schedule in interleavings(1, instructions=1):
        machine.hub.schedule = schedule
        clear_tsk_thread_flag(machine, first.struct, TIF_NOTIFY_SIGNAL)

        def send() -> None:
            set_tsk_thread_flag(machine, first.struct, TIF_NOTIFY_SIGNAL)
            machine.sched.try_to_wake_up(first, TASK_INTERRUPTIBLE)

        sleeper = machine.hub.call(first, machine.symbol(function), (1 << 30,))
        sender = machine.hub.serve(second, "signals", send)
        now = machine.timers.now
        machine.hub.finish(first, sleeper)
        machine.hub.finish(second, sender)
        outcomes.add(machine.timers.now - now < 100)
    assert outcomes == {True}
