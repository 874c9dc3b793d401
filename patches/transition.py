"""From one version of the functions to the next, task by task: kernel/livepatch/transition.c.

A transition gives every task an initial patch_state, marks the funcs as being in transition, switches the
tasks to the target state one by one, and cleans up when all have switched.  As long as no task sleeps inside
guest code, the first attempt switches them all.
"""

from typing import Any

from patches import core, patch
from patches.handler import KLP_PATCHED, KLP_UNDEFINED, KLP_UNPATCHED
from patches.klp import Klp, klp_for_each_func, klp_for_each_object

__all__ = [
    "klp_cancel_transition",
    "klp_complete_transition",
    "klp_init_transition",
    "klp_reverse_transition",
    "klp_start_transition",
    "klp_transition_work_fn",
    "klp_try_complete_transition",
]

TIF_PATCH_PENDING = 1 << 13  # arch/x86/include/asm/thread_info.h


def klp_init_transition(klp: Klp, patch_: Any, state: int) -> None:
    """Set the target state, every task to the other one, and every func of the patch into transition."""
    if klp.klp_target_state.get() != KLP_UNDEFINED:
        klp.warn_once("klp_init_transition", "klp_target_state != KLP_UNDEFINED")
    klp.klp_transition_patch.set(patch_)
    klp.klp_target_state.set(state)
    klp.log.pr_debug(f"livepatch: '{klp.name_of(patch_)}': initializing {_direction(state)} transition")
    initial = KLP_PATCHED if state == KLP_UNPATCHED else KLP_UNPATCHED
    for task in (*klp.tasks(), *klp.idle_tasks()):
        if task.patch_state != KLP_UNDEFINED:
            klp.warn_once("klp_init_transition", "task->patch_state != KLP_UNDEFINED")
        task.patch_state = initial
    # smp_wmb(): the states must be seen before a func that is in transition.
    for obj in klp_for_each_object(patch_):
        for func in klp_for_each_func(obj):
            func.transition = True


def klp_start_transition(klp: Klp) -> None:
    """Mark every task that has not the target state as pending."""
    target = klp.klp_target_state.get()
    name = klp.name_of(klp.transition_patch)
    klp.log.pr_notice(f"livepatch: '{name}': starting {_direction(target)} transition")
    for task in (*klp.tasks(), *klp.idle_tasks()):
        if task.patch_state != target:
            task.thread_info.flags = task.thread_info.flags | TIF_PATCH_PENDING
    klp.klp_signals_cnt.set(0)


def klp_reverse_transition(klp: Klp) -> None:
    """Turn the transition that is on around."""
    patch_ = klp.transition_patch
    target = klp.klp_target_state.get()
    there, back = _direction(target), _direction(1 - target)
    klp.log.pr_debug(f"livepatch: '{klp.name_of(patch_)}': reversing transition from {there} to {back}")
    patch_.enabled = not patch_.enabled
    klp.klp_target_state.set(1 - target)
    for task in (*klp.tasks(), *klp.idle_tasks()):
        task.thread_info.flags = task.thread_info.flags & ~TIF_PATCH_PENDING
    klp.machine.synchronize("klp_synchronize_transition")
    klp_start_transition(klp)


def klp_try_complete_transition(klp: Klp) -> None:
    """Switch the tasks that can be switched; when all are, complete the transition, else try again later."""
    switched = [_klp_try_switch_task(klp, task) for task in (*klp.tasks(), *klp.idle_tasks())]
    if not all(switched):
        klp.klp_signals_cnt.set(klp.klp_signals_cnt.get() + 1)
        klp.transition_work_pending = True
        return
    patch_ = klp.transition_patch
    klp_complete_transition(klp)
    if not patch_.enabled:
        core.klp_free_patch_async(klp, patch_)
    elif patch_.replace:
        core.klp_free_replaced_patches_async(klp, patch_)


def klp_transition_work_fn(klp: Klp) -> None:
    """The delayed work: try once more."""
    klp.transition_work_pending = False
    with core.klp_mutex(klp):
        if klp.transition_patch is not None:
            klp_try_complete_transition(klp)


def klp_cancel_transition(klp: Klp) -> None:
    """Undo a patching transition that was initialised but not started."""
    if klp.klp_target_state.get() != KLP_PATCHED:
        klp.warn_once("klp_cancel_transition", "klp_target_state != KLP_PATCHED")
        return
    name = klp.name_of(klp.transition_patch)
    klp.log.pr_debug(f"livepatch: '{name}': canceling patching transition, going to unpatch")
    klp.klp_target_state.set(KLP_UNPATCHED)
    klp_complete_transition(klp)


def klp_complete_transition(klp: Klp) -> None:
    """All tasks have the target state: unpatch what is replaced or removed, and forget the transition."""
    patch_ = klp.transition_patch
    target = klp.klp_target_state.get()
    name = klp.name_of(patch_)
    klp.log.pr_debug(f"livepatch: '{name}': completing {_direction(target)} transition")
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
    for task in (*klp.tasks(), *klp.idle_tasks()):
        if task.thread_info.flags & TIF_PATCH_PENDING:
            klp.warn_once("klp_complete_transition", "test_tsk_thread_flag(task, TIF_PATCH_PENDING)")
        task.patch_state = KLP_UNDEFINED
    klp.log.pr_notice(f"livepatch: '{name}': {_direction(target)} complete")
    klp.klp_target_state.set(KLP_UNDEFINED)
    klp.klp_transition_patch.set(0)


def _klp_try_switch_task(klp: Klp, task: Any) -> bool:
    target = klp.klp_target_state.get()
    if task.patch_state == target:
        return True
    running = next((each for each in klp.machine.tasks if each.struct == task.address_), None)
    current = klp.machine.hub.current
    if running is not None and running is not current and not running.quiescent:
        comm = task.comm.rstrip(b"\0").decode()
        klp.log.pr_debug(f"livepatch: klp_try_switch_task: {comm}:{task.pid} is running")
        return False
    task.thread_info.flags = task.thread_info.flags & ~TIF_PATCH_PENDING
    task.patch_state = target
    return True


def _direction(state: int) -> str:
    return "patching" if state == KLP_PATCHED else "unpatching"
