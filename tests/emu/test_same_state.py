"""The state of a machine by value: what it must not forget, and what makes no difference."""

from collections.abc import Iterator

import pytest

from emu.footprint import Footprint, Recorder
from emu.machine import Machine
from emu.same_state import SameState
from emu.task import Service
from emu.tracked import Tracking
from klpemu.kernel import Kernel


@pytest.fixture
def machine() -> Machine:
    return Kernel.load(cpus=2).machine


@pytest.fixture
def same(machine: Machine) -> SameState:
    recorder = Recorder(machine)
    tracking = Tracking(recorder)
    tracking.track(machine)
    return SameState(machine, recorder, tracking)


@pytest.fixture
def service(machine: Machine) -> Iterator[Service]:
    service = Service(name="service", body=lambda: None)
    machine.init_task.activities.append(service)
    yield service
    machine.init_task.activities.remove(service)


def _seen(value: int) -> Footprint:
    footprint = Footprint()
    footprint.seen = value
    return footprint


def test_memory_counts_and_what_was_stored_and_taken_back_does_not(machine: Machine, same: SameState) -> None:
    at = machine.symbol("klp_transition_patch")
    numbers = [same.number()]
    for value in (1, 2, 1, 0):
        machine.space.write(at, value.to_bytes(8, "little"))
        numbers.append(same.number())
    assert numbers[1] == numbers[3]
    assert numbers[0] == numbers[4]
    assert len(set(numbers)) == 3


def test_a_store_that_takes_the_place_of_another_counts(machine: Machine, same: SameState) -> None:
    at = machine.symbol("klp_transition_patch")
    before = same.number()
    machine.space.exchange(at, b"\1" + bytes(7))
    assert same.number() != before


def test_mappings_count(machine: Machine, same: SameState) -> None:
    before = same.number()
    machine.area.module_alloc(4096, "test")
    assert same.number() != before


def test_members_of_objects_count(machine: Machine, same: SameState) -> None:
    rq = machine.sched.runqueues[1]
    numbers = []
    for value in (5, 6, 5):
        rq.nr_switches = value
        numbers.append(same.number())
    assert numbers[0] == numbers[2] != numbers[1]


def test_containers_count_and_their_order_too(machine: Machine, same: SameState) -> None:
    numbers = []
    for lines in (["a", "b"], ["b", "a"], ["a", "b"]):
        machine.log.lines[:] = lines
        numbers.append(same.number())
    assert numbers[0] == numbers[2] != numbers[1]


def test_what_a_new_object_holds_counts_as_long_as_something_leads_there(
    machine: Machine, same: SameState, service: Service
) -> None:
    numbers = []
    for name in ("one", "two", "one"):
        service.waiting_for = name
        numbers.append(same.number())
    assert numbers[0] == numbers[2] != numbers[1]


def test_what_a_service_has_seen_counts(same: SameState, service: Service) -> None:
    same.step(1, _seen(11), service)
    saw_one = same.number()
    same._continuations.clear()
    same.step(1, _seen(12), service)
    saw_another = same.number()
    same._continuations.clear()
    same.step(2, _seen(11), service)
    assert same.number() == saw_one != saw_another


def test_a_variable_that_functions_share_counts(machine: Machine, same: SameState, service: Service) -> None:
    over = False

    def ring() -> None:
        nonlocal over
        over = not over

    service.body = lambda: over
    numbers = [same.number()]
    for _ in range(2):
        ring()
        numbers.append(same.number())
    assert numbers[0] == numbers[2] != numbers[1]


def test_time_and_timers_count(machine: Machine, same: SameState) -> None:
    numbers = [same.number()]
    machine.timers.spend(3)
    numbers.append(same.number())
    timer = machine.timers.add_timer(5, machine.sched.candidates, "test")
    numbers.append(same.number())
    machine.timers.del_timer(timer)
    assert same.number() == numbers[1]
    assert len(set(numbers)) == 3


def test_registers_count_while_guest_code_is_under_way(machine: Machine, same: SameState) -> None:
    before = same.number()
    machine.cpus[0].set_registers({"rbx": 1234})
    assert same.number() == before  # nobody is in the middle of anything
    call = machine.hub.call(machine.init_task, machine.symbol("area_of"), (3, 4))
    call.started = machine.init_task.running = True
    machine.sched.runqueues[0].curr = machine.init_task
    before = same.number()
    machine.cpus[0].set_registers({"rbx": 1235})
    assert same.number() != before


def test_a_number_minus_one_is_not_minus_two(machine: Machine, same: SameState) -> None:
    rq = machine.sched.runqueues[1]
    rq.nr_switches = -1
    before = same.number()
    rq.nr_switches = -2
    assert same.number() != before


def test_services_see_what_they_read_and_not_what_they_overwrite(machine: Machine) -> None:
    recorder = Recorder(machine)
    recorder.shown = hash
    at = machine.symbol("klp_transition_patch")
    found = []
    for value, read in ((1, True), (2, True), (1, False), (2, False)):
        machine.space.write(at, bytes([value]))
        footprint = Footprint()

        def body(read: bool = read, footprint: Footprint = footprint) -> None:
            with recorder.into(footprint):
                machine.shared.read(at, 1) if read else machine.shared.write(at, b"\0")

        machine.service("test", body)
        found.append(footprint.seen)
    assert found[0] != found[1]
    assert found[2] == found[3]
