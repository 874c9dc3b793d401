"""The three uses of Documentation/livepatch/shadow-vars.rst, on stations as net/mac80211 had them.

1d147bfa6429 ("mac80211: fix AP powersave TX vs. wakeup race") (in v3.14) added a spinlock to struct sta_info;
the livepatches here bring it as a shadow variable.
"""

from collections.abc import Sequence

import pytest
from click.testing import CliRunner
from shadow_table import HEADER, variables

from emu.hub import RunToCompletion
from emu.task import Task
from klpemu import Func, Kernel, Patch
from klpemu.cli import main

PS_LOCK, HAS_TAIL = 1, 2
TX_QUEUED = 2
PATIENCE = 100  # turns, in which the other one gets through if nothing holds it up
ALLOC = Func("sta_info_alloc", "new_sta_info_alloc")
FREE = Func("sta_info_free", "new_sta_info_free")
TX = Func("ieee80211_tx_h_unicast_ps_buf", "new_tx_h_unicast_ps_buf")
WAKEUP = Func("ieee80211_sta_ps_deliver_wakeup", "new_sta_ps_deliver_wakeup")

LOCK = Patch("fix_sta_lock", {"sta_info": [ALLOC, FREE, TX, WAKEUP]}, code="builtin:fix_sta_lock.o")
INFLIGHT = Patch("fix_sta_inflight", {"sta_info": [FREE, TX, WAKEUP]}, code="builtin:fix_sta_inflight.o")
FLAG = Patch("fix_sta_flag", {"sta_info": [ALLOC, FREE, TX]}, code="builtin:fix_sta_flag.o")


class Interrupted:
    """One task is stopped after so many steps; the other goes on as far as it can, then both in turns.

    `steps` counts the first one's, one instruction or one service each.
    """

    interleaves = False

    def __init__(self, first: Task, after: int) -> None:
        self.steps = 0
        self._first = first
        self._after = after
        self._turn = 0

    def pick(self, tasks: Sequence[Task], finishing: Task) -> tuple[Task, int | None]:
        others = [task for task in tasks if task is not self._first]
        if self.steps >= self._after:
            self._turn += 1
        if self._first in tasks and (not others or self._turn % PATIENCE == 0):
            self.steps += 1
            return self._first, 1
        return others[0], 20


@pytest.fixture
def kernel() -> Kernel:
    """Two vCPUs, and the module with the stations."""
    kernel = Kernel.load(cpus=2)
    kernel.load_module("builtin:sta_info.o")
    kernel.machine.recorder.enabled = False
    return kernel


def enable(kernel: Kernel, patch: Patch) -> None:
    kernel.enable(patch)
    kernel.tasks.wait_for_transition()


def disable(kernel: Kernel, patch: Patch) -> None:
    kernel.disable(patch)
    kernel.tasks.wait_for_transition()


def sleeping_station(kernel: Kernel, number: int = 0) -> None:
    assert kernel.call("sta_add", number) == 0
    kernel.call("sta_sleeps", number)


def stuck_frames(kernel: Kernel, *, in_flight: Patch | None = None) -> tuple[int, int]:
    """Wake a station up while a frame is sent to it, at each instruction on the way: how often was the frame
    stuck, of how many times?

    `in_flight` is enabled when the station has been allocated and disabled when it is gone; then only each
    third instruction is tried.
    """
    machine = kernel.machine
    stuck = tried = after = 0
    while True:
        sleeping_station(kernel)
        if in_flight:
            enable(kernel, in_flight)
        schedule = Interrupted(machine.tasks[0], after)
        machine.hub.schedule = schedule
        sender = machine.hub.call(machine.tasks[0], kernel.address_of("sta_tx"), (0,))
        waker = machine.hub.call(machine.tasks[1], kernel.address_of("sta_wakes_up"), (0,))
        machine.run(lambda sender=sender, waker=waker: sender.finished and waker.finished)
        machine.hub.schedule = RunToCompletion()
        stuck += kernel.call("sta_has_stuck_frame", 0)
        assert kernel.call("sta_sent", 0) + kernel.call("sta_kept", 0) == 1, "no frame is lost"
        kernel.call("sta_remove", 0)
        if in_flight:
            disable(kernel, in_flight)
        assert variables(kernel) == []
        after += 3 if in_flight else 1
        tried += 1
        if schedule.steps < after:
            return stuck, tried


# Matching the parent's lifecycle.


def test_without_the_lock_a_frame_can_be_stuck(kernel: Kernel) -> None:
    stuck, tried = stuck_frames(kernel)
    assert 0 < stuck < tried


def test_with_the_lock_of_its_station_no_frame_is_stuck(kernel: Kernel) -> None:
    enable(kernel, LOCK)
    stuck, tried = stuck_frames(kernel)
    assert stuck == 0
    assert tried > 100, "the redirected call is longer"
    kernel.verify().raise_for_findings()


