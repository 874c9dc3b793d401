"""Wait queues and completions in guest memory: kernel/sched/wait.c, completion.c, swait.c.

The queues are the kernel's lists, with the waiters' entries on the waiters' own stacks.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from emu.entry import signal_pending
from emu.exports import export
from emu.list import init_list_head, list_add, list_add_tail, list_del, list_empty
from emu.sleep import schedule_timeout_in, set_current_state
from emu.spinlock import spin_locked
from emu.thread_info import TASK_INTERRUPTIBLE, TASK_RUNNING, TASK_UNINTERRUPTIBLE
from emu.timer import MAX_SCHEDULE_TIMEOUT
from emu.view import list_for_each_entry

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = [
    "autoremove_wake_function",
    "complete",
    "complete_all",
    "complete_one",
    "completed",
    "default_wake_function",
    "finish_wait",
    "init_wait_entry",
    "prepare_to_wait",
    "prepare_to_wait_event",
    "wait_for_completion",
    "wait_for_completion_interruptible",
    "wait_for_completion_timeout",
]

WQ_FLAG_EXCLUSIVE = 1
ERESTARTSYS = 512
UINT_MAX = 0xFFFF_FFFF


# Wait queues.


@export
def __init_waitqueue_head(machine: "Machine", head: int) -> None:
    """An empty wait queue."""
    queue = machine.view("wait_queue_head", head)
    queue.lock.rlock.val = 0
    init_list_head(queue.head)


@export
def init_wait_entry(machine: "Machine", entry: int, flags: int) -> None:
    """An entry for the current task that leaves its queue when it is woken."""
    wait = machine.view("wait_queue_entry", entry)
    wait.flags = flags & 0xFFFF_FFFF
    wait.private = machine.hub.current.struct
    wait.func = machine.symbol("autoremove_wake_function")
    init_list_head(wait.entry)


@export
def prepare_to_wait(machine: "Machine", head: int, entry: int, state: int) -> None:
    """Put the entry on the queue, if it is on none, and set the task's state."""
    wait = machine.view("wait_queue_entry", entry)
    wait.flags = wait.flags & ~WQ_FLAG_EXCLUSIVE
    with _queue_locked(machine, head) as queue:
        if list_empty(wait.entry):
            list_add(wait.entry, queue.head)
        set_current_state(machine, state & 0xFFFF_FFFF)


@export
def prepare_to_wait_exclusive(machine: "Machine", head: int, entry: int, state: int) -> int:
    """As prepare_to_wait(), as one of those of whom only some are woken; 1 if nobody else waits."""
    wait = machine.view("wait_queue_entry", entry)
    wait.flags = wait.flags | WQ_FLAG_EXCLUSIVE
    with _queue_locked(machine, head) as queue:
        empty = list_empty(queue.head)
        if list_empty(wait.entry):
            list_add_tail(wait.entry, queue.head)
        set_current_state(machine, state & 0xFFFF_FFFF)
    return int(empty)


@export
def add_wait_queue(machine: "Machine", head: int, entry: int) -> None:
    """Put the entry on the queue; the task's state is left alone."""
    wait = machine.view("wait_queue_entry", entry)
    wait.flags = wait.flags & ~WQ_FLAG_EXCLUSIVE
    with _queue_locked(machine, head) as queue:
        list_add(wait.entry, queue.head)


@export
def add_wait_queue_exclusive(machine: "Machine", head: int, entry: int) -> None:
    """Put the entry behind those that are always woken."""
    wait = machine.view("wait_queue_entry", entry)
    wait.flags = wait.flags | WQ_FLAG_EXCLUSIVE
    with _queue_locked(machine, head) as queue:
        list_add_tail(wait.entry, queue.head)


@export
def remove_wait_queue(machine: "Machine", head: int, entry: int) -> None:
    """Take the entry off the queue."""
    with _queue_locked(machine, head):
        list_del(machine.view("wait_queue_entry", entry).entry)


