"""Guest code's own work: pending once, run by a kworker on its own stack, waited for, cancelled."""

from typing import Any

import pytest
from machines import boot

from emu.machine import Machine
from emu.schedules import RoundRobin
from emu.sleep import sleep_msecs
from emu.thread_info import TASK_UNINTERRUPTIBLE
from emu.view import list_for_each_entry
from emu.work_struct import WORK_STRUCT_NO_POOL, WORK_STRUCT_PENDING

CPU_UNBOUND = 8192


class Works:
    """Works whose function is `call_export`: `done` has what `act` was called for, by whom and when."""

    def __init__(self) -> None:
        self.machine = boot()
        self.machine.hub.schedule = RoundRobin()
        self.machine.traps.exports["test_export"] = self._export
        self.done: list[tuple[int, str, int]] = []
        self.sleeps: dict[int, int] = {}  # how many milliseconds the work at an address sleeps
        self.again: set[int] = set()  # who queues itself again

    def _export(self, machine: Machine, registers: dict[str, int]) -> int:
        work = registers["rdi"]
        self.done.append((work, machine.hub.current.name, machine.timers.now))
        if work in self.sleeps:
            sleep_msecs(machine, self.sleeps[work], TASK_UNINTERRUPTIBLE, "sleeps")
        if work in self.again:
            machine.traps.exports["queue_work_on"](machine, {"rdi": 0, "rsi": 0, "rdx": work})
        return 0

    def new(self, *, delayed: bool = False) -> int:
        machine = self.machine
        address = machine.slab.kzalloc(machine.layouts.sizeof("delayed_work"), "work")
        work = self.view(address)
        work.data.counter = WORK_STRUCT_NO_POOL
        work.entry.next = work.entry.prev = work.entry.address_
        work.func = machine.symbol("call_export")
        if delayed:
            timer = address + machine.layouts.offsetof("delayed_work", "timer")
            self.call("init_timer_key", timer, machine.symbol("delayed_work_timer_fn"), 0, 0, 0)
        return address

    def view(self, address: int) -> Any:
        return self.machine.view("work_struct", address)

    def pending(self, address: int) -> bool:
        return bool(self.view(address).data.counter & WORK_STRUCT_PENDING)

    def call(self, name: str, *arguments: int) -> int:
        return self.machine.call(self.machine.symbol(name), *arguments) & 0xFF

    def queue_all(self, *addresses: int) -> list[int]:
        """Queue works before anybody can begin with the first."""
        queue_work_on = self.machine.traps.exports["queue_work_on"]

        def queue() -> list[int]:
            answers = [queue_work_on(self.machine, {"rdi": 0, "rsi": 0, "rdx": work}) for work in addresses]
            assert self.waiting() == [*dict.fromkeys(addresses)]
            assert all(map(self.pending, addresses))
            return [answer or 0 for answer in answers]

        answers: list[int] = self.machine.service("queue", queue)
        return answers

    def queue(self, address: int, delay: int | None = None) -> int:
        wq = self.machine.variable("system_wq").get()
        if delay is None:
            return self.call("queue_work_on", CPU_UNBOUND, wq, address)
        return self.call("queue_delayed_work_on", CPU_UNBOUND, wq, address, delay)

    def run(self, jiffies: int = 50) -> None:
        self.machine.run(lambda: False, jiffies)

    def waiting(self) -> list[int]:
        head = self.machine.list_head("worklist")
        return [each.address_ for each in list_for_each_entry(head, "work_struct", "entry")]


@pytest.fixture
def works() -> Works:
    return Works()


def blocked(works: Works) -> int:
    """A work that the only kworker sleeps in, so that others can be seen to wait for their turn."""
    first = works.new()
    works.sleeps[first] = 100
    works.queue(first)
    works.run(2)
    return first


def test_a_kworker_runs_the_function_with_the_work_as_its_argument(works: Works) -> None:
    work = works.new()
    assert works.queue(work) == 1
    works.run()
    assert [(address, name) for address, name, _ in works.done] == [(work, "kworker/0:1")]
    assert not works.pending(work)
    assert works.waiting() == []


def test_a_work_is_pending_once_until_its_function_begins(works: Works) -> None:
    work = works.new()
    assert works.queue_all(work, work) == [1, 0]
    works.run()
    assert len(works.done) == 1
    assert works.queue(work) == 1, "it can be queued again"


def test_another_kworker_goes_on_while_the_first_sleeps(works: Works) -> None:
    first, second = blocked(works), works.new()
    works.queue(second)
    works.run(5)
    assert [(address, name) for address, name, _ in works.done] == [
        (first, "kworker/0:1"),
        (second, "kworker/0:2"),
    ]


def test_an_idle_kworker_goes_on_when_the_one_that_runs_falls_asleep(works: Works) -> None:
    first, second = works.new(), works.new()
    works.sleeps[first] = 100
    works.queue_all(first, second)
    works.run(5)
    assert [(address, name) for address, name, _ in works.done] == [
        (first, "kworker/0:1"),
        (second, "kworker/0:2"),
    ]


