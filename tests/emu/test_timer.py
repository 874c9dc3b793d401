"""Virtual time: timers in order, jiffies in guest memory, rounding as kernel/time/timer.c does it."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import boot, call, run_to_the_end, spawn, step

from elf.errors import KlpemuError
from emu.machine import Machine
from emu.schedules import RoundRobin
from emu.timer import HZ, JIFFY_INSTRUCTIONS, MAX_SCHEDULE_TIMEOUT, msecs_to_jiffies

INITIAL_JIFFIES = (1 << 32) - 300 * 250  # include/linux/jiffies.h: unsigned int, five minutes before it wraps


def jiffies(machine: Machine) -> int:
    return int.from_bytes(machine.space.read(machine.symbol("jiffies"), 8), "little")


def test_what_was_executed_and_what_was_slept_through_is_virtual_time(machine: Machine) -> None:
    timers = machine.timers
    before = timers.executed
    timers.spend(JIFFY_INSTRUCTIONS + 7)
    timers.advance_to(timers.now + 2)
    assert timers.executed - before == 3 * JIFFY_INSTRUCTIONS + 7


# Timers.


def test_timers_fire_in_the_order_of_their_time_and_then_of_being_armed(machine: Machine) -> None:
    timers, fired = machine.timers, []
    delays = [5, 1, 3, 1, 5, 2]
    for number, delay in enumerate(delays):
        timers.add_timer(delay, lambda number=number: fired.append((timers.now, number)), "t")
    timers.advance_to(5)
    assert fired == sorted((delay, number) for number, delay in enumerate(delays))


def test_each_timer_sees_its_own_time_in_guest_memory(machine: Machine) -> None:
    seen = []
    for delay in (3, 7, 7, 1000):
        machine.timers.add_timer(delay, lambda: seen.append(jiffies(machine) - INITIAL_JIFFIES), "t")
    machine.timers.advance_to(2000)
    assert seen == [3, 7, 7, 1000]
    assert jiffies(machine) == machine.timers.jiffies == INITIAL_JIFFIES + 2000


def test_a_timer_fires_once(machine: Machine) -> None:
    fired = []
    timer = machine.timers.add_timer(3, lambda: fired.append(1), "t")
    machine.timers.advance_to(100)
    machine.timers.advance_to(200)
    assert fired == [1]
    assert not timer.pending


def test_a_timer_that_was_disarmed_does_not_fire_and_is_not_waited_for(machine: Machine) -> None:
    timers = machine.timers
    first = timers.add_timer(3, lambda: pytest.fail("it was disarmed"), "t")
    timers.add_timer(8, lambda: None, "t")
    timers.del_timer(first)
    assert timers.next_expiry == 8
    timers.advance_to(5)
    timers.del_timer(first)


def test_a_timer_for_now_fires_at_the_next_jiffy(machine: Machine) -> None:
    for delay in (0, -5):
        assert machine.timers.add_timer(delay, lambda: None, "t").expires == machine.timers.now + 1


def test_a_timer_can_be_armed_by_a_timer(machine: Machine) -> None:
    timers, fired = machine.timers, []

    def again() -> None:
        fired.append(timers.now)
        timers.add_timer(10, again, "t")

    timers.add_timer(10, again, "t")
    timers.advance_to(35)
    assert fired == [10, 20, 30]
    assert timers.next_expiry == 40


def test_without_timers_there_is_no_next_one(machine: Machine) -> None:
    assert machine.timers.next_expiry is None


def test_time_does_not_go_backwards(machine: Machine) -> None:
    machine.timers.advance_to(5)
    with pytest.raises(KlpemuError, match="backwards"):
        machine.timers.advance_to(4)


def test_the_low_half_of_jiffies_overflows_after_five_minutes(machine: Machine) -> None:
    machine.timers.advance_to(300 * HZ)
    assert jiffies(machine) == 1 << 32
    assert machine.timers.seconds == 300


# What makes time go by.


def test_instructions_make_time_go_by_and_none_is_forgotten(machine: Machine) -> None:
    spent, source = 0, random.Random(1)
    for _ in range(200):
        instructions = source.randint(0, JIFFY_INSTRUCTIONS // 3)
        spent += instructions
        machine.timers.spend(instructions)
        assert machine.timers.now == spent // JIFFY_INSTRUCTIONS


def test_many_instructions_at_once_are_many_jiffies(machine: Machine) -> None:
    fired = []
    machine.timers.add_timer(4, lambda: fired.append(machine.timers.now), "t")
    machine.timers.spend(10 * JIFFY_INSTRUCTIONS)
    assert (machine.timers.now, fired) == (10, [4])


def test_when_all_are_asleep_time_goes_to_the_next_timer_without_a_step() -> None:
    machine = boot(cpus=2)
    machine.hub.schedule = RoundRobin()
    task = spawn(machine, "t", call(machine, "nap", 1_000_000))
    machine.run(lambda: False, 10)
    steps = machine.events.total
    run_to_the_end(machine, task, jiffies=300_000)
    assert machine.timers.now >= 250_000
    assert machine.events.total - steps < 40


def test_a_time_that_was_asked_for_is_reached_with_and_without_anything_to_do(machine: Machine) -> None:
    machine.run(lambda: False, 123)
    assert machine.timers.now == 123
    machine.hub.schedule = RoundRobin()
    spawn(machine, "t", step("sleep", 10), repeat=None)
    machine.run(lambda: False, 100)
    assert machine.timers.now == 223


# Conversions.


@given(msecs=st.integers(0, (1 << 31) - 1))
def test_milliseconds_become_the_fewest_jiffies_that_are_as_long(msecs: int) -> None:
    """include/linux/jiffies.h, _msecs_to_jiffies() where HZ divides 1000."""
    per_jiffy = 1000 // HZ
    assert msecs_to_jiffies(msecs) == (msecs + per_jiffy - 1) // per_jiffy
    assert (msecs_to_jiffies(msecs) - 1) * per_jiffy < msecs <= msecs_to_jiffies(msecs) * per_jiffy


@pytest.mark.parametrize("msecs", [1 << 31, (1 << 32) - 1])
def test_milliseconds_that_are_negative_as_int_have_no_end(msecs: int) -> None:
    assert msecs_to_jiffies(msecs) == MAX_SCHEDULE_TIMEOUT


def round_jiffies_common(absolute: int, now: int) -> int:
    """The kernel's, for CPU 0 and without force_up, in 64-bit arithmetic."""
    original, rem = absolute, absolute % 250
    absolute = absolute - rem if rem < 250 // 4 else absolute - rem + 250
    is_after = (now - absolute) & (1 << 64) - 1 >= 1 << 63  # time_is_after_jiffies(): (long)(jiffies - j) < 0
    return absolute if is_after else original