@export
def prepare_to_wait_event(machine: "Machine", head: int, entry: int, state: int) -> int:
    """What wait_event() does before it looks at its condition; -ERESTARTSYS if a signal ends the wait."""
    wait = machine.view("wait_queue_entry", entry)
    with _queue_locked(machine, head) as queue:
        if state & TASK_INTERRUPTIBLE and signal_pending(machine, machine.hub.current):
            list_del(wait.entry)
            init_list_head(wait.entry)
            return -ERESTARTSYS
        if list_empty(wait.entry):
            (list_add_tail if wait.flags & WQ_FLAG_EXCLUSIVE else list_add)(wait.entry, queue.head)
        set_current_state(machine, state & 0xFFFF_FFFF)
    return 0


@export
def finish_wait(machine: "Machine", head: int, entry: int) -> None:
    """Off the queue, and running again."""
    set_current_state(machine, TASK_RUNNING)
    wait = machine.view("wait_queue_entry", entry)
    with _queue_locked(machine, head):
        if not list_empty(wait.entry):
            list_del(wait.entry)
            init_list_head(wait.entry)


@export
def default_wake_function(machine: "Machine", entry: int, mode: int) -> int:
    """Wake the entry's task."""
    task = machine.view("wait_queue_entry", entry).private
    return int(machine.sched.try_to_wake_up(machine.sched.task_of(task), mode & 0xFFFF_FFFF))


@export
def autoremove_wake_function(machine: "Machine", entry: int, mode: int) -> int:
    """Wake the entry's task, and take the entry off its queue if that slept."""
    wait = machine.view("wait_queue_entry", entry)
    woken = machine.sched.try_to_wake_up(machine.sched.task_of(wait.private), mode & 0xFFFF_FFFF)
    if woken:
        list_del(wait.entry)
        init_list_head(wait.entry)
    return int(woken)


@export
def __wake_up(machine: "Machine", head: int, mode: int, nr_exclusive: int, key: int) -> int:
    """Call the function of every entry, up to the exclusive ones that suffice; how many were woken."""
    woken, nr_exclusive = 0, nr_exclusive & 0xFFFF_FFFF
    with _queue_locked(machine, head) as queue:
        for wait in list(list_for_each_entry(queue.head, "wait_queue_entry", "entry")):
            flags = wait.flags
            result = machine.hub.call_guest(wait.func, wait.address_, mode, 0, key) & 0xFFFF_FFFF
            if result >> 31:
                break
            if result:
                woken += 1
                if flags & WQ_FLAG_EXCLUSIVE:
                    nr_exclusive -= 1
                    if not nr_exclusive:
                        break
    return woken


@contextmanager
def _queue_locked(machine: "Machine", head: int) -> Iterator[Any]:
    queue = machine.view("wait_queue_head", head)
    with spin_locked(machine, queue.member_("lock")):
        yield queue


# Completions.


@export
def __init_swait_queue_head(machine: "Machine", head: int) -> None:
    """An empty simple wait queue."""
    queue = machine.view("swait_queue_head", head)
    queue.lock.val = 0
    init_list_head(queue.task_list)


@export
def wait_for_completion(machine: "Machine", completion: int) -> None:
    """Sleep until somebody completes it."""
    completed(machine, completion)


@export
def wait_for_completion_timeout(machine: "Machine", completion: int, timeout: int) -> int:
    """Sleep until somebody completes it, or for so many jiffies; returns those left, at least 1, or 0."""
    return _wait_for_common(machine, completion, timeout, TASK_UNINTERRUPTIBLE)


@export
def wait_for_completion_interruptible(machine: "Machine", completion: int) -> int:
    """Sleep until somebody completes it (0) or there is a signal (-ERESTARTSYS)."""
    left = _wait_for_common(machine, completion, MAX_SCHEDULE_TIMEOUT, TASK_INTERRUPTIBLE)
    return left if left < 0 else 0