def test_one_kworker_does_what_does_not_sleep_though_others_are_idle(works: Works) -> None:
    blocked(works)
    works.run(60)
    more = [works.new() for _ in range(4)]
    works.queue_all(*more)
    works.run(5)
    assert [(address, name) for address, name, _ in works.done[1:]] == [
        (each, "kworker/0:1") for each in more
    ]


def test_two_kworkers_never_run_one_work_at_the_same_time(works: Works) -> None:
    first = blocked(works)
    assert works.queue(first) == 1, "it is running, not pending"
    works.run(5)
    assert len(works.done) == 1
    works.run(60)
    begun = [now for _, _, now in works.done]
    assert len(begun) == 2
    assert begun[1] - begun[0] >= 25


def test_flush_waits_for_the_work_and_says_whether_it_had_to(works: Works) -> None:
    first = blocked(works)
    begun = works.done[0][2]
    assert works.call("flush_work", first) == 1
    assert works.machine.timers.now - begun >= 25
    assert works.call("flush_work", first) == 0


def test_the_kernels_own_work_does_not_wait_for_one_that_sleeps(works: Works) -> None:
    blocked(works)
    done: list[int] = []
    works.machine.workqueue.schedule_work("own", lambda: done.append(works.machine.timers.now))
    assert not works.machine.workqueue.is_empty
    works.machine.run(lambda: works.machine.workqueue.is_empty)
    assert done
    assert works.machine.workqueue.executions(), "guest code's may take for ever"


def test_delayed_work_begins_after_its_time(works: Works) -> None:
    work = works.new(delayed=True)
    start = works.machine.timers.now
    assert works.queue(work, 10) == 1
    assert works.queue(work, 5) == 0
    assert works.pending(work)
    timer = works.machine.view("delayed_work", work).timer
    assert timer.entry.pprev == works.machine.symbol("timer_vectors")
    works.run(8)
    assert works.done == []
    works.run(10)
    assert [now - start >= 10 for _, _, now in works.done] == [True]
    assert timer.entry.pprev == 0


def test_without_a_delay_no_timer_is_needed(works: Works) -> None:
    work = works.new(delayed=True)
    works.queue(work, 0)
    assert not works.machine.guest_timers.armed
    works.run(2)
    assert len(works.done) == 1


@pytest.mark.parametrize("cancel", ["cancel_delayed_work", "cancel_delayed_work_sync"])
def test_delayed_work_that_is_cancelled_in_time_is_not_done(works: Works, cancel: str) -> None:
    work = works.new(delayed=True)
    works.queue(work, 10)
    assert works.call(cancel, work) == 1
    assert works.call(cancel, work) == 0
    assert not works.pending(work)
    works.run()
    assert works.done == []
    assert works.queue(work, 1) == 1


def test_cancelling_takes_a_work_off_the_list(works: Works) -> None:
    first = blocked(works)
    works.queue(first)  # waits behind itself
    assert works.waiting() == [first]
    assert works.call("cancel_work", first) == 1
    assert works.waiting() == []
    works.run()
    assert len(works.done) == 1


def test_cancel_sync_waits_and_keeps_a_work_from_queueing_itself(works: Works) -> None:
    first = blocked(works)
    works.again.add(first)
    begun = works.done[0][2]
    assert works.call("cancel_work_sync", first) == 0
    assert works.machine.timers.now - begun >= 25
    works.run()
    assert len(works.done) == 1
    assert not works.pending(first)


def test_plain_cancel_lets_a_running_work_queue_itself(works: Works) -> None:
    first = blocked(works)
    works.again.add(first)
    assert works.call("cancel_work", first) == 0
    works.run(40)
    assert len(works.done) == 2


def test_mod_delayed_work_moves_the_time(works: Works) -> None:
    work = works.new(delayed=True)
    wq = works.machine.variable("system_wq").get()
    start = works.machine.timers.now
    assert works.call("mod_delayed_work_on", CPU_UNBOUND, wq, work, 40) == 0
    assert works.call("mod_delayed_work_on", CPU_UNBOUND, wq, work, 5) == 1
    works.run(20)
    assert [now - start < 20 for _, _, now in works.done] == [True]


def test_flush_delayed_work_does_it_now(works: Works) -> None:
    work = works.new(delayed=True)
    works.queue(work, 5000)
    assert works.call("flush_delayed_work", work) == 1
    assert len(works.done) == 1
    assert works.machine.timers.now < 5000


def test_a_workqueue_is_flushed_before_it_goes(works: Works) -> None:
    work = works.new()
    works.sleeps[work] = 100
    wq = works.machine.call(works.machine.symbol("alloc_workqueue"), 0, 0, 0)
    works.call("queue_work_on", CPU_UNBOUND, wq, work)
    works.call("destroy_workqueue", wq)
    assert works.machine.workqueue.executions() == []
    assert wq not in works.machine.slab.live
