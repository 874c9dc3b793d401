"""What tasks execute, seen by the basic blocks their vCPUs enter, against what they are known to call."""

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import boot, call, new_ops, registered, run_to_the_end, spawn

from emu.machine import Machine
from emu.observer import Observer
from emu.schedules import RoundRobin, Seeded
from emu.task import Task
from emu.traps import GuestFault

WATCHED = (
    "both_steps",
    "step_one",
    "step_two",
    "nap",
    "nap_below",
    "transact",
    "tail_outer",
    "tail_inner",
    "crunch",
)


class Seen:
    """An observer of some functions, and what it has told of each task."""

    def __init__(self, machine: Machine, functions: Iterable[str] = WATCHED) -> None:
        self._machine = machine
        self.calls: dict[str, list[str]] = {}
        self.observer = Observer(machine, self._executed)
        for name in functions:
            address = machine.symbol(name)
            self.observer.watch(address, machine.ftrace.ftrace_location(address) or None)

    def _executed(self, task: Task, function: int) -> None:
        self.calls.setdefault(task.name, []).append(self._name(function))

    def _name(self, function: int) -> str:
        return self._machine.kallsyms.describe(function).split("+")[0]

    def live(self, task: Task) -> list[str]:
        return [self._name(each.function) for each in self.observer.activations(task)]


@pytest.fixture
def machine() -> Machine:
    """One vCPU, tasks in order of arrival."""
    machine = boot()
    machine.hub.schedule = RoundRobin()
    return machine


def test_every_call_of_a_watched_function_is_told_once_and_in_order(machine: Machine) -> None:
    seen = Seen(machine)
    run_to_the_end(machine, spawn(machine, "t", call(machine, "transact", 4), call(machine, "both_steps")))
    assert seen.calls == {"t": ["transact", "step_one", "step_two", "both_steps", "step_one", "step_two"]}


def test_one_function_called_again_and_again_is_told_each_time(machine: Machine) -> None:
    seen = Seen(machine, ["step_one"])
    machine.call(machine.symbol("crunch"), 50)
    machine.call(machine.symbol("step_one"))
    machine.call(machine.symbol("step_one"))
    assert seen.calls == {"init": ["step_one"] * 52}


def test_a_function_that_calls_itself_is_told_each_time_and_is_live_as_often(machine: Machine) -> None:
    seen = Seen(machine)
    task = spawn(machine, "t", call(machine, "nap_below", 4, 40))
    machine.run(lambda: False, 4)
    assert seen.calls["t"] == seen.live(task) == ["nap_below"] * 5 + ["nap"]
    run_to_the_end(machine, task)
    assert seen.live(task) == []


def test_what_has_returned_is_not_live(machine: Machine) -> None:
    seen = Seen(machine)
    task = spawn(machine, "t", call(machine, "transact", 40))
    machine.run(lambda: False, 4)
    assert seen.live(task) == ["transact"]


def test_a_tail_call_takes_its_callers_place(machine: Machine) -> None:
    seen = Seen(machine, ["tail_inner", "tail_outer"])
    machine.call(machine.symbol("tail_outer"), 5)
    assert seen.calls["init"] == ["tail_outer", "tail_inner"]
    assert seen.live(machine.init_task) == []


def test_functions_that_are_not_watched_are_not_told(machine: Machine) -> None:
    seen = Seen(machine, ["step_two"])
    machine.call(machine.symbol("both_steps"))
    assert seen.calls == {"init": ["step_two"]}


def test_a_function_without_a_site_is_watched_at_its_first_instruction(machine: Machine) -> None:
    seen = Seen(machine, [])
    seen.observer.watch(machine.symbol("own_ud2"), None)
    with pytest.raises(GuestFault):
        machine.call(machine.symbol("own_ud2"))
    assert seen.calls == {"init": ["own_ud2"]}


def test_what_is_forgotten_is_not_told_any_more(machine: Machine) -> None:
    seen = Seen(machine)
    seen.observer.watch(machine.symbol("own_ud2"), None)
    seen.observer.forget(0, (1 << 64) - 1)
    machine.call(machine.symbol("both_steps"))
    with pytest.raises(GuestFault):
        machine.call(machine.symbol("own_ud2"))
    assert seen.calls == {}


