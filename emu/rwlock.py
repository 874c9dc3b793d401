"""rwlock_t in guest memory: a count of readers, or one writer (kernel/locking/qrwlock.c).

Whoever does not get it spins on its vCPU.  Only readers and a writer that exclude each other are modelled,
not the queue of those who wait.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from emu.memory import read_u32

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["read_locked", "write_locked"]

QW_LOCKED = 0xFF  # include/asm-generic/qrwlock_types.h and qrwlock.h
QR_BIAS = 1 << 9


@contextmanager
def read_locked(machine: "Machine", symbol: str) -> Iterator[None]:
    """read_lock(): no writer while the block runs."""
    at = machine.symbol(symbol)
    machine.hub.door("read_lock", at)
    while read_u32(machine.space, at) & QW_LOCKED:
        machine.hub.wait(lambda: not read_u32(machine.space, at) & QW_LOCKED, symbol, spins=True)
    _add(machine, at, QR_BIAS)
    try:
        yield
    finally:
        machine.hub.door("read_unlock", at)
        _add(machine, at, -QR_BIAS)


@contextmanager
def write_locked(machine: "Machine", symbol: str) -> Iterator[None]:
    """write_lock(): nobody else while the block runs."""
    at = machine.symbol(symbol)
    machine.hub.door("write_lock", at)
    while read_u32(machine.space, at):
        machine.hub.wait(lambda: not read_u32(machine.space, at), symbol, spins=True)
    _add(machine, at, QW_LOCKED)
    try:
        yield
    finally:
        machine.hub.door("write_unlock", at)
        _add(machine, at, -QW_LOCKED)


def _add(machine: "Machine", at: int, change: int) -> None:
    """One locked instruction of the CPU: nobody comes between its load and its store."""
    machine.space.write(at, (read_u32(machine.space, at) + change).to_bytes(4, "little"))
