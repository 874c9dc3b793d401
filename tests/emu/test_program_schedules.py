"""Any programs, any schedule: the results are those of a model that knows no schedule."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import (
    Checked,
    assert_consistent,
    boot,
    call,
    results,
    spawn,
    step,
)

from emu.events import EventKind
from emu.hub import Schedule
from emu.machine import Machine
from emu.program import Operation
from emu.schedules import RoundRobin, Seeded
from emu.task import Task


@pytest.fixture
def machine() -> Machine:
    """One vCPU, tasks in order of arrival."""
    machine = boot()
    machine.hub.schedule = RoundRobin()
    return machine


# Whatever the schedule.


@dataclass
class Script:
    """Programs, and what their calls must return."""

    programs: list[list[tuple[Any, ...]]]
    wanted: list[list[int]] = field(default_factory=list)


def model(operation: tuple[Any, ...]) -> list[int]:
    """What a call returns when nobody else is there."""
    name, *arguments = operation
    match name:
        case "sleep" | "user" | "yield" | "fork":
            return []
        case "nap_below":
            return [arguments[0] + 1]
        case "crunch" | "work":
            return [0x11 * arguments[0]]
        case "both_steps" | "transact":
            return [0x11]
        case "nap_interruptible":
            return [0]
        case "area_of":
            return [arguments[0] + arguments[1]]
    assert name in ("nap", "nap_with_mutex", "await_delivery")
    return [1]


MSECS = st.integers(0, 30)
OPERATIONS = st.one_of(
    st.tuples(st.sampled_from(["nap", "nap_with_mutex", "transact", "nap_interruptible"]), MSECS),
    st.tuples(st.just("nap_below"), st.integers(0, 12), MSECS),
    st.tuples(st.sampled_from(["crunch", "work"]), st.integers(0, 30)),
    st.tuples(st.just("area_of"), st.integers(0, 99), st.integers(0, 99)),
    st.tuples(st.sampled_from(["sleep", "user"]), MSECS),
    st.sampled_from([("yield",), ("fork",), ("both_steps",), ("await_delivery",)]),
)
PROGRAMS = st.lists(st.lists(OPERATIONS, min_size=1, max_size=5), min_size=1, max_size=5)


def operation_of(machine: Machine, operation: tuple[Any, ...]) -> Operation:
    name, *arguments = operation
    if name in ("sleep", "user", "yield", "fork"):
        return step(name, *arguments)
    return call(machine, name, *arguments)


def wanted_of(program: Sequence[tuple[Any, ...]]) -> Counter[tuple[int, ...]]:
    """The results of a task and of all its children: a child has only those behind its fork."""
    found = Counter([tuple(value for each in program for value in model(each))])
    for number, (name, *_) in enumerate(program):
        if name == "fork":
            found += wanted_of(program[number + 1 :])
    return found


def deliveries(program: Sequence[tuple[Any, ...]]) -> int:
    """How often a task and its children wait for a delivery."""
    behind = range(len(program))
    own = sum(name == "await_delivery" for name, *_ in program)
    return own + sum(deliveries(program[at + 1 :]) for at in behind if program[at][0] == "fork")


def play(
    programs: Sequence[Sequence[tuple[Any, ...]]], cpus: int, schedule: Any, preemption: bool
) -> tuple[Machine, Counter[tuple[int, ...]]]:
    """Run the programs to their end; the results of every task that there has been."""
    machine = boot(cpus=cpus)
    machine.hub.schedule = schedule(machine)
    machine.sched.full_preemption = preemption
    before = list(machine.tasks)
    for number, program in enumerate(programs):
        operations = [operation_of(machine, each) for each in program]
        spawn(machine, f"t{number}", *operations, cpu=number % cpus, kthread=False)
    awaited = sum(deliveries(program) for program in programs)
    if awaited:
        spawn(machine, "deliverer", call(machine, "deliver"), step("sleep", 1), repeat=awaited)
    seen: dict[Task, None] = {}

    def all_gone() -> bool:
        seen.update(dict.fromkeys(machine.tasks))
        return machine.tasks == before and len(machine.by_struct) == len(before) + cpus

    assert machine.run(all_gone, 100_000)
    played = [task for task in seen if task not in before and task.name != "deliverer"]
    return machine, Counter(tuple(results(task)) for task in played)


def assert_clean(machine: Machine, tasks: int) -> None:
    """Nothing of the tasks is left."""
    assert_consistent(machine)
    assert machine.slab.corruptions(machine.space) == []
    assert [tag for _, tag in machine.slab.live.values()].count("task_struct t0") == 0
    assert len(machine.by_struct) == len(machine.tasks) + len(machine.cpus)
    assert len(machine.stacks._free) >= tasks
    assert machine.timers.next_expiry is None
    for lock in ("tasklist_lock", "nap_mutex"):
        assert machine.variable(lock).get() == 0
    assert all(rq.curr is rq.idle or rq.curr in machine.tasks for rq in machine.sched.runqueues)
    for symbol in ("nap_mutex", "delivery"):
        kind, member = ("mutex", "wait_list") if symbol == "nap_mutex" else ("completion", "wait.task_list")
        head = machine.symbol(symbol) + machine.layouts.offsetof(kind, member)
        assert machine.layouts.view("list_head", machine.space, head).next == head
    assert machine.layouts.view("completion", machine.space, machine.symbol("delivery")).done == 0


@settings(max_examples=40, deadline=None)
@given(programs=PROGRAMS, cpus=st.integers(1, 4), seed=st.integers(0, 1 << 30), preemption=st.booleans())
def test_whatever_the_schedule_results_are_those_of_one_at_a_time(
    programs: list[list[tuple[Any, ...]]], cpus: int, seed: int, preemption: bool
) -> None:
    wanted: Counter[tuple[int, ...]] = sum((wanted_of(each) for each in programs), Counter())
    machine, found = play(programs, cpus, lambda machine: Checked(machine, seed), preemption)
    assert found == wanted
    assert_clean(machine, len(programs))


@settings(max_examples=15, deadline=None)
@given(programs=PROGRAMS, cpus=st.integers(1, 3), preemption=st.booleans())
def test_in_turns_results_are_those_of_one_at_a_time(
    programs: list[list[tuple[Any, ...]]], cpus: int, preemption: bool
) -> None:
    wanted: Counter[tuple[int, ...]] = sum((wanted_of(each) for each in programs), Counter())
    machine, found = play(programs, cpus, lambda machine: RoundRobin(), preemption)
    assert found == wanted
    assert_clean(machine, len(programs))


BUSY: list[list[tuple[Any, ...]]] = [
    [("nap", 8), ("fork",), ("nap_with_mutex", 4)],
    [("work", 20), ("await_delivery",), ("crunch", 15)],
    [("nap_with_mutex", 3), ("user", 9), ("transact", 5)],
    [("fork",), ("nap_with_mutex", 2), ("yield",), ("nap_below", 7, 6)],
]


def trace(schedule: Schedule) -> tuple[Any, ...]:
    machine, found = play(BUSY, 2, lambda machine: schedule, preemption=True)
    switches = [event.note for event in machine.events if event.kind is EventKind.SWITCH]
    memory = machine.space.snapshot()._pages
    return list(machine.events), memory, machine.timers.now, found, machine.log.lines, switches


@pytest.mark.parametrize("seed", [0, 7, 1 << 40])
def test_the_same_seed_gives_the_same_events_and_the_same_bytes(seed: int) -> None:
    assert trace(Seeded(seed)) == trace(Seeded(seed))


def test_two_seeds_give_other_events_and_the_same_results() -> None:
    first, second = trace(Seeded(1)), trace(Seeded(2))
    assert first[-1] != second[-1]
    assert first[3] == second[3]
