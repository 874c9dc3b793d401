"""struct mutex in guest memory: kernel/locking/mutex.c.

The owner is a task_struct's address, 0 means free; the flag bits that the kernel keeps beside it, optimistic
spinning and handing over are not modelled.  Waiters are on the wait_list, with a struct mutex_waiter on their
stacks.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from emu.entry import signal_pending
from emu.exports import export
from emu.list import list_add_tail, list_del, list_empty
from emu.sleep import set_current_state
from emu.spinlock import spin_locked
from emu.thread_info import TASK_INTERRUPTIBLE, TASK_RUNNING, TASK_UNINTERRUPTIBLE
from emu.view import list_for_each_entry

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["mutex_held"]


@contextmanager
def mutex_held(machine: "Machine", symbol: str) -> Iterator[None]:
    """Hold the global mutex `symbol` on behalf of the current task."""
    lock = machine.symbol(symbol)
    _lock(machine, lock)
    try:
        yield
    finally:
        _unlock(machine, lock)


@export
def mutex_lock(machine: "Machine", lock: int) -> None:
    """Take the mutex; sleep until it is free."""
    _lock(machine, lock)


@export
def mutex_lock_interruptible(machine: "Machine", lock: int) -> int:
    """Take the mutex (0), or give up when there is a signal (-EINTR)."""
    return 0 if _lock(machine, lock, TASK_INTERRUPTIBLE) else -errno.EINTR


@export
def mutex_lock_killable(machine: "Machine", lock: int) -> int:
    """Take the mutex; nobody is killed here."""
    _lock(machine, lock)
    return 0


@export
def mutex_is_locked(machine: "Machine", lock: int) -> int:
    """Somebody has the mutex."""
    return int(machine.view("mutex", lock).owner.counter != 0)


@export
def mutex_trylock(machine: "Machine", lock: int) -> int:
    """Take the mutex if it is free: 1 if that worked."""
    return int(_try(machine, lock))


@export
def mutex_unlock(machine: "Machine", lock: int) -> None:
    """Release the mutex and wake the first who waits for it."""
    _unlock(machine, lock)


@export
def __mutex_init(machine: "Machine", lock: int) -> None:
    """A free mutex."""
    mutex = machine.view("mutex", lock)
    mutex.owner.counter = 0
    mutex.wait_list.next = mutex.wait_list.address_
    mutex.wait_list.prev = mutex.wait_list.address_


def _try(machine: "Machine", lock: int) -> bool:
    owner = lock + machine.layouts.offsetof("mutex", "owner")
    return machine.shared.cmpxchg(owner, 0, machine.hub.current.struct)


def _lock(machine: "Machine", lock: int, state: int = TASK_UNINTERRUPTIBLE) -> bool:
    """Take the mutex, asleep in `state` until it is free; False if a signal has ended that."""
    if _try(machine, lock):
        return True
    mutex = machine.view("mutex", lock)
    waiter = machine.view("mutex_waiter", machine.on_stack(machine.layouts.sizeof("mutex_waiter")))
    waiter.task = machine.hub.current.struct
    with spin_locked(machine, mutex.member_("wait_lock")):
        list_add_tail(waiter.list, mutex.wait_list)
    while True:
        set_current_state(machine, state)
        # Whoever gives up does so under the lock: else it could be the one that the owner wakes, and nobody
        # would be woken in its place.
        with spin_locked(machine, mutex.member_("wait_lock")):
            taken = _try(machine, lock)
            if taken or (state == TASK_INTERRUPTIBLE and signal_pending(machine, machine.hub.current)):
                set_current_state(machine, TASK_RUNNING)
                list_del(waiter.list)
                return taken
        try:
            machine.sched.schedule(machine.kallsyms.describe(lock).split("+")[0])
        except BaseException:  # abandoned: nobody may find this waiter any more
            list_del(waiter.list)
            raise


def _unlock(machine: "Machine", lock: int) -> None:
    mutex = machine.view("mutex", lock)
    mutex.owner.counter = 0
    if list_empty(mutex.wait_list):  # whoever comes later tries once more before it sleeps
        return
    with spin_locked(machine, mutex.member_("wait_lock")):
        first = next(list_for_each_entry(mutex.wait_list, "mutex_waiter", "list"), None)
        if first is not None:
            machine.sched.try_to_wake_up(machine.sched.task_of(first.task))
