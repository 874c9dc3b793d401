"""Work for later: in order, once, in its time, by a kernel thread like any other."""

import pytest
from machines import boot, call, spawn, struct_of

from elf.errors import KlpemuError
from emu.machine import Machine
from emu.schedules import RoundRobin, Seeded
from emu.task import Task
from emu.thread_info import PF_KTHREAD, PF_WQ_WORKER


@pytest.fixture
def machine() -> Machine:
    """Two vCPUs that take turns."""
    machine = boot(cpus=2)
    machine.hub.schedule = RoundRobin()
    return machine


def kworker(machine: Machine) -> Task:
    (task,) = (task for task in machine.tasks if task.name.startswith("kworker"))
    return task


def until_empty(machine: Machine) -> None:
    assert machine.run(lambda: machine.workqueue.is_empty, 100)


def test_the_kworker_is_a_kernel_thread_on_the_task_list(machine: Machine) -> None:
    struct = struct_of(machine, kworker(machine))
    assert struct.comm.rstrip(b"\0") == b"kworker/0:1"
    assert struct.flags & (PF_KTHREAD | PF_WQ_WORKER) == PF_KTHREAD | PF_WQ_WORKER
    assert struct.thread_info.cpu == 0


def test_work_is_done_in_order_and_by_the_kworker(machine: Machine) -> None:
    done = []
    for number in range(4):
        machine.workqueue.schedule_work(
            f"w{number}", lambda number=number: done.append((number, machine.hub.current))
        )
    assert not machine.workqueue.is_empty
    assert done == []
    until_empty(machine)
    assert done == [(number, kworker(machine)) for number in range(4)]


def test_works_of_one_name_are_all_done(machine: Machine) -> None:
    """Two patches are freed by two works, which have one function."""
    done = []
    for number in range(2):
        machine.workqueue.schedule_work("free_work", lambda number=number: done.append(number))
    until_empty(machine)
    assert done == [0, 1]


def test_work_can_be_scheduled_by_work(machine: Machine) -> None:
    done = []
    machine.workqueue.schedule_work(
        "outer", lambda: machine.workqueue.schedule_work("inner", lambda: done.append("inner"))
    )
    until_empty(machine)
    assert done == ["inner"]


def test_work_that_sleeps_holds_up_the_work_behind_it(machine: Machine) -> None:
    done = []

    def sleeps() -> None:
        machine.hub.call_guest(machine.symbol("nap"), 40)
        done.append(machine.timers.now)

    machine.workqueue.schedule_work("sleeps", sleeps)
    machine.run(lambda: False, 5)
    assert not machine.workqueue.is_empty, "it is being done"
    machine.workqueue.schedule_work("behind", lambda: done.append("behind"))
    assert not machine.workqueue.is_empty
    until_empty(machine)
    assert done[0] >= 10
    assert done[1:] == ["behind"]


def test_scheduling_work_takes_no_time_from_who_schedules_it(machine: Machine) -> None:
    done = []

    def body() -> list[int]:
        machine.workqueue.schedule_work("w", lambda: done.append(1))
        return list(done)

    assert machine.service("schedules", body) == []
    until_empty(machine)
    assert done == [1]


# Delayed.


@pytest.mark.parametrize("delay", [1, 7, 250])
def test_delayed_work_is_done_in_its_time_and_not_before(machine: Machine, delay: int) -> None:
    done = []
    machine.timers.advance_to(20)
    assert machine.workqueue.schedule_delayed_work("w", lambda: done.append(machine.timers.now), delay)
    assert machine.workqueue.is_empty, "it does not count yet"
    assert machine.workqueue.delayed("w")
    machine.run(lambda: False, delay + 5)
    assert done == [20 + delay]
    assert not machine.workqueue.delayed("w")


def test_delayed_works_are_done_in_the_order_of_their_times(machine: Machine) -> None:
    done = []
    for delay in (9, 3, 6):
        machine.workqueue.schedule_delayed_work(f"w{delay}", lambda delay=delay: done.append(delay), delay)
    machine.run(lambda: False, 20)
    assert done == [3, 6, 9]


def test_delayed_work_that_is_pending_is_not_scheduled_twice(machine: Machine) -> None:
    done = []
    assert machine.workqueue.schedule_delayed_work("w", lambda: done.append("first"), 5)
    assert not machine.workqueue.schedule_delayed_work("w", lambda: done.append("second"), 3)
    assert machine.workqueue.schedule_delayed_work("v", lambda: done.append("other"), 9)
    machine.run(lambda: False, 50)
    assert done == ["first", "other"]


def test_it_is_pending_until_the_kworker_begins_with_it(machine: Machine) -> None:
    """WORK_STRUCT_PENDING is cleared by set_work_pool_and_clear_pending(), when a worker takes it up."""
    done = []
    machine.workqueue.schedule_work("long", lambda: machine.hub.call_guest(machine.symbol("nap"), 80))
    machine.workqueue.schedule_delayed_work("w", lambda: done.append(machine.timers.now), 5)
    machine.run(lambda: False, 10)
    assert done == []
    assert not machine.workqueue.schedule_delayed_work("w", lambda: done.append(-1), 1)
    machine.run(lambda: False, 50)
    assert len(done) == 1


def test_delayed_work_can_schedule_itself_again(machine: Machine) -> None:
    done = []

    def again() -> None:
        done.append(machine.timers.now)
        assert machine.workqueue.schedule_delayed_work("w", again, 10)

    machine.workqueue.schedule_delayed_work("w", again, 10)
    machine.run(lambda: False, 45)
    assert done == [10, 20, 30, 40]


@pytest.mark.parametrize("seed", range(5))
def test_whatever_the_schedule_each_work_is_done_once_and_in_order(seed: int) -> None:
    machine = boot(cpus=3)
    machine.hub.schedule = Seeded(seed)
    machine.sched.full_preemption = True
    done: list[int] = []
    for number in range(3):
        spawn(machine, f"t{number}", call(machine, "crunch", 50), cpu=number)

    def body(first: int) -> None:
        for number in range(first, first + 5):
            machine.hub.door("between")
            machine.workqueue.schedule_work("w", lambda number=number: done.append(number))

    services = [
        machine.hub.serve(task, "s", lambda at=at: body(10 * at)) for at, task in enumerate(machine.tasks[:3])
    ]
    machine.run(lambda: all(service.finished for service in services) and machine.workqueue.is_empty, 1000)
    assert sorted(done) == [10 * at + number for at in range(3) for number in range(5)]
    for at in range(3):
        assert [each % 10 for each in done if each // 10 == at] == list(range(5))


# Failing.


def test_work_that_fails_is_reported_and_the_rest_is_done(machine: Machine) -> None:
    done = []

    def fails() -> None:
        raise KlpemuError("the work failed")

    machine.workqueue.schedule_work("fails", fails)
    machine.workqueue.schedule_work("behind", lambda: done.append(1))
    with pytest.raises(KlpemuError, match="the work failed"):
        machine.run(lambda: machine.workqueue.is_empty, 100)
    until_empty(machine)
    assert done == [1]
    machine.workqueue.schedule_work("later", lambda: done.append(2))
    until_empty(machine)
    assert done == [1, 2]


def test_delayed_work_that_fails_can_be_scheduled_again(machine: Machine) -> None:
    def fails() -> None:
        raise KlpemuError("the work failed")

    machine.workqueue.schedule_delayed_work("w", fails, 5)
    with pytest.raises(KlpemuError, match="the work failed"):
        machine.run(lambda: False, 20)
    assert machine.workqueue.schedule_delayed_work("w", lambda: None, 5)
