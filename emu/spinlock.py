"""raw_spinlock_t in guest memory: held or not (kernel/locking/spinlock.c).

Whoever does not get it spins on its vCPU; in what order the waiters get it is not modelled.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from emu.memory import read_u32

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["spin_locked"]

Q_LOCKED = 1  # include/asm-generic/qspinlock_types.h: _Q_LOCKED_VAL


@contextmanager
def spin_locked(machine: "Machine", lock: int) -> Iterator[None]:
    """raw_spin_lock_irqsave(): nobody else holds the lock at guest address `lock` while the block runs.

    Nor is the vCPU taken away in it, if the block calls guest code.
    """
    hub, space = machine.hub, machine.space
    cpu = hub.current.cpu
    hub.door("spin_lock", lock)
    # A service that was abandoned cannot wait any more, and cleans up as it is.
    while hub.in_service and read_u32(space, lock):
        hub.wait(lambda: not read_u32(space, lock), machine.kallsyms.describe(lock), spins=True)
    _add(machine, lock, Q_LOCKED)
    _add(machine, cpu.gs_base + machine.vmlinux.symbols["__preempt_count"], 1)
    try:
        yield
    finally:
        hub.door("spin_unlock", lock)
        _add(machine, cpu.gs_base + machine.vmlinux.symbols["__preempt_count"], -1)
        _add(machine, lock, -Q_LOCKED)


def _add(machine: "Machine", at: int, change: int) -> None:
    value = read_u32(machine.space, at) + change & 0xFFFF_FFFF
    machine.space.write(at, value.to_bytes(4, "little"))
