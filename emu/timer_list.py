"""struct timer_list in guest memory: kernel/time/timer.c.

What is armed is linked into `timer_vectors`, so that timer_pending(), which is compiled into its callers,
sees it.  When it expires the function runs in ksoftirqd, a kernel thread, one after the other: what runs in
an interrupt on a real machine may come later here, and on a stack of its own.
"""

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from elf.errors import KlpemuError
from emu.exports import export
from emu.fork import new_task
from emu.hashtable import hlist_add_head_rcu, hlist_del_init_rcu
from emu.task import Task
from emu.timer import HZ, Timer

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["GuestTimers", "add_timer_at", "delete_timer"]

MASK = 0xFFFF_FFFF_FFFF_FFFF


class GuestTimers:
    """What one machine's armed timers have no place for in guest memory.

    `armed` maps the address of each to the host's timer; `running` is the one whose function runs.
    """

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self.armed: dict[int, Timer] = {}
        self.running = 0
        # timer_base.vectors: a kernel has many of them.
        self._vectors = machine.vmlinux.symbols.get("timer_vectors", 0) or machine.slab.kzalloc(
            8, "timer_vectors"
        )
        self._expired: deque[int] = deque()
        self._ksoftirqd: Task | None = None

    def arm(self, address: int) -> None:
        """Link the timer, and have it expire at its `expires`; in the next jiffy if that is past."""
        machine = self._machine
        timer = machine.view("timer_list", address)
        delay = (timer.expires - machine.timers.jiffies) & MASK
        delay = 1 if not delay or delay >> 63 else delay
        hlist_add_head_rcu(timer.entry, machine.view("hlist_head", self._vectors))
        what = f"timer {machine.kallsyms.describe(timer.function)}"
        self.armed[address] = machine.timers.add_timer(delay, partial(self._expire, address), what)

    def disarm(self, address: int) -> bool:
        """Unlink the timer; False if it is not armed."""
        if address in self._expired:
            self._expired.remove(address)
            return True
        armed = self.armed.pop(address, None)
        if armed is None:
            return False
        self._machine.timers.del_timer(armed)
        hlist_del_init_rcu(self._machine.view("timer_list", address).entry)
        return True

    def is_pending(self, address: int) -> bool:
        """The timer is armed, and its function has not begun."""
        return address in self.armed or address in self._expired

    def _expire(self, address: int) -> None:
        machine = self._machine
        del self.armed[address]
        timer = machine.view("timer_list", address)
        hlist_del_init_rcu(timer.entry)
        if timer.function == machine.symbol("delayed_work_timer_fn"):
            # Answered in Python: it needs no stack.
            machine.traps.exports["delayed_work_timer_fn"](machine, {"rdi": address})
            return
        self._expired.append(address)
        if self._ksoftirqd is None:
            self._ksoftirqd = new_task(machine, "ksoftirqd/0", machine.cpus[0], kthread=True)
        if not self._ksoftirqd.activities:
            machine.hub.serve(self._ksoftirqd, "run_timer_softirq", self._run_timer_softirq)

    def _run_timer_softirq(self) -> None:
        machine = self._machine
        while self._expired:
            address = self.running = self._expired.popleft()
            try:
                machine.hub.call_guest(machine.view("timer_list", address).function, address)
            except KlpemuError as error:
                machine.hub.failed(error)
            finally:
                self.running = 0


def add_timer_at(machine: "Machine", address: int, expires: int) -> None:
    """Arm a timer that is not pending for the jiffy `expires`."""
    machine.view("timer_list", address).expires = expires & MASK
    machine.guest_timers.arm(address)


def delete_timer(machine: "Machine", address: int) -> bool:
    """Disarm a timer; False if it is not pending."""
    return bool(machine.guest_timers.disarm(address))


@export
def init_timer_key(machine: "Machine", address: int, function: int, flags: int) -> None:
    """A timer that is not armed; the name and the key of lockdep are ignored."""
    timer: Any = machine.view("timer_list", address)
    timer.entry.pprev = 0
    timer.function = function
    timer.flags = flags & 0xFFFF_FFFF


@export
def add_timer(machine: "Machine", address: int) -> None:
    """Arm the timer for its `expires`; arming one that is pending is a BUG, here an error."""
    if machine.guest_timers.is_pending(address):
        raise KlpemuError("add_timer of a pending timer", where=machine.caller())
    machine.guest_timers.arm(address)


@export
def add_timer_on(machine: "Machine", address: int, _cpu: int) -> None:
    """As add_timer(): all timers expire on the first vCPU."""
    machine.guest_timers.arm(address)


@export
def mod_timer(machine: "Machine", address: int, expires: int) -> int:
    """Arm the timer for another jiffy; 1 if it was pending."""
    pending = delete_timer(machine, address)
    add_timer_at(machine, address, expires)
    return int(pending)


@export
def del_timer(machine: "Machine", address: int) -> int:
    """Disarm the timer; 1 if it was pending.  Its function may be running."""
    return int(delete_timer(machine, address))


@export
def del_timer_sync(machine: "Machine", address: int) -> int:
    """Disarm the timer, and wait until its function does not run; 1 if it was pending."""
    pending = delete_timer(machine, address)
    machine.hub.wait(lambda: machine.guest_timers.running != address, "del_timer_sync")
    return int(pending)


@export
def round_jiffies_relative(machine: "Machine", delay: int) -> int:
    """The delay to the nearest whole second, as for CPU 0."""
    return machine.timers.round_jiffies_relative(delay)


@export
def jiffies_to_usecs(_machine: "Machine", jiffies: int) -> int:
    """So many jiffies, in microseconds."""
    return jiffies * 1_000_000 // HZ & 0xFFFF_FFFF
