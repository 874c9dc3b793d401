"""A task switches itself where it gives its vCPU up: klp_sched_try_switch().

6.1 moves a kernel thread only if it finds it asleep, once a second; one that is always running when somebody
looks holds a transition for ever.  Later kernels let it check its own stack:

- in cond_resched(), since e3ff7c609f39 ("livepatch,sched: Add livepatch task switching to cond_resched()")
  (in v6.4).  In May 2022 "[RFC] sched,livepatch: call klp_try_switch_task in __cond_resched" had tried it.
- in __schedule() instead, but only for a task in a freezable sleep, since 676e8cf70cb0 ("sched,livepatch:
  Untangle cond_resched() and live-patching") (in v6.16): cond_resched() is to disappear.

A transition that starts inside of the block has klp_sched_try_switch_key enabled until it is complete.  The
first commit also changed klp_reverse_transition() to store the new target state behind the sync; that is left
out, as is a task that is preempted between setting a freezable state and schedule().
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from emu.exports import EXPORTS
from emu.machine import Machine
from emu.sched import Scheduler
from emu.thread_info import TIF_PATCH_PENDING, test_tsk_thread_flag
from patches import transition
from patches.klp import Klp
from patches.stack_check import StackCheck
from patches.variants import replaced

__all__ = ["TASK_FREEZABLE", "switching_in_cond_resched", "switching_in_schedule"]

TASK_FREEZABLE = 0x2000  # include/linux/sched.h
# What stands for the static call: the fixtures call the function, modules of a stock kernel the trampoline.
COND_RESCHED = ("__cond_resched", "__SCT__cond_resched")


@contextmanager
def switching_in_cond_resched() -> Iterator[None]:
    """Switch pending tasks in cond_resched(), whether or not anybody else waits for the vCPU.

    As with CONFIG_PREEMPT_DYNAMIC the static call behind cond_resched() is changed while a transition is on,
    also with full preemption (sched_dynamic_klp_enable() of kernel/sched/core.c).
    """

    def enable(klp: Klp) -> None:
        def klp_cond_resched(machine: Machine, registers: dict[str, int]) -> int | None:
            __klp_sched_try_switch(klp)
            return EXPORTS["__cond_resched"](machine, registers)

        klp.machine.traps.exports.update(dict.fromkeys(COND_RESCHED, klp_cond_resched))

    def disable(klp: Klp) -> None:
        klp.machine.traps.exports.update({name: EXPORTS[name] for name in COND_RESCHED})

    with _in_transitions(enable, disable):
        yield


@contextmanager
def switching_in_schedule() -> Iterator[None]:
    """Switch pending tasks in schedule(), if they have set a state with TASK_FREEZABLE."""
    schedule_ = Scheduler.schedule
    enabled: dict[Scheduler, Klp] = {}

    def schedule(sched: Scheduler, what: str = "schedule") -> None:
        klp = enabled.get(sched)
        if klp is not None:
            current = klp.machine.view("task_struct", klp.machine.hub.current.struct)
            if current.__state & TASK_FREEZABLE:
                __klp_sched_try_switch(klp)
        schedule_(sched, what)

    def enable(klp: Klp) -> None:
        enabled[klp.machine.sched] = klp

    def disable(klp: Klp) -> None:
        enabled.pop(klp.machine.sched, None)

    with replaced(Scheduler, "schedule", schedule), _in_transitions(enable, disable):
        yield


def __klp_sched_try_switch(klp: Klp) -> None:
    """The current task checks its own stack; klp_mutex cannot be taken here, nor need it be."""
    machine = klp.machine
    struct = machine.hub.current.struct
    # The flag is read before the target state: klp_init_transition() stores them the other way round.
    if test_tsk_thread_flag(machine, struct, TIF_PATCH_PENDING):
        transition.klp_try_switch_task(klp, machine.view("task_struct", struct), StackCheck(klp))


@contextmanager
def _in_transitions(enable: Callable[[Klp], None], disable: Callable[[Klp], None]) -> Iterator[None]:
    """Call `enable` when a transition starts, and `disable` when it is complete or the block ends.

    A transition that is cancelled before it starts is not enabled, either.
    """
    start = transition.klp_start_transition
    complete = transition.klp_complete_transition
    enabled: dict[Klp, None] = {}

    def klp_start_transition(klp: Klp) -> None:
        start(klp)
        enable(klp)
        enabled[klp] = None

    def klp_complete_transition(klp: Klp) -> None:
        if klp in enabled:
            disable(klp)
            del enabled[klp]
        complete(klp)

    try:
        with (
            replaced(transition, "klp_start_transition", klp_start_transition),
            replaced(transition, "klp_complete_transition", klp_complete_transition),
        ):
            yield
    finally:
        for klp in enabled:
            disable(klp)