@export
def wait_for_completion_killable(machine: "Machine", completion: int) -> int:
    """Sleep until somebody completes it; nobody is killed here."""
    _wait_for_common(machine, completion, MAX_SCHEDULE_TIMEOUT, TASK_UNINTERRUPTIBLE)
    return 0


@export
def wait_for_completion_interruptible_timeout(machine: "Machine", completion: int, timeout: int) -> int:
    """Sleep until somebody completes it (the jiffies left, at least 1), for so many jiffies (0), or until
    there is a signal (-ERESTARTSYS).
    """
    return _wait_for_common(machine, completion, timeout, TASK_INTERRUPTIBLE)


@export
def try_wait_for_completion(machine: "Machine", completion: int) -> int:
    """Use up a completion that is done (1); 0 if it is not."""
    done = machine.view("completion", completion)
    with _completion_locked(machine, done):
        return int(bool(done.done) and _come_to_its_end(done, 1) > 0)


@export
def completion_done(machine: "Machine", completion: int) -> int:
    """Nobody would have to wait for it."""
    return int(machine.view("completion", completion).done != 0)


@export
def complete(machine: "Machine", completion: int) -> None:
    """Let one waiter go on, now or when it comes."""
    complete_one(machine, completion)


@export
def complete_all(machine: "Machine", completion: int) -> None:
    """Let everybody go on, now and for ever."""
    done = machine.view("completion", completion)
    with _completion_locked(machine, done):
        done.done = UINT_MAX
        _swake_up_locked(machine, done, everybody=True)


def completed(machine: "Machine", completion: int) -> None:
    """wait_for_completion(), for a service of the machine."""
    _wait_for_common(machine, completion, MAX_SCHEDULE_TIMEOUT, TASK_UNINTERRUPTIBLE)


def complete_one(machine: "Machine", completion: int) -> None:
    """complete(), for a service of the machine."""
    done = machine.view("completion", completion)
    with _completion_locked(machine, done):
        if done.done != UINT_MAX:
            done.done = done.done + 1
        _swake_up_locked(machine, done, everybody=False)


def _wait_for_common(machine: "Machine", address: int, timeout: int, state: int) -> int:
    completion = machine.view("completion", address)
    task = machine.hub.current
    wait = machine.view("swait_queue", machine.on_stack(machine.layouts.sizeof("swait_queue")))
    wait.task = task.struct
    init_list_head(wait.task_list)
    while True:
        with _completion_locked(machine, completion):
            interrupted = state == TASK_INTERRUPTIBLE and signal_pending(machine, task)
            if completion.done or not timeout or interrupted:
                _off_queue(wait)
                return _come_to_its_end(completion, timeout)
            if list_empty(wait.task_list):
                list_add_tail(wait.task_list, completion.wait.task_list)
            set_current_state(machine, state)
        try:
            timeout = schedule_timeout_in(machine, timeout, "wait_for_completion")
        except BaseException:  # abandoned: nobody may find this waiter any more
            _off_queue(wait)
            raise


def _come_to_its_end(completion: Any, timeout: int) -> int:
    """What a wait that is over returns; a completion that is done is used up, unless it is for everybody."""
    done = completion.done
    if not done:
        return -ERESTARTSYS if timeout else 0
    if done != UINT_MAX:
        completion.done = done - 1
    return timeout or 1


def _completion_locked(machine: "Machine", completion: Any) -> AbstractContextManager[None]:
    return spin_locked(machine, completion.wait.member_("lock"))


def _swake_up_locked(machine: "Machine", completion: Any, *, everybody: bool) -> None:
    for wait in list(list_for_each_entry(completion.wait.task_list, "swait_queue", "task_list")):
        machine.sched.try_to_wake_up(machine.sched.task_of(wait.task))
        _off_queue(wait)
        if not everybody:
            return


def _off_queue(wait: Any) -> None:
    if not list_empty(wait.task_list):
        list_del(wait.task_list)
        init_list_head(wait.task_list)
