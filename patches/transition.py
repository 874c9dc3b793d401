"""From one version of the functions to the next, task by task: kernel/livepatch/transition.c.

A transition gives every task an initial patch_state, marks the funcs as being in transition, switches the
tasks to the target state one by one, and cleans up when all have switched.  A task switches by itself when it
returns to user space, an idle task in its idle loop; a task that sleeps is switched from outside when none of
the functions that change is on its stack.  What could not be switched is tried again every second.

Each comment at a barrier says what a weaker machine than x86 could reorder without it; the emulated machine
is sequentially consistent, so there the order in the text is the order of the stores.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from emu.events import EventKind
from emu.rwlock import read_locked
from emu.task import Task
from emu.thread_info import (
    PF_KTHREAD,
    TASK_INTERRUPTIBLE,
    TIF_NOTIFY_SIGNAL,
    TIF_PATCH_PENDING,
    clear_tsk_thread_flag,
    set_tsk_thread_flag,
    test_and_clear_tsk_thread_flag,
    test_and_set_tsk_thread_flag,
    test_tsk_thread_flag,
)
from emu.timer import HZ
from patches import core, debug, patch
from patches.callbacks import klp_post_patch_callback, klp_post_unpatch_callback
from patches.handler import KLP_PATCHED, KLP_UNDEFINED, KLP_UNPATCHED
from patches.init_patch import klp_is_object_loaded
from patches.klp import Klp, klp_for_each_func, klp_for_each_object
from patches.stack_check import StackCheck, stack_of

__all__ = [
    "connect",
    "klp_cancel_transition",
    "klp_complete_transition",
    "klp_copy_process",
    "klp_force_transition",
    "klp_init_transition",
    "klp_reverse_transition",
    "klp_send_signals",
    "klp_start_transition",
    "klp_transition_work_fn",
    "klp_try_complete_transition",
    "klp_try_switch_task",
    "klp_update_patch_state",
]

SIGNALS_TIMEOUT = 15
TASKLIST_LOCK = "tasklist_lock"


def connect(klp: Klp) -> None:
    """Put livepatch's calls into the scheduler, fork and the way to user space."""
    klp.machine.klp_update_patch_state = lambda task: klp_update_patch_state(klp, task)
    klp.machine.klp_copy_process = lambda child, parent: klp_copy_process(klp, child, parent)
    klp.log.dynamic_debug.add(debug.CALLSITES)


def klp_init_transition(klp: Klp, patch_: Any, state: int) -> None:
    """Set the target state, every task to the other one, and every func of the patch into transition."""
    if klp.klp_target_state.get() != KLP_UNDEFINED:
        klp.warn_once("klp_init_transition", "klp_target_state != KLP_UNDEFINED")
    klp.klp_transition_patch.set(patch_)
    klp.klp_target_state.set(state)
    klp.log.pr_debug(
        f"livepatch: '{klp.name_of(patch_)}': initializing {_direction(state)} transition", debug.INITIALIZING
    )
    klp.why_not.clear()
    initial = KLP_PATCHED if state == KLP_UNPATCHED else KLP_UNPATCHED
    for task in _each_task(klp):
        if task.patch_state != KLP_UNDEFINED:
            klp.warn_once("klp_init_transition", "task->patch_state != KLP_UNDEFINED")
        task.patch_state = initial
    # smp_wmb(): whoever sees func->transition must see the patch_states, or the handler would find
    # KLP_UNDEFINED; whoever sees TIF_PATCH_PENDING must see the target state, or a task would switch to
    # KLP_UNDEFINED.
    for obj in klp_for_each_object(patch_):
        for func in klp_for_each_func(obj):
            func.transition = True


def klp_start_transition(klp: Klp) -> None:
    """Mark every task that has not the target state as pending."""
    target = klp.klp_target_state.get()
    if target == KLP_UNDEFINED:
        klp.warn_once("klp_start_transition", "klp_target_state == KLP_UNDEFINED")
    name = klp.name_of(klp.transition_patch)
    klp.log.pr_notice(f"livepatch: '{name}': starting {_direction(target)} transition")
    for task in _each_task(klp):
        if task.patch_state != target:
            set_tsk_thread_flag(klp.machine, task.address_, TIF_PATCH_PENDING)
    klp.klp_signals_cnt.set(0)


