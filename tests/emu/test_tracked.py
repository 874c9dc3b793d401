"""Our own objects, telling who reads and who changes them."""

from collections.abc import Callable
from typing import Any

import pytest

from emu.footprint import Footprint, Recorder
from emu.machine import Machine
from emu.tracked import Tracking
from klpemu import Kernel


@pytest.fixture(scope="module")
def recorded() -> tuple[Machine, Recorder]:
    machine = Kernel.load(cpus=2).machine
    recorder = Recorder(machine)
    Tracking(recorder).track(machine)
    return machine, recorder


def _footprint(recorder: Recorder, body: Callable[[], Any]) -> Footprint:
    found = Footprint()
    with recorder.into(found):
        body()
    return found


def test_who_stores_an_attribute_does_not_commute_with_who_reads_it(
    recorded: tuple[Machine, Recorder],
) -> None:
    machine, recorder = recorded
    queue = machine.sched.runqueues[0]
    reads = _footprint(recorder, lambda: queue.need_resched)
    stores = _footprint(recorder, lambda: setattr(queue, "need_resched", False))
    others = _footprint(recorder, lambda: setattr(queue, "nr_switches", queue.nr_switches))
    assert not reads.commutes_with(stores)
    assert reads.commutes_with(others)


def test_who_changes_a_list_does_not_commute_with_who_goes_through_it(
    recorded: tuple[Machine, Recorder],
) -> None:
    machine, recorder = recorded
    task = machine.tasks[-1]
    goes = _footprint(recorder, lambda: list(machine.tasks))
    changes = _footprint(recorder, lambda: (machine.tasks.remove(task), machine.tasks.append(task)))
    assert not goes.commutes_with(changes)


def test_stores_under_two_keys_commute_and_both_are_seen_by_who_goes_through_all(
    recorded: tuple[Machine, Recorder],
) -> None:
    machine, recorder = recorded
    table: dict[int, Any] = machine.by_struct
    one, two = list(table)[:2]
    first = _footprint(recorder, lambda: table.__setitem__(one, table[one]))
    second = _footprint(recorder, lambda: table.__setitem__(two, table[two]))
    looks = _footprint(recorder, lambda: table[two])
    goes = _footprint(recorder, lambda: list(table.values()))
    assert first.commutes_with(second)
    assert first.commutes_with(looks)
    assert not second.commutes_with(looks)
    assert not first.commutes_with(goes)


def test_what_is_put_into_a_tracked_object_is_tracked(recorded: tuple[Machine, Recorder]) -> None:
    machine, recorder = recorded
    machine.warnings = []
    kept = machine.warnings
    changes = _footprint(recorder, lambda: kept.append("a warning"))
    reads = _footprint(recorder, lambda: len(machine.warnings))
    assert not changes.commutes_with(reads)


def test_two_who_share_a_list_still_share_it() -> None:
    machine = Kernel.load().machine
    Tracking(Recorder(machine)).track(machine)
    assert machine.hub.tasks is machine.tasks
