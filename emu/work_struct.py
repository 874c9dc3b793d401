"""Guest code's own work: struct work_struct and struct delayed_work (kernel/workqueue.c).

WORK_STRUCT_PENDING in `data` says that a work waits, for its time or for a kworker; one that waits for a
kworker is linked into `worklist`.  All workqueues are one here: neither their attributes (max_active,
WQ_HIGHPRI, unbound) nor the CPU that a caller asks for make a difference.
"""

from functools import partial
from typing import TYPE_CHECKING

from emu.exports import export
from emu.list import init_list_head, list_add_tail, list_del
from emu.timer_list import add_timer_at, delete_timer
from emu.workqueue import Work

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["WORK_OFFQ_CANCELING", "WORK_STRUCT_NO_POOL", "WORK_STRUCT_PENDING"]

WORK_STRUCT_PENDING = 1
WORK_OFFQ_CANCELING = 1 << 4
WORK_STRUCT_NO_POOL = ((1 << 31) - 1) << 5  # include/linux/workqueue.h


def _set_pending(machine: "Machine", work: int) -> bool:
    """test_and_set_bit(WORK_STRUCT_PENDING_BIT), the other way round: False if it was set."""
    data = work + machine.layouts.offsetof("work_struct", "data")
    return not machine.shared.fetch_or(data, WORK_STRUCT_PENDING) & WORK_STRUCT_PENDING


def _clear_pending(machine: "Machine", work: int) -> None:
    machine.view("work_struct", work).data.counter = WORK_STRUCT_NO_POOL


def _queue_work(machine: "Machine", work: int) -> None:
    """__queue_work() of a work that is marked as pending."""
    struct = machine.view("work_struct", work)
    list_add_tail(struct.entry, machine.view("list_head", machine.workqueue.worklist))
    name = machine.kallsyms.describe(struct.func).split("+")[0]
    machine.workqueue.insert_work(Work(name, partial(_process_one_work, machine, work), work))


def _process_one_work(machine: "Machine", work: int) -> None:
    """Run the work's function on the kworker's own stack; it may free the work, or queue it again."""
    struct = machine.view("work_struct", work)
    function = struct.func
    list_del(struct.entry)
    init_list_head(struct.entry)
    _clear_pending(machine, work)
    machine.hub.call_guest(function, work)


def _timer_of(machine: "Machine", work: int) -> int:
    """The timer_list of the delayed_work that begins with this work_struct."""
    return work + int(machine.layouts.offsetof("delayed_work", "timer"))


def _queue_delayed(machine: "Machine", wq: int, work: int, delay: int) -> None:
    if not delay:
        _queue_work(machine, work)
        return
    delayed = machine.view("delayed_work", work)
    delayed.wq = wq
    add_timer_at(machine, _timer_of(machine, work), machine.timers.jiffies + delay)


def _grab_pending(machine: "Machine", work: int, *, delayed: bool) -> bool:
    """try_to_grab_pending(): the work is marked as pending, and waits nowhere any more; did it wait?"""
    if delayed and delete_timer(machine, _timer_of(machine, work)):
        return True
    if _set_pending(machine, work):
        return False
    if machine.workqueue.remove(work):
        entry = machine.view("work_struct", work).entry
        list_del(entry)
        init_list_head(entry)
    return True


def _cancel(machine: "Machine", work: int, *, delayed: bool) -> int:
    pending = _grab_pending(machine, work, delayed=delayed)
    _clear_pending(machine, work)
    return int(pending)


def _cancel_sync(machine: "Machine", work: int, *, delayed: bool) -> int:
    """While it is waited for, the work stays marked as pending: it cannot queue itself again."""
    pending = _grab_pending(machine, work, delayed=delayed)
    data = work + machine.layouts.offsetof("work_struct", "data")
    machine.shared.fetch_or(data, WORK_OFFQ_CANCELING)
    _wait_for(machine, machine.workqueue.executing(work), "cancel_work_sync")
    _clear_pending(machine, work)
    return int(pending)


def _wait_for(machine: "Machine", execution: Work | None, what: str) -> bool:
    if execution is None:
        return False
    machine.hub.wait(lambda: execution.finished, what)
    return True


@export
def queue_work_on(machine: "Machine", _cpu: int, _wq: int, work: int) -> int:
    """Queue the work for a kworker of the first vCPU; 0 if it is pending already."""
    if not _set_pending(machine, work):
        return 0
    _queue_work(machine, work)
    return 1


@export
def queue_delayed_work_on(machine: "Machine", _cpu: int, wq: int, work: int, delay: int) -> int:
    """Queue the work in so many jiffies; 0 if it is pending already."""
    if not _set_pending(machine, work):
        return 0
    _queue_delayed(machine, wq, work, delay)
    return 1


@export
def mod_delayed_work_on(machine: "Machine", _cpu: int, wq: int, work: int, delay: int) -> int:
    """Queue the work in so many jiffies, whether it is pending (1) or not (0)."""
    pending = _grab_pending(machine, work, delayed=True)
    _queue_delayed(machine, wq, work, delay)
    return int(pending)


@export
def delayed_work_timer_fn(machine: "Machine", timer: int) -> None:
    """The function of a delayed work's timer: queues the work."""
    _queue_work(machine, timer - machine.layouts.offsetof("delayed_work", "timer"))


@export
def flush_work(machine: "Machine", work: int) -> int:
    """Wait until the work, as it was queued last, is done; 0 if it neither waits for a kworker nor runs."""
    return int(_wait_for(machine, machine.workqueue.last(work), "flush_work"))


@export
def flush_delayed_work(machine: "Machine", work: int) -> int:
    """Queue a delayed work now if it waits for its time; wait as flush_work()."""
    if delete_timer(machine, _timer_of(machine, work)):
        _queue_work(machine, work)
    return int(_wait_for(machine, machine.workqueue.last(work), "flush_delayed_work"))


@export
def cancel_work(machine: "Machine", work: int) -> int:
    """The work does not wait any more; 1 if it did.  Its function may be running."""
    return _cancel(machine, work, delayed=False)


@export
def cancel_work_sync(machine: "Machine", work: int) -> int:
    """The work neither waits nor runs any more, and has not queued itself again; 1 if it waited."""
    return _cancel_sync(machine, work, delayed=False)


@export
def cancel_delayed_work(machine: "Machine", work: int) -> int:
    """As cancel_work(), of a delayed work."""
    return _cancel(machine, work, delayed=True)


@export
def cancel_delayed_work_sync(machine: "Machine", work: int) -> int:
    """As cancel_work_sync(), of a delayed work."""
    return _cancel_sync(machine, work, delayed=True)


@export
def alloc_workqueue(machine: "Machine", _fmt: int, _flags: int, _max_active: int) -> int:
    """Another name for the one workqueue; its flags and limits mean nothing."""
    size = machine.layouts.sizeof("workqueue_struct")
    return machine.slab.kzalloc(size, f"workqueue by {machine.caller()}")


@export
def destroy_workqueue(machine: "Machine", wq: int) -> None:
    """Wait until all work of guest code is done, that of other workqueues included."""
    _flush_all(machine)
    machine.slab.kfree(wq)


@export
def __flush_workqueue(machine: "Machine", _wq: int) -> None:
    """Wait until all work of guest code that waits for a kworker now is done, whatever its workqueue."""
    _flush_all(machine)


def _flush_all(machine: "Machine") -> None:
    for execution in machine.workqueue.executions():
        _wait_for(machine, execution, "flush_workqueue")
