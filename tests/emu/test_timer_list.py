"""Timers in guest memory: linked while they are armed, their functions run in ksoftirqd."""

from typing import Any

import pytest
from machines import boot

from elf.errors import KlpemuError
from emu.machine import Machine
from emu.sleep import sleep_msecs
from emu.thread_info import TASK_UNINTERRUPTIBLE

MASK = (1 << 64) - 1


class Armed:
    """A timer whose function notes when it ran, and in which task."""

    def __init__(self) -> None:
        self.machine = machine = boot()
        self.fired: list[tuple[int, int, str]] = []
        self.sleeps = 0
        machine.traps.exports["test_export"] = self._export
        self.timer = self.new()

    def new(self) -> Any:
        machine = self.machine
        timer = machine.view("timer_list", machine.slab.kmalloc(40, "timer"))
        self.call("init_timer_key", timer.address_, machine.symbol("call_export"), 0, 0, 0)
        return timer

    def _export(self, machine: Machine, registers: dict[str, int]) -> int:
        self.fired.append((registers["rdi"], machine.timers.now, machine.hub.current.name))
        if self.sleeps:
            sleep_msecs(machine, self.sleeps, TASK_UNINTERRUPTIBLE, "sleeps")
        return 0

    def call(self, name: str, *arguments: int) -> int:
        return self.machine.call(self.machine.symbol(name), *arguments)

    def mod(self, delay: int) -> int:
        return self.call("mod_timer", self.timer.address_, self.machine.timers.jiffies + delay & MASK)

    def run(self, jiffies: int) -> None:
        self.machine.run(lambda: False, jiffies)


@pytest.fixture
def armed() -> Armed:
    return Armed()


def test_a_new_timer_is_not_pending(armed: Armed) -> None:
    assert armed.timer.entry.pprev == 0
    assert armed.call("del_timer", armed.timer.address_) == 0


def test_the_function_runs_in_ksoftirqd_when_the_time_has_come(armed: Armed) -> None:
    start = armed.machine.timers.now
    assert armed.mod(20) == 0
    assert armed.timer.entry.pprev == armed.machine.symbol("timer_vectors")
    armed.run(15)
    assert armed.fired == []
    armed.run(10)
    assert armed.fired == [(armed.timer.address_, start + 20, "ksoftirqd/0")]
    assert armed.timer.entry.pprev == 0


def test_a_time_that_is_past_is_the_next_jiffy(armed: Armed) -> None:
    start = armed.machine.timers.now
    armed.mod(-7)
    armed.run(5)
    assert [now for _, now, _ in armed.fired] == [start + 1]


def test_mod_timer_moves_the_time(armed: Armed) -> None:
    start = armed.machine.timers.now
    armed.mod(5)
    assert armed.mod(30) == 1
    armed.run(60)
    assert [now for _, now, _ in armed.fired] == [start + 30]


def test_a_timer_that_is_deleted_in_time_does_not_fire(armed: Armed) -> None:
    armed.mod(5)
    assert armed.call("del_timer", armed.timer.address_) == 1
    assert armed.timer.entry.pprev == 0
    armed.run(20)
    assert armed.fired == []


def test_del_timer_sync_waits_for_the_function(armed: Armed) -> None:
    armed.sleeps = 100
    armed.mod(1)
    armed.run(4)
    begun = armed.fired[0][1]
    assert armed.call("del_timer_sync", armed.timer.address_) == 0
    assert armed.machine.timers.now - begun >= 25


def test_armed_timers_are_a_list_in_guest_memory(armed: Armed) -> None:
    others = [armed.new() for _ in range(3)]
    for timer in others:
        timer.expires = armed.machine.timers.jiffies + 5 & MASK
        armed.call("add_timer", timer.address_)
    armed.call("del_timer", others[1].address_)
    at, found = armed.machine.variable("timer_vectors").get(), []
    while at:
        found.append(at)
        at = armed.machine.view("hlist_node", at).next
    assert found == [others[2].address_, others[0].address_]


def test_arming_a_pending_timer_is_an_error(armed: Armed) -> None:
    armed.mod(50)
    with pytest.raises(KlpemuError, match="add_timer of a pending timer"):
        armed.call("add_timer", armed.timer.address_)
