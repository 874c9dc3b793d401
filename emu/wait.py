"""Wait queues and completions in guest memory: kernel/sched/wait.c, completion.c, swait.c.

The queues are the kernel's lists, with the waiters' entries on the waiters' own stacks.
"""

from typing import TYPE_CHECKING, Any

from emu.entry import signal_pending
from emu.exports import export
from emu.list import init_list_head, list_add, list_add_tail, list_del, list_empty
from emu.sleep import schedule_timeout_in, set_current_state
from emu.thread_info import TASK_INTERRUPTIBLE, TASK_RUNNING, TASK_UNINTERRUPTIBLE
from emu.timer import MAX_SCHEDULE_TIMEOUT
from emu.view import list_for_each_entry

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = [
    "autoremove_wake_function",
    "complete",
    "complete_all",
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
    if list_empty(wait.entry):
        list_add(wait.entry, machine.view("wait_queue_head", head).head)
    set_current_state(machine, state & 0xFFFF_FFFF)


@export
def prepare_to_wait_event(machine: "Machine", head: int, entry: int, state: int) -> int:
    """What wait_event() does before it looks at its condition; -ERESTARTSYS if a signal ends the wait."""
    wait = machine.view("wait_queue_entry", entry)
    if state & TASK_INTERRUPTIBLE and signal_pending(machine, machine.hub.current):
        list_del(wait.entry)
        init_list_head(wait.entry)
        return -ERESTARTSYS
    queue = machine.view("wait_queue_head", head)
    if list_empty(wait.entry):
        (list_add_tail if wait.flags & WQ_FLAG_EXCLUSIVE else list_add)(wait.entry, queue.head)
    set_current_state(machine, state & 0xFFFF_FFFF)
    return 0


@export
def finish_wait(machine: "Machine", _head: int, entry: int) -> None:
    """Off the queue, and running again."""
    set_current_state(machine, TASK_RUNNING)
    wait = machine.view("wait_queue_entry", entry)
    if not list_empty(wait.entry):
        list_del(wait.entry)
        init_list_head(wait.entry)


@export
def default_wake_function(machine: "Machine", entry: int, mode: int) -> int:
    """Wake the entry's task."""
    task = machine.view("wait_queue_entry", entry).private
    return int(machine.sched.try_to_wake_up(machine.by_struct[task], mode & 0xFFFF_FFFF))


@export
def autoremove_wake_function(machine: "Machine", entry: int, mode: int) -> int:
    """Wake the entry's task, and take the entry off its queue if that slept."""
    wait = machine.view("wait_queue_entry", entry)
    woken = machine.sched.try_to_wake_up(machine.by_struct[wait.private], mode & 0xFFFF_FFFF)
    if woken:
        list_del(wait.entry)
        init_list_head(wait.entry)
    return int(woken)


@export
def __wake_up(machine: "Machine", head: int, mode: int, nr_exclusive: int, key: int) -> int:
    """Call the function of every entry, up to the exclusive ones that suffice; how many were woken."""
    queue, woken = machine.view("wait_queue_head", head), 0
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
    _wait_for_common(machine, completion, MAX_SCHEDULE_TIMEOUT, TASK_UNINTERRUPTIBLE)


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
def complete(machine: "Machine", completion: int) -> None:
    """Let one waiter go on, now or when it comes."""
    done = machine.view("completion", completion)
    if done.done != UINT_MAX:
        done.done = done.done + 1
    _swake_up(machine, done, everybody=False)


@export
def complete_all(machine: "Machine", completion: int) -> None:
    """Let everybody go on, now and for ever."""
    done = machine.view("completion", completion)
    done.done = UINT_MAX
    _swake_up(machine, done, everybody=True)


def _wait_for_common(machine: "Machine", address: int, timeout: int, state: int) -> int:
    completion = machine.view("completion", address)
    task = machine.hub.current
    if not completion.done:
        wait = machine.view("swait_queue", machine.on_stack(machine.layouts.sizeof("swait_queue")))
        wait.task = task.struct
        init_list_head(wait.task_list)
        while not completion.done and timeout:
            if state == TASK_INTERRUPTIBLE and signal_pending(machine, task):
                _off_queue(wait)
                return -ERESTARTSYS
            if list_empty(wait.task_list):
                list_add_tail(wait.task_list, completion.wait.task_list)
            set_current_state(machine, state)
            timeout = schedule_timeout_in(machine, timeout, "wait_for_completion")
        set_current_state(machine, TASK_RUNNING)
        _off_queue(wait)
        if not completion.done:
            return 0
    if completion.done != UINT_MAX:
        completion.done = completion.done - 1
    return timeout or 1


def _swake_up(machine: "Machine", completion: Any, *, everybody: bool) -> None:
    for wait in list(list_for_each_entry(completion.wait.task_list, "swait_queue", "task_list")):
        machine.sched.try_to_wake_up(machine.by_struct[wait.task])
        _off_queue(wait)
        if not everybody:
            return


def _off_queue(wait: Any) -> None:
    if not list_empty(wait.task_list):
        list_del(wait.task_list)
        init_list_head(wait.task_list)