def klp_reverse_transition(klp: Klp) -> None:
    """Turn the transition that is on around."""
    patch_ = klp.transition_patch
    target = klp.klp_target_state.get()
    there, back = _direction(target), _direction(1 - target)
    klp.log.pr_debug(
        f"livepatch: '{klp.name_of(patch_)}': reversing transition from {there} to {back}", debug.REVERSING
    )
    patch_.enabled = not patch_.enabled
    klp.klp_target_state.set(1 - target)
    klp.why_not.clear()
    # A task that switches itself at this moment could take the old target for the new one: first nobody is
    # asked to switch any more, then whoever had begun comes to an end.
    for task in _each_task(klp):
        clear_tsk_thread_flag(klp.machine, task.address_, TIF_PATCH_PENDING)
    klp.machine.synchronize("klp_synchronize_transition")
    klp_start_transition(klp)


def klp_try_complete_transition(klp: Klp) -> None:
    """Switch the tasks that can be switched; when all are, complete the transition, else try again later."""
    if klp.klp_target_state.get() == KLP_UNDEFINED:
        klp.warn_once("klp_try_complete_transition", "klp_target_state == KLP_UNDEFINED")
    check = StackCheck(klp)
    with read_locked(klp.machine, TASKLIST_LOCK):
        left = sum(not klp_try_switch_task(klp, task, check) for task in klp.tasks())
    left += sum(not _klp_try_switch_idle_task(klp, rq, check) for rq in klp.machine.sched.runqueues)
    if left:
        count = klp.klp_signals_cnt.get()
        if count and count % SIGNALS_TIMEOUT == 0:
            klp_send_signals(klp)
        klp.klp_signals_cnt.set(count + 1)
        delay = klp.machine.timers.round_jiffies_relative(HZ)
        work = partial(klp_transition_work_fn, klp)
        klp.machine.workqueue.schedule_delayed_work("klp_transition_work", work, delay)
        return
    patch_ = klp.transition_patch
    klp_complete_transition(klp)
    if not patch_.enabled:
        core.klp_free_patch_async(klp, patch_)
    elif patch_.replace:
        core.klp_free_replaced_patches_async(klp, patch_)


def klp_transition_work_fn(klp: Klp) -> None:
    """The delayed work: try once more."""
    with core.klp_mutex(klp):
        if klp.transition_patch is not None:
            klp_try_complete_transition(klp)


def klp_cancel_transition(klp: Klp) -> None:
    """Undo a patching transition that was initialised but not started."""
    if klp.klp_target_state.get() != KLP_PATCHED:
        klp.warn_once("klp_cancel_transition", "klp_target_state != KLP_PATCHED")
        return
    name = klp.name_of(klp.transition_patch)
    klp.log.pr_debug(f"livepatch: '{name}': canceling patching transition, going to unpatch", debug.CANCELING)
    klp.klp_target_state.set(KLP_UNPATCHED)
    klp_complete_transition(klp)


def klp_complete_transition(klp: Klp) -> None:
    """All tasks have the target state: unpatch what is replaced or removed, and forget the transition."""
    patch_ = klp.transition_patch
    target = klp.klp_target_state.get()
    name = klp.name_of(patch_)
    klp.log.pr_debug(f"livepatch: '{name}': completing {_direction(target)} transition", debug.COMPLETING)
    if patch_.replace and target == KLP_PATCHED:
        core.klp_unpatch_replaced_patches(klp, patch_)
        core.klp_discard_nops(klp, patch_)
    if target == KLP_UNPATCHED:
        patch.klp_unpatch_objects(klp, patch_)
        # The handler must not find a func of this patch once its transition flag is clear.
        klp.machine.synchronize("klp_synchronize_transition")
    for obj in klp_for_each_object(patch_):
        for func in klp_for_each_func(obj):
            func.transition = False
    if target == KLP_PATCHED:
        # Nor may it see KLP_UNDEFINED while it still took a func to be in transition.
        klp.machine.synchronize("klp_synchronize_transition")
    for task in _each_task(klp):
        if test_tsk_thread_flag(klp.machine, task.address_, TIF_PATCH_PENDING):
            klp.warn_once("klp_complete_transition", "test_tsk_thread_flag(task, TIF_PATCH_PENDING)")
        task.patch_state = KLP_UNDEFINED
    for obj in klp_for_each_object(patch_):
        if not klp_is_object_loaded(obj):
            continue
        if target == KLP_PATCHED:
            klp_post_patch_callback(klp, obj)
        else:
            klp_post_unpatch_callback(klp, obj)
    klp.log.pr_notice(f"livepatch: '{name}': {_direction(target)} complete")
    klp.klp_target_state.set(KLP_UNDEFINED)
    klp.klp_transition_patch.set(0)
    klp.why_not.clear()


def klp_update_patch_state(klp: Klp, task: int) -> None:
    """Switch the task_struct at `task` to the target state, if it is asked to.

    The task must be the current one, or not running; klp_force_transition() does not care.
    """
    # The locked instruction is also a read barrier: behind the flag, the target state that was stored before
    # it; and for the handler, func->transition.
    if test_and_clear_tsk_thread_flag(klp.machine, task, TIF_PATCH_PENDING):
        klp.machine.view("task_struct", task).patch_state = klp.klp_target_state.get()


