"""Freeing what readers may still stand on: kfree_rcu() of kernel/rcu/tree.c."""

from typing import TYPE_CHECKING

from emu.events import EventKind
from emu.rcu import start_poll_synchronize_rcu

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["kfree_rcu"]


def kfree_rcu(machine: "Machine", address: int) -> None:
    """Free an object of the heap once a grace period is over; the caller goes on at once.

    A kworker looks whether it is, as soon as it can and then each jiffy: nobody else's work waits for that.
    Each object has a grace period of its own; the kernel collects many for one.
    """
    has_passed = start_poll_synchronize_rcu(machine)
    name = f"kfree_rcu_work {address:#x}"

    def kfree_rcu_work() -> None:
        if has_passed():
            machine.events.record(EventKind.SYNC, address, note="kfree_rcu")
            machine.slab.kfree(address)
        else:
            machine.workqueue.schedule_delayed_work(name, kfree_rcu_work, 1)

    machine.workqueue.schedule_work(name, kfree_rcu_work)
