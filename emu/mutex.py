"""struct mutex in guest memory: the owner is a task_struct's address, 0 means free (kernel/locking/mutex.c).

Waiting is the hub's business; the wait list of the struct stays empty.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from emu.memory import read_u64

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["mutex_held"]


@contextmanager
def mutex_held(machine: "Machine", symbol: str) -> Iterator[None]:
    """Hold the global mutex `symbol` on behalf of the current task."""
    owner = machine.symbol(symbol) + machine.layouts.offsetof("mutex", "owner")
    task = machine.hub.current.struct
    while not machine.shared.cmpxchg(owner, 0, task):
        machine.hub.wait(lambda: not read_u64(machine.space, owner), symbol)
    try:
        yield
    finally:
        machine.shared.write(owner, bytes(8))