def klp_try_switch_task(klp: Klp, struct: Any, check: StackCheck) -> bool:
    """Switch a task that does not run and has none of the functions that change on its stack."""
    if struct.patch_state == klp.klp_target_state.get():
        return True
    task = klp.machine.by_struct[struct.address_]
    with klp.machine.sched.task_rq_locked(task):
        problem = _klp_check_and_switch_task(klp, task, struct, check)
    if problem:
        klp.log.pr_debug(
            f"livepatch: klp_try_switch_task: {_comm(struct)}:{struct.pid} {problem}",
            debug.switch_callsite(problem),
        )
        klp.why_not[struct.address_] = problem
    else:
        klp.why_not.pop(struct.address_, None)
    return not problem


def klp_send_signals(klp: Klp) -> None:
    """Ask those that have not switched to come round: user tasks by a fake signal, kthreads by waking."""
    machine = klp.machine
    if klp.klp_signals_cnt.get() == SIGNALS_TIMEOUT:
        klp.log.pr_notice("livepatch: signaling remaining tasks")
    with read_locked(machine, TASKLIST_LOCK):
        for struct in klp.tasks():
            if not test_tsk_thread_flag(machine, struct.address_, TIF_PATCH_PENDING):
                continue
            task = machine.by_struct[struct.address_]
            if struct.flags & PF_KTHREAD or not test_and_set_tsk_thread_flag(
                machine, struct.address_, TIF_NOTIFY_SIGNAL
            ):
                machine.sched.try_to_wake_up(task, TASK_INTERRUPTIBLE)


def klp_copy_process(klp: Klp, child: int, parent: int) -> None:
    """fork: the child begins where the parent is, whatever happened since its flags were copied."""
    machine = klp.machine
    if test_tsk_thread_flag(machine, parent, TIF_PATCH_PENDING):
        set_tsk_thread_flag(machine, child, TIF_PATCH_PENDING)
    else:
        clear_tsk_thread_flag(machine, child, TIF_PATCH_PENDING)
    state = machine.view("task_struct", parent).patch_state
    machine.view("task_struct", child).patch_state = state


def klp_force_transition(klp: Klp) -> None:
    """Switch everybody at once, whatever they are in the middle of; what is removed stays loaded for ever."""
    klp.log.pr_warn("livepatch: forcing remaining tasks to the patched state")
    for task in _each_task(klp):
        klp_update_patch_state(klp, task.address_)
    transition_patch = klp.transition_patch
    if klp.klp_target_state.get() == KLP_UNPATCHED:
        transition_patch.forced = True
    elif transition_patch.replace:
        for patch_ in klp.patches():
            if patch_ != transition_patch:
                patch_.forced = True


def _klp_check_and_switch_task(klp: Klp, task: Task, struct: Any, check: StackCheck) -> str:
    """Why the task cannot be switched, in the words of the kernel's log; "" if it has been."""
    machine = klp.machine
    if machine.sched.task_curr(task) and task is not machine.hub.current:
        return "is running"
    stack = stack_of(klp, task)
    if stack.unreliable:
        return "has an unreliable stack"
    function = check.first_on(stack.entries)
    if function is not None:
        return f"is sleeping on function {function.old_name}"
    clear_tsk_thread_flag(machine, struct.address_, TIF_PATCH_PENDING)
    struct.patch_state = klp.klp_target_state.get()
    machine.events.record(EventKind.SWITCH_POINT, struct.address_, note="stack check")
    return ""


def _klp_try_switch_idle_task(klp: Klp, rq: Any, check: StackCheck) -> bool:
    struct = klp.machine.view("task_struct", rq.idle.struct)
    if rq.online:
        if klp_try_switch_task(klp, struct, check):
            return True
        klp.machine.sched.wake_up_if_idle(rq)
        return False
    if struct.patch_state != klp.klp_target_state.get():
        clear_tsk_thread_flag(klp.machine, struct.address_, TIF_PATCH_PENDING)
        struct.patch_state = klp.klp_target_state.get()
    return True


def _each_task(klp: Klp) -> Iterator[Any]:
    """Every task, under tasklist_lock, and then the idle task of every possible CPU."""
    with read_locked(klp.machine, TASKLIST_LOCK):
        yield from klp.tasks()
    yield from klp.idle_tasks()


def _comm(struct: Any) -> str:
    comm: bytes = struct.comm
    return comm.split(b"\0")[0].decode("ascii", "backslashreplace")


def _direction(state: int) -> str:
    return "patching" if state == KLP_PATCHED else "unpatching"