def test_a_lock_lives_as_long_as_its_station(kernel: Kernel) -> None:
    enable(kernel, LOCK)
    before = set(kernel.machine.slab.live)
    for _ in range(20):
        for number in range(4):
            assert kernel.call("sta_add", number) == 0
        stations = [kernel.call("sta_get", number) for number in range(4)]
        assert {(each.obj, each.id) for each in variables(kernel)} == {(sta, PS_LOCK) for sta in stations}
        for number in range(4):
            kernel.call("sta_remove", number)
        assert variables(kernel) == []
    assert set(kernel.machine.slab.live) == before
    disable(kernel, LOCK)
    kernel.verify().raise_for_findings()


def test_a_station_from_before_the_patch_has_no_lock_and_goes_on_without(kernel: Kernel) -> None:
    sleeping_station(kernel)
    enable(kernel, LOCK)
    assert kernel.call("sta_tx", 0) == TX_QUEUED
    kernel.call("sta_wakes_up", 0)
    assert kernel.call("sta_sent", 0) == 1
    assert variables(kernel) == []
    kernel.call("sta_remove", 0)


def test_the_lock_is_used_by_whoever_holds_the_station(kernel: Kernel) -> None:
    """struct ps_lock: locked +0, magic +4, owner +16; it is free again behind each call."""
    enable(kernel, LOCK)
    sleeping_station(kernel)
    (lock,) = variables(kernel)
    fresh = kernel.machine.space.read(lock.data, 24)
    assert fresh[:8] == bytes(4) + 0xDEAD4EAD.to_bytes(4, "little")
    kernel.machine.space.write(lock.data, (1).to_bytes(4, "little"))
    kernel.machine.hub.instruction_budget = 10_000
    with pytest.raises(Exception, match="did not return within 10,000 instructions"):
        kernel.call("sta_tx", 0)
    kernel.machine.hub.instruction_budget = 50_000_000
    kernel.machine.space.write(lock.data, bytes(4))
    assert kernel.call("sta_tx", 0) == TX_QUEUED
    assert kernel.machine.space.read(lock.data, 24) == fresh


# In-flight parents.


def test_the_first_use_leaves_stations_in_flight_unprotected(kernel: Kernel) -> None:
    stuck, tried = stuck_frames(kernel, in_flight=LOCK)
    assert 0 < stuck < tried


def test_a_station_in_flight_gets_its_lock_from_whoever_needs_it_first(kernel: Kernel) -> None:
    """Sender and waker may both be the first: the lock is constructed once, and holds them apart."""
    stuck, tried = stuck_frames(kernel, in_flight=INFLIGHT)
    assert stuck == 0
    assert tried > 30


def test_only_stations_that_are_used_get_a_lock(kernel: Kernel) -> None:
    for number in range(3):
        sleeping_station(kernel, number)
    enable(kernel, INFLIGHT)
    assert variables(kernel) == []
    kernel.call("sta_tx", 1)
    assert [each.obj for each in variables(kernel)] == [kernel.call("sta_get", 1)]
    kernel.call("sta_wakes_up", 1)
    assert len(variables(kernel)) == 1
    kernel.call("fix_sta_inflight:fix_sta_inflight_exit")
    assert variables(kernel) == []


# Existence as a flag.


def test_only_stations_of_new_code_are_flagged_and_only_they_are_counted(kernel: Kernel) -> None:
    sleeping_station(kernel, 0)
    enable(kernel, FLAG)
    sleeping_station(kernel, 1)
    old, new = (kernel.call("sta_get", number) for number in range(2))
    assert [(each.obj, each.id) for each in variables(kernel)] == [(new, HAS_TAIL)]
    assert kernel.machine.slab.live[variables(kernel)[0].address][0] == HEADER, "a flag has no data"
    for number in (0, 1, 1):
        assert kernel.call("sta_tx", number) == TX_QUEUED
    assert (kernel.machine.slab.live[old][0], kernel.machine.slab.live[new][0]) == (24, 32)
    assert int.from_bytes(kernel.machine.space.read(new + 24, 8), "little") == 2
    kernel.verify().raise_for_findings()


def test_who_does_not_ask_writes_behind_a_station_of_old_code(kernel: Kernel) -> None:
    sleeping_station(kernel)
    careless = Func(TX.old, "careless_tx_h_unicast_ps_buf")
    enable(kernel, Patch("careless", {"sta_info": [careless]}, code="builtin:fix_sta_flag.o"))
    kernel.call("sta_tx", 0)
    (finding,) = kernel.verify().findings
    assert finding.invariant == "heap_is_intact"
    assert "red zone behind the object: __kmalloc by sta_info_alloc" in finding.what


@pytest.mark.parametrize("name", ["lifecycle", "inflight", "flag"])
def test_each_use_is_a_scenario(name: str) -> None:
    result = CliRunner().invoke(main, ["run", f"builtin:shadow-{name}.toml"])
    assert result.exit_code == 0, result.output
    assert "checks hold" in result.output
