"""Who goes on next: in turns, by seed, and as written down."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import pytest
from machines import boot, call, results, run_to_the_end, spawn, step
from register_probe import boot_with_probes

from elf.errors import KlpemuError
from emu.machine import Machine
from emu.schedules import MAX_STRIDE, Explicit, RoundRobin, Seeded
from emu.task import Task
from emu.timer import JIFFY_INSTRUCTIONS

FOREVER = 1 << 40


@dataclass(frozen=True)
class Cpu:
    """As much of a vCPU as a schedule looks at."""

    number: int


def tasks_on(*cpus: int, running: Sequence[int] = ()) -> list[Task]:
    """A task for each number, t0 first; those at the indices `running` are current."""
    made: Any = [Cpu(number) for number in range(max(cpus) + 1)]
    tasks = [Task(f"t{index}", index, 0, made[cpu]) for index, cpu in enumerate(cpus)]
    for index in running:
        tasks[index].running = True
    return tasks


def picks(schedule: Any, tasks: list[Task], count: int) -> list[str]:
    return [schedule.pick(tasks, tasks[0])[0].name for _ in range(count)]


# In turns.


def test_the_vcpus_take_turns_of_a_jiffy() -> None:
    tasks = tasks_on(0, 1, 2, running=(0, 1, 2))
    schedule = RoundRobin()
    assert picks(schedule, tasks, 7) == ["t0", "t1", "t2", "t0", "t1", "t2", "t0"]
    assert schedule.pick(tasks, tasks[0])[1] == JIFFY_INSTRUCTIONS


def test_a_vcpu_without_anything_to_run_is_passed_over() -> None:
    assert picks(RoundRobin(), tasks_on(0, 3, running=(0, 1)), 4) == ["t0", "t1", "t0", "t1"]


def test_of_those_that_wait_for_one_vcpu_the_first_to_come_goes_on() -> None:
    tasks = tasks_on(0, 0, 0, 1, 1)
    assert picks(RoundRobin(), tasks, 4) == ["t0", "t3", "t0", "t3"]


def test_who_can_be_preempted_takes_turns_with_those_behind() -> None:
    schedule, (first, second, third) = RoundRobin(), tasks_on(0, 0, 0, running=(0,))
    order = []
    line = [first, second, third]
    for _ in range(7):
        picked, _ = schedule.pick(line, first)
        if picked is not line[0]:  # as the scheduler does it: to the end of the queue
            line[0].running, picked.running = False, True
            line = [picked, *(each for each in line[1:] if each is not picked), line[0]]
        order.append(picked.name)
    assert order == ["t0", "t1", "t2", "t0", "t1", "t2", "t0"]


def test_who_has_slept_and_comes_first_again_goes_on_first() -> None:
    """Only who is taken off has to let the others go first."""
    schedule, tasks = RoundRobin(), tasks_on(0, 0)
    assert picks(schedule, tasks, 1) == ["t0"]
    assert picks(schedule, tasks, 1) == ["t0"]


def test_with_full_preemption_nobody_starves_behind_one_that_computes() -> None:
    machine = boot()
    machine.hub.schedule = RoundRobin()
    machine.sched.full_preemption = True
    spawn(machine, "busy", call(machine, "crunch", FOREVER), kthread=True)
    tasks = [spawn(machine, f"t{number}", call(machine, "crunch", 500), kthread=True) for number in range(3)]
    run_to_the_end(machine, *tasks, jiffies=60)


class Counted(Sequence[Task]):
    """Counts how many of the tasks somebody looks at."""

    def __init__(self, tasks: list[Task]) -> None:
        self._tasks = tasks
        self.looked = 0

    def __len__(self) -> int:
        return len(self._tasks)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        self.looked += 1
        return self._tasks[index]


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_pick_does_not_look_at_all_of_ten_thousand(cpus: int) -> None:
    tasks = Counted(tasks_on(*(number * cpus // 10_000 for number in range(10_000))))
    schedule = RoundRobin()
    for _ in range(100):
        schedule.pick(tasks, tasks[0])
    assert tasks.looked < 100 * 20


# By seed.


def test_a_seed_says_it_all() -> None:
    tasks = tasks_on(0, 1, 2)

    def play(seed: int) -> list[tuple[Task, int | None]]:
        schedule = Seeded(seed)
        return [schedule.pick(tasks, tasks[0]) for _ in range(200)]

    assert play(1) == play(1)
    assert play(1) != play(2)


def test_any_of_the_candidates_may_be_next_for_any_number_of_instructions() -> None:
    tasks, schedule = tasks_on(0, 0, 1), Seeded(3)
    played = [schedule.pick(tasks, tasks[0]) for _ in range(20_000)]
    assert min(Counter(task.name for task, _ in played).values()) > 6000
    assert {instructions for _, instructions in played} == set(range(1, MAX_STRIDE + 1))


# As written down.


def test_a_list_is_followed_entry_by_entry_and_then_the_vcpus_take_turns() -> None:
    tasks = tasks_on(0, 1, running=(0, 1))
    schedule = Explicit([("t1", 5), ("t1", 7), ("t0", 9)])
    played = [schedule.pick(tasks, tasks[0]) for _ in range(5)]
    assert [(task.name, instructions) for task, instructions in played] == [
        *(("t1", 5), ("t1", 7), ("t0", 9)),
        *(("t0", JIFFY_INSTRUCTIONS), ("t1", JIFFY_INSTRUCTIONS)),
    ]


def test_a_number_behind_the_name_tells_tasks_of_one_name_apart() -> None:
    tasks = tasks_on(0, 1, 2)
    tasks[0].name = tasks[2].name = "twin"
    schedule = Explicit([("twin", 1), ("twin#1", 1), ("twin#2", 1), ("twin#3", 1)])
    assert [schedule.pick(tasks, tasks[0])[0] for _ in range(3)] == [tasks[0], tasks[0], tasks[2]]
    with pytest.raises(KlpemuError, match="'twin#3' cannot go on"):
        schedule.pick(tasks, tasks[0])


def test_an_entry_that_cannot_be_followed_is_named_with_those_that_could() -> None:
    tasks = tasks_on(0, 1)
    schedule = Explicit([("t0", 1), ("nobody", 1)])
    schedule.pick(tasks, tasks[0])
    with pytest.raises(KlpemuError, match=r"schedule, entry 2: 'nobody' cannot go on; these can: t0, t1"):
        schedule.pick(tasks, tasks[0])


def test_an_error_of_the_list_leaves_the_machine_usable() -> None:
    machine = boot()
    spawn(machine, "t", call(machine, "nap", 4))
    machine.hub.schedule = Explicit([("t", 1), ("nobody", 1)])
    with pytest.raises(KlpemuError, match="nobody"):
        machine.run(lambda: False, 100)
    assert machine.call(machine.symbol("area_of"), 3, 4) == 7


@pytest.mark.parametrize(("instructions", "done"), [(1, 1), (2, 2), (17, 17), (0, 1)])
def test_a_task_in_the_guest_gets_exactly_as_many_instructions(instructions: int, done: int) -> None:
    """None at all would be no step: it gets one."""
    machine = boot_with_probes()
    task = spawn(machine, "t", call(machine, "keep_registers", 1, FOREVER))
    machine.hub.schedule = Explicit([("t", 1), ("t", 1000)])
    machine.run(lambda: task.in_guest)
    again = machine.cpus[0].registers()["rip"]
    rounds = rounds_left(machine)
    while machine.cpus[0].registers()["rip"] != again or rounds_left(machine) == rounds:
        machine.hub.advance(task, 1)
    before = steps_of(machine)
    machine.hub.advance(*Explicit([("t", instructions)]).pick([task], task))
    assert steps_of(machine) - before == done


def rounds_left(machine: Machine) -> int:
    return int.from_bytes(machine.space.read(machine.cpus[0].registers()["rsp"], 8), "little")


def steps_of(machine: Machine) -> int:
    """Instructions of the loop done so far: two a round, and one more on its second one."""
    registers = machine.cpus[0].registers()
    body = machine.symbol("keep_registers_body")
    return -2 * rounds_left(machine) + (-1 if registers["rip"] > body + 1 else 0)


@pytest.mark.parametrize(("first", "second"), ["ab", "ba"])
def test_a_list_decides_who_takes_a_mutex_first(first: str, second: str) -> None:
    machine = boot(cpus=2)
    tasks = [
        spawn(machine, name, call(machine, "nap_with_mutex", 40), step("sleep", 0), cpu=number)
        for number, name in enumerate("ab")
    ]
    machine.hub.schedule = Explicit([(first, 1000)] * 12)
    machine.run(lambda: bool(machine.variable("nap_mutex").get()))
    owner = machine.by_struct[machine.variable("nap_mutex").get()]
    machine.hub.schedule = RoundRobin()
    machine.run(lambda: any(results(task) for task in tasks), 100)
    assert owner.name == first
    assert [task.name for task in tasks if not results(task)] == [second]
