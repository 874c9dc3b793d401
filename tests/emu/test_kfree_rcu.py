"""kfree_rcu(): the object stays until every vCPU has passed a quiescent state."""

from machines import boot

from emu.events import EventKind
from emu.kfree_rcu import kfree_rcu
from emu.machine import Machine
from emu.schedules import RoundRobin


def settle(machine: Machine) -> None:
    machine.run(lambda: machine.workqueue.is_empty)


def test_the_caller_goes_on_and_the_object_is_freed_later(machine: Machine) -> None:
    address = machine.slab.kzalloc(64, "an object")
    machine.service("free", lambda: kfree_rcu(machine, address))
    assert address in machine.slab.live
    settle(machine)
    assert address not in machine.slab.live
    assert machine.slab.corruptions(machine.space) == []


def test_it_is_freed_only_behind_a_grace_period(machine: Machine) -> None:
    address = machine.slab.kzalloc(64, "an object")
    number = machine.events.total
    machine.service("free", lambda: kfree_rcu(machine, address))
    settle(machine)
    syncs = [event.note for event in machine.events.since(number) if event.kind is EventKind.SYNC]
    assert syncs == ["kfree_rcu"]


def test_it_stays_while_another_vcpu_is_in_kernel_code() -> None:
    machine = boot(cpus=2)
    machine.hub.schedule = RoundRobin()
    address = machine.slab.kzalloc(64, "an object")
    machine.recorder.enabled = False
    reader = machine.hub.call(machine.tasks[1], machine.symbol("spin_until"), (machine.symbol("div_errors"),))
    machine.run(lambda: False, 1)
    machine.service("free", lambda: kfree_rcu(machine, address))
    machine.run(lambda: False, 20)
    assert address in machine.slab.live
    done: list[str] = []
    machine.workqueue.schedule_work("other work", lambda: done.append("in spite of it"))
    assert machine.run(lambda: bool(done), 5), "nobody's work waits behind it"
    assert address in machine.slab.live
    machine.space.write(machine.symbol("div_errors"), (1).to_bytes(8, "little"))
    machine.run(lambda: reader.finished)
    machine.run(lambda: False, 2)
    assert address not in machine.slab.live
