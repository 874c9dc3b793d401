"""struct mutex in guest memory: the owner is a task_struct's address, 0 means free (kernel/locking/mutex.c).

Waiting is the hub's business; the wait list of the struct stays empty.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["mutex_held"]


@contextmanager
def mutex_held(machine: Any, symbol: str) -> Iterator[None]:
    """Hold the global mutex `symbol` on behalf of the current task."""
    owner = machine.view("mutex", machine.symbol(symbol)).owner
    task = machine.hub.current.struct
    while owner.counter:
        machine.hub.wait(lambda: not owner.counter, symbol)
    owner.counter = task - (1 << 64)  # an atomic_long_t is signed
    try:
        yield
    finally:
        owner.counter = 0
