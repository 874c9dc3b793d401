"""The hub: services and guest code in each other, at doors, in deadlock, and after errors."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from machines import Steps, boot, new_ops, registered

from elf.errors import KlpemuError
from emu.cpu import REGISTERS
from emu.errno import KernelErrno
from emu.hub import Hub, RunToCompletion
from emu.machine import Machine
from emu.memory import MemoryFault
from emu.mutex import mutex_held
from emu.traps import GuestFault


def export(machine: Machine, answer: Callable[[dict[str, int]], int | None]) -> None:
    """What `test_export` does."""
    machine.traps.exports["test_export"] = lambda machine, registers: answer(registers)


def assert_clean(machine: Machine) -> None:
    assert all(task.activities == [] for task in machine.tasks)
    assert not machine.hub.in_service
    assert machine.call(machine.symbol("area_of"), 3, 4) == 7
    assert machine.service("works", lambda: "still") == "still"


def test_a_service_gives_back_what_it_returns(machine: Machine) -> None:
    assert machine.service("answer", lambda: (1, "two")) == (1, "two")
    assert machine.service("nothing", lambda: None) is None


def test_a_service_runs_on_behalf_of_a_task_and_nothing_else_does(machine: Machine) -> None:
    assert machine.service("who", lambda: machine.hub.current) is machine.init_task
    with pytest.raises(KlpemuError, match="on behalf of a task"):
        _ = machine.hub.current


def test_an_export_gets_the_registers_of_its_caller_and_answers_in_rax(machine: Machine) -> None:
    seen = {}
    export(machine, lambda registers: seen.update(registers) or 41)
    assert machine.call(machine.symbol("call_export"), 5, 6) == 42
    assert (seen["rdi"], seen["rsi"]) == (5, 6)


def test_a_service_calls_guest_code_on_its_tasks_own_stack(machine: Machine) -> None:
    task = machine.init_task
    inside = []

    def look(registers: dict[str, int]) -> int:
        inside.append(registers["rsp"])
        return 10

    export(machine, look)
    assert machine.service("up", lambda: machine.hub.call_guest(machine.symbol("call_export"))) == 11
    assert task.stack_top - 256 < inside[0] < task.stack_top


def test_guest_export_guest_nests_below_each_other_and_registers_come_back(machine: Machine) -> None:
    stacks = []

    def deeper(registers: dict[str, int]) -> int:
        stacks.append(registers["rsp"])
        if len(stacks) < 5:
            return machine.hub.call_guest(machine.symbol("call_export"))
        return machine.hub.call_guest(machine.symbol("area_of"), 3, 4)

    export(machine, deeper)
    assert machine.call(machine.symbol("call_export")) == 7 + 5
    assert stacks == sorted(stacks, reverse=True)
    assert len(set(stacks)) == 5
    assert_clean(machine)


def test_a_call_up_from_an_export_changes_no_register_of_the_guest_below_but_rax(machine: Machine) -> None:
    """The C ABI would allow more; but what is below must not notice that guest code ran in between."""
    cpu = machine.cpus[0]
    found = []

    def up(registers: dict[str, int]) -> int:
        found.append(dict(registers))
        machine.hub.call_guest(machine.symbol("clobber"))
        found.append(cpu.registers())
        return 0

    export(machine, up)
    values = {
        name: 0x7000 + number for number, name in enumerate(REGISTERS) if name not in ("rsp", "rip", "eflags")
    }
    machine.hub.finish(
        machine.init_task, machine.hub.call(machine.init_task, machine.symbol("call_export"), (), **values)
    )
    assert found[0] == found[1]
    assert found[0] == found[0] | values


def test_only_a_service_can_call_up(machine: Machine) -> None:
    with pytest.raises(KlpemuError, match="only a service"):
        machine.hub.call_guest(machine.symbol("area_of"), 1, 2)


def test_a_service_cannot_drive_the_hub(machine: Machine) -> None:
    with pytest.raises(KlpemuError, match="does not drive the hub"):
        machine.service("nested", lambda: machine.call(machine.symbol("area_of"), 1, 2))
    assert_clean(machine)


# Errors.


@pytest.mark.parametrize("error", [KernelErrno(22, "no"), ValueError("a bug of ours"), KeyboardInterrupt()])
def test_an_error_in_a_service_passes_up_and_leaves_the_hub_clean(
    machine: Machine, error: BaseException
) -> None:
    def fail(*_: Any) -> int:
        raise error

    with pytest.raises(type(error)):
        machine.service("fails", fail)
    assert_clean(machine)
    export(machine, fail)
    with pytest.raises(type(error)):
        machine.call(machine.symbol("call_export"))
    assert_clean(machine)


def test_a_fault_below_a_service_comes_up_as_an_exception_it_can_handle(machine: Machine) -> None:
    def careful() -> str:
        try:
            machine.hub.call_guest(machine.symbol("jump_nowhere"))
        except GuestFault:
            return "handled"
        return "missed"

    assert machine.service("careful", careful) == "handled"
    assert_clean(machine)


def test_an_error_goes_through_every_level_and_each_service_cleans_up(machine: Machine) -> None:
    left = []

    def middle(_: dict[str, int]) -> int:
        try:
            return machine.hub.call_guest(machine.symbol("store_to"), machine.symbol("area_of"), 1)
        finally:
            left.append("middle")

    export(machine, middle)

    def outer() -> int:
        try:
            return machine.hub.call_guest(machine.symbol("call_export"))
        finally:
            left.append("outer")

    with pytest.raises(GuestFault, match="write to read-only"):
        machine.service("outer", outer)
    assert left == ["middle", "outer"]
    assert_clean(machine)


def test_a_service_that_is_abandoned_releases_its_mutex() -> None:
    machine = boot(cpus=2)
    first, second = machine.tasks[:2]
    machine.hub.schedule = Steps([(0, None)] * 3)

    def holder() -> None:
        with mutex_held(machine, "klp_mutex"):
            machine.hub.wait(lambda: False, "what never comes")

    def fails() -> None:
        machine.hub.door("here")
        raise ValueError("a bug of ours")

    machine.hub.serve(first, "holder", holder)
    while machine.variable("klp_mutex").get() == 0:
        machine.hub.advance(first)
    machine.hub.abandon(first)
    assert machine.variable("klp_mutex").get() == 0
    with pytest.raises(ValueError, match="bug"):
        machine.hub.finish(second, machine.hub.serve(second, "fails", fails))
    machine.hub.schedule = RunToCompletion()
    assert_clean(machine)


def test_an_error_of_another_task_leaves_that_one_clean_too() -> None:
    machine = boot(cpus=2)
    first, second = machine.tasks[:2]

    def fails() -> None:
        raise ValueError("a bug of ours")

    machine.hub.schedule = Steps([(1, None)])
    machine.hub.serve(second, "fails", fails)
    with pytest.raises(ValueError, match="bug"):
        machine.hub.finish(first, machine.hub.serve(first, "innocent", lambda: 1))
    machine.hub.schedule = RunToCompletion()
    assert_clean(machine)


def test_a_task_whose_stack_is_not_there_is_left_clean_too() -> None:
    machine = boot(cpus=2)
    first, second = machine.tasks[:2]
    base, second.stack_base = second.stack_base, 0x1000
    machine.hub.schedule = Steps([(1, None)])
    machine.hub.call(second, machine.symbol("area_of"), (1, 2))
    with pytest.raises(MemoryFault):
        machine.hub.finish(first, machine.hub.serve(first, "innocent", lambda: 1))
    second.stack_base = base
    machine.hub.schedule = RunToCompletion()
    assert_clean(machine)


def test_abandoning_twice_or_before_the_first_step_is_harmless(machine: Machine) -> None:
    machine.hub.serve(machine.init_task, "never started", lambda: 1 / 0)
    machine.hub.abandon(machine.init_task)
    machine.hub.abandon(machine.init_task)
    assert_clean(machine)


# Waiting.


def test_waiting_for_what_nobody_will_do_is_reported_as_a_deadlock(machine: Machine) -> None:
    with pytest.raises(KlpemuError, match="deadlock: init waits for the end of time"):
        machine.service("waits", lambda: machine.hub.wait(lambda: False, "the end of time"))
    assert_clean(machine)


def test_a_task_that_takes_a_mutex_twice_is_a_deadlock(machine: Machine) -> None:
    def twice() -> None:
        with mutex_held(machine, "klp_mutex"), mutex_held(machine, "klp_mutex"):
            pass

    with pytest.raises(KlpemuError, match="deadlock: init waits for klp_mutex"):
        machine.service("twice", twice)
    assert machine.variable("klp_mutex").get() == 0


@pytest.mark.parametrize("pattern", range(64))
def test_two_tasks_are_never_both_inside_a_mutex(pattern: int) -> None:
    machine = boot(cpus=2)
    first, second = machine.tasks[:2]
    machine.hub.schedule = Steps([(pattern >> bit & 1, None) for bit in range(6)] * 4)
    inside: list[str] = []
    most = []

    def body(name: str) -> None:
        with mutex_held(machine, "klp_mutex"):
            inside.append(name)
            most.append(len(inside))
            machine.hub.door("inside")
            inside.remove(name)

    other = machine.hub.serve(second, "second", lambda: body("second"))
    machine.hub.finish(first, machine.hub.serve(first, "first", lambda: body("first")))
    machine.hub.finish(second, other)
    assert most == [1, 1]
    assert machine.variable("klp_mutex").get() == 0


def test_two_tasks_that_both_wait_for_a_grace_period_do_not_wait_for_each_other() -> None:
    machine = boot(cpus=2)
    first, second = machine.tasks[:2]
    machine.hub.schedule = Steps([(0, None), (1, None)] * 10)
    other = machine.hub.serve(second, "second", lambda: machine.synchronize("synchronize_rcu_tasks_rude"))
    machine.hub.finish(
        first, machine.hub.serve(first, "first", lambda: machine.synchronize("synchronize_rcu_tasks_rude"))
    )
    machine.hub.finish(second, other)


def test_a_grace_period_waits_for_the_guest_call_of_another_vcpu() -> None:
    machine = boot(cpus=2)
    first, second = machine.tasks[:2]
    flag = machine.slab.kzalloc(8, "flag")
    call = machine.hub.call(second, machine.symbol("spin_until"), (flag,))
    service = machine.hub.serve(first, "grace", lambda: machine.synchronize("synchronize_rcu_tasks"))
    machine.hub.schedule = Steps([(0, None), (1, 50)] * 5)
    for _ in range(4):
        machine.hub.advance(second, 50)
        machine.hub.advance(first) if first.runnable else None
    assert not service.finished
    machine.space.write(flag, b"\x01")
    machine.hub.finish(first, service)
    assert call.finished


# Determinism.


def events_of(steps: Sequence[tuple[int, int | None]]) -> list[Any]:
    machine = boot(cpus=2)
    first, second = machine.tasks[:2]
    ops = new_ops(machine, ["area_of"], func="redirect", private=machine.symbol("tail_inner"))
    registered(machine, ["measure"])
    machine.hub.schedule = Steps(steps)
    call = machine.hub.call(second, machine.symbol("measure"), (3, 4))
    machine.hub.finish(
        first, machine.hub.serve(first, "register", lambda: machine.ftrace.register_ftrace_function(ops))
    )
    machine.hub.finish(second, call)
    return [*machine.events, machine.space.snapshot()._pages, tuple(machine.log.lines), call.result]


@pytest.mark.parametrize("doors", [1, 40, 90])
def test_the_same_schedule_gives_the_same_events_the_same_memory_and_the_same_log(doors: int) -> None:
    steps: list[tuple[int, int | None]] = [(0, None)] * doors + [(1, 7), (0, None), (1, 3)] * 20
    assert events_of(list(steps)) == events_of(list(steps))


@pytest.mark.parametrize("doors", [1, 40, 90])
def test_deciding_at_the_door_or_behind_it_comes_to_the_same(
    doors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[int, int | None]] = [(0, None)] * doors + [(1, 7), (0, None), (0, None), (1, 3)] * 20
    keeps, kept = Hub._keeps_its_turn, list[bool]()
    monkeypatch.setattr(Hub, "_keeps_its_turn", lambda hub: kept.append(keeps(hub)) or kept[-1])
    at_the_door = events_of(list(steps))
    assert set(kept) == {True, False}
    monkeypatch.setattr(Hub, "_keeps_its_turn", lambda hub: False)
    assert events_of(list(steps)) == at_the_door


@pytest.mark.parametrize("deadline", [False, True])
def test_the_hub_stops_at_the_door_where_the_condition_holds(machine: Machine, deadline: bool) -> None:
    task, passed = machine.init_task, list[int]()
    machine.hub.schedule = Steps([(0, None)] * 20)

    def doors() -> None:
        for number in range(10):
            passed.append(number)
            machine.hub.door("test")

    service, now = machine.hub.serve(task, "doors", doors), machine.hub.timers.now
    if deadline:
        machine.hub.run(lambda: False, task, deadline=now)
        assert passed == []
        machine.hub.run(lambda: len(passed) > 3, task, deadline=now + 1)
    else:
        machine.hub.run(lambda: len(passed) > 3, task)
    assert passed == [0, 1, 2, 3]
    machine.hub.finish(task, service)
    assert passed == [*range(10)]


def test_another_schedule_gives_other_events() -> None:
    """Otherwise the test above could not fail."""
    first = events_of([(0, None)] * 250)
    assert any(first != events_of([(0, None)] * doors + [(1, None)] * 4) for doors in (60, 120, 180, 240))