MACHINE = boot()


@given(passed=st.integers(0, 5000), delay=st.integers(0, 100_000))
def test_a_delay_is_rounded_as_the_kernel_rounds_it(passed: int, delay: int) -> None:
    MACHINE.timers.advance_to(MACHINE.timers.now + passed)
    now = jiffies(MACHINE)
    wanted = round_jiffies_common(now + delay, now) - now
    assert MACHINE.timers.round_jiffies_relative(delay) == wanted


@pytest.mark.parametrize("delay", [0, 1, 61, 62])
def test_a_delay_is_not_rounded_to_now_or_before(delay: int) -> None:
    """On a second, the nearest second is this one."""
    MACHINE.timers.advance_to(MACHINE.timers.now + HZ - jiffies(MACHINE) % HZ)
    assert MACHINE.timers.round_jiffies_relative(delay) == (delay if delay < 62 else HZ)


@pytest.mark.parametrize("phase", [0, 1, 30, 61, 62, 63, 124, 125, 126, 187, 188, 249])
def test_a_delay_of_a_second_ends_on_a_second(phase: int) -> None:
    """What a transition's retries rely on."""
    now = MACHINE.timers.now
    MACHINE.timers.advance_to(now + 250 + (phase - jiffies(MACHINE)) % 250)
    assert jiffies(MACHINE) % HZ == phase
    delay = MACHINE.timers.round_jiffies_relative(HZ)
    assert (jiffies(MACHINE) + delay) % HZ == 0
    assert delay == (HZ - phase if phase < 62 else 2 * HZ - phase)