# Redirected.


def redirect(machine: Machine, function: str, to: str) -> None:
    """Register an ops with which a call of one function goes on in another."""
    registered(machine, [function], func="redirect", private=machine.symbol(to), flags=1 << 12)


def test_a_redirected_call_is_told_of_the_function_that_it_goes_on_in(machine: Machine) -> None:
    seen = Seen(machine)
    machine.call(machine.symbol("both_steps"))
    redirect(machine, "step_one", "step_two")
    machine.call(machine.symbol("both_steps"))
    assert seen.calls["init"] == ["both_steps", "step_one", "step_two", "both_steps", "step_two", "step_two"]


def test_a_traced_call_goes_on_in_the_function_itself(machine: Machine) -> None:
    seen = Seen(machine)
    registered(machine, ["step_one"])
    machine.call(machine.symbol("both_steps"))
    assert seen.calls["init"] == ["both_steps", "step_one", "step_two"]


# Between tasks.


def test_each_task_is_told_apart_whoever_runs_in_between(machine: Machine) -> None:
    seen = Seen(machine)
    machine.sched.full_preemption = True
    machine.hub.schedule = Seeded(4)
    tasks = [
        spawn(machine, "a", call(machine, "crunch", 20), kthread=True),
        spawn(machine, "b", call(machine, "nap_below", 3, 4), call(machine, "tail_outer", 1), kthread=True),
    ]
    run_to_the_end(machine, *tasks)
    assert seen.calls == {
        "a": ["crunch", *["both_steps", "step_one", "step_two"] * 20],
        "b": [*["nap_below"] * 4, "nap", "tail_outer", "tail_inner"],
    }


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1 << 30), rounds=st.integers(1, 25))
def test_where_a_task_is_taken_off_changes_nothing_in_what_is_told(seed: int, rounds: int) -> None:
    machine = boot(cpus=2)
    seen = Seen(machine)
    machine.hub.schedule = Seeded(seed)
    machine.sched.full_preemption = True
    tasks = [
        spawn(
            machine,
            f"t{number}",
            call(machine, "crunch", rounds),
            call(machine, "transact", 4),
            cpu=number % 2,
        )
        for number in range(4)
    ]
    run_to_the_end(machine, *tasks)
    wanted = ["crunch", *["both_steps", "step_one", "step_two"] * rounds, "transact", "step_one", "step_two"]
    assert seen.calls == {task.name: wanted for task in tasks}


def test_guest_code_in_a_service_in_guest_code_is_live_above_it(machine: Machine) -> None:
    seen = Seen(machine)
    live = []

    def export(machine: Machine, registers: dict[str, int]) -> int:
        live.append(seen.live(machine.init_task))
        machine.hub.call_guest(machine.symbol("nap"), 4)
        live.append(seen.live(machine.init_task))
        return 0

    ops = new_ops(machine, ["step_one"], func="call_export")
    machine.ftrace.register_ftrace_function(ops)
    machine.traps.exports["test_export"] = export
    machine.call(machine.symbol("both_steps"))
    assert live == [["both_steps"], ["both_steps"]]
    assert seen.calls["init"] == ["both_steps", "nap", "step_one", "step_two"]


def test_after_a_fault_nothing_is_live_and_the_next_call_is_told(machine: Machine) -> None:
    seen = Seen(machine, ["jump_nowhere"])
    for _ in range(3):
        with pytest.raises(GuestFault):
            machine.call(machine.symbol("jump_nowhere"))
        assert seen.live(machine.init_task) == []
    assert len(seen.calls["init"]) >= 3, "the flight recorder repeats the last leg, which is told again"


def test_after_a_deadlock_nothing_is_live_and_the_next_call_is_told(machine: Machine) -> None:
    seen = Seen(machine, ["await_delivery"])
    for _ in range(2):
        with pytest.raises(Exception, match="deadlock"):
            machine.call(machine.symbol("await_delivery"))
        assert seen.live(machine.init_task) == []
    assert seen.calls["init"] == ["await_delivery"] * 2
