"""Freeing what readers may still stand on: kfree_rcu() of kernel/rcu/tree.c."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["kfree_rcu"]


def kfree_rcu(machine: "Machine", address: int) -> None:
    """Free an object of the heap after a grace period; the caller goes on at once.

    Each object waits for a grace period of its own, in the kworker; the kernel collects many for one.
    """

    def kfree_rcu_work() -> None:
        machine.synchronize("synchronize_rcu")
        machine.slab.kfree(address)

    machine.workqueue.schedule_work("kfree_rcu_work", kfree_rcu_work)
