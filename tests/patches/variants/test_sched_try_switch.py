"""Kernel threads that are always running when somebody looks: what moves them in which kernel."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
from livepatches import fix_area, livepatch

from elf.errors import KlpemuError
from emu.exports import EXPORTS
from emu.sched import Scheduler
from emu.schedules import Seeded
from klpemu import Func, Kernel
from klpemu.tasks import TaskState
from patches import transition
from patches.variants.sched_try_switch import (
    TASK_FREEZABLE,
    switching_in_cond_resched,
    switching_in_schedule,
)

PAGE_OF_DOCS = Path(__file__).resolve().parents[3] / "docs" / "variants.md"
STEPS = (Func("step_one", "new_step_one"), Func("step_two", "new_step_two"))
INTERRUPTIBLE = 1
VARIANTS = (nullcontext, switching_in_cond_resched, switching_in_schedule)
Variant = Callable[[], AbstractContextManager[None]]

# Kernel threads that never end.  One jiffy's sleep after so much work is hardly ever seen from outside.
WORK = ("work(1000000000)",)  # offers its vCPU to others, who do not want it
CRUNCH = ("crunch(1000000000)",)  # never does
FREEZABLE_NAP = ("crunch(8000)", f"usleep_range_state(4000, 4000, {INTERRUPTIBLE | TASK_FREEZABLE})")
NAP = ("crunch(8000)", f"usleep_range_state(4000, 4000, {INTERRUPTIBLE})")
# Virtual milliseconds; the attempts to switch it come 1 s and 2 s after the transition begins.
LONG = 2100


def busy_kernel(program: tuple[str, ...], *, observe: bool = False) -> Kernel:
    """A kernel whose second vCPU is busy, just behind a whole second (INITIAL_JIFFIES is none)."""
    kernel = Kernel.load(cpus=2, observe=observe)
    kernel.tasks.run(820)
    kernel.tasks.spawn("busy", program, kthread=True, cpu=1, repeat=None)
    kernel.tasks.run(20)
    return kernel


def state(kernel: Kernel) -> TaskState:
    (found,) = (each for each in kernel.tasks.states() if each.name == "busy")
    return found


def is_moved(variant: Variant, program: tuple[str, ...]) -> bool:
    """Does the busy task switch while fix_steps is in transition, for as long as we look?"""
    with variant():
        kernel = busy_kernel(program)
        kernel.enable(livepatch("fix_steps", *STEPS))
        assert kernel.in_transition == "fix_steps"
        assert state(kernel).pending
        return kernel.tasks.run(LONG, lambda: not kernel.in_transition)


def is_enabled(kernel: Kernel) -> bool:
    """The static call behind cond_resched() is klp_cond_resched(), for the fixtures and for stock modules."""
    exports = kernel.machine.traps.exports
    changed = {exports[name] is not EXPORTS[name] for name in ("__cond_resched", "__SCT__cond_resched")}
    assert len(changed) == 1
    return changed.pop()


# cond_resched(), v6.4 to v6.15.


def test_without_a_variant_a_thread_that_is_always_running_holds_the_transition() -> None:
    kernel = busy_kernel(WORK)
    kernel.enable(livepatch("fix_steps", *STEPS))
    kernel.tasks.run(LONG)
    assert kernel.in_transition == "fix_steps"
    assert state(kernel).why == "is running"
    assert {each.name for each in kernel.tasks.states() if each.pending} == {"busy"}


def test_cond_resched_moves_a_thread_that_offers_its_cpu_to_nobody_in_particular() -> None:
    with switching_in_cond_resched():
        kernel = busy_kernel(WORK, observe=True)
        kernel.enable(livepatch("fix_steps", *STEPS))
        kernel.tasks.run(4)
        assert (state(kernel).version, state(kernel).pending) == ("patched", False)
        assert kernel.tasks.run(LONG, lambda: not kernel.in_transition)
        kernel.verify("patched").raise_for_findings()
        kernel.disable("fix_steps")
        kernel.tasks.run(4)
        assert (state(kernel).version, state(kernel).pending) == ("unpatched", False)
        kernel.verify("unpatched").raise_for_findings()


def test_in_cond_resched_too_the_functions_that_change_must_not_be_on_the_stack() -> None:
    with switching_in_cond_resched():
        kernel = busy_kernel(WORK)
        kernel.enable(livepatch("fix_steps", Func("work", "new_nap")))
        kernel.tasks.run(20)
        assert state(kernel).pending
        assert "livepatch: klp_try_switch_task: busy:4 is sleeping on function work" in kernel.log


def test_cond_resched_does_not_move_a_thread_that_never_calls_it() -> None:
    assert not is_moved(switching_in_cond_resched, CRUNCH)


# A freezable sleep, since v6.16.


def test_schedule_moves_a_thread_in_a_freezable_sleep_that_nobody_would_have_seen() -> None:
    with switching_in_schedule():
        kernel = busy_kernel(FREEZABLE_NAP, observe=True)
        kernel.enable(livepatch("fix_steps", *STEPS))
        assert kernel.tasks.run(LONG, lambda: not kernel.in_transition)
        kernel.verify("patched").raise_for_findings()
    assert not is_moved(nullcontext, FREEZABLE_NAP)


def test_schedule_does_not_move_a_thread_in_any_other_sleep() -> None:
    assert not is_moved(switching_in_schedule, NAP)


# The static key.


def test_the_key_is_enabled_from_the_start_of_a_transition_to_its_end() -> None:
    with switching_in_cond_resched():
        kernel = busy_kernel(("nap(2500)", "sleep(100)"))
        assert not is_enabled(kernel)
        kernel.enable(livepatch("fix_steps", Func("nap", "new_nap")))
        assert is_enabled(kernel)
        kernel.reverse("fix_steps")
        assert is_enabled(kernel)
        kernel.tasks.wait_for_transition()
        assert not is_enabled(kernel)


def test_the_key_is_not_enabled_for_a_transition_that_is_cancelled() -> None:
    funcs = Func("area_of", "fixed_area_of"), Func("notrace_add", "fixed_perimeter_of")
    with switching_in_cond_resched():
        kernel = Kernel.load()
        with pytest.raises(KlpemuError, match="failed to find location"):
            kernel.enable(livepatch("fix_area", *funcs))
        assert not is_enabled(kernel)


@pytest.mark.parametrize("variant", [switching_in_cond_resched, switching_in_schedule])
def test_a_variant_is_gone_when_its_block_ends_in_mid_transition(variant: Variant) -> None:
    names = ("klp_start_transition", "klp_complete_transition")
    before = [getattr(transition, name) for name in names]
    schedule = Scheduler.schedule
    kernel = busy_kernel(CRUNCH)
    other = Kernel.load()
    with variant():
        assert [getattr(transition, name) for name in names] != before
        kernel.enable(livepatch("fix_steps", *STEPS))
        other.enable(fix_area())
    assert kernel.in_transition == "fix_steps"
    assert [getattr(transition, name) for name in names] == before
    assert Scheduler.schedule is schedule
    assert not is_enabled(kernel)
    assert not is_enabled(other)


# What 6.1 does with such a thread all the same.


def test_without_a_variant_a_transition_that_a_thread_holds_can_be_reversed() -> None:
    """klp_synchronize_transition() gets the vCPU at the thread's next cond_resched()."""
    kernel = busy_kernel(WORK)
    kernel.enable(livepatch("fix_steps", *STEPS))
    kernel.reverse("fix_steps")
    assert not state(kernel).pending
    kernel.tasks.run(LONG)
    assert {each.version for each in kernel.tasks.states()} == {"unpatched"}


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_task_can_switch_itself_whatever_the_schedule(cpus: int) -> None:
    """It holds its own run queue's lock then, and goes on."""
    kernel = Kernel.load(cpus=cpus)
    kernel.machine.hub.schedule = Seeded(1)
    kernel.enable(fix_area())
    kernel.tasks.wait_for_transition()
    kernel.verify().raise_for_findings()


def test_the_table_in_the_docs_is_what_happens() -> None:
    rows = {
        "only ever calls `cond_resched()`": WORK,
        "sleeps freezably now and then": FREEZABLE_NAP,
        "sleeps otherwise now and then": NAP,
        "never gives its vCPU up": CRUNCH,
    }
    text = PAGE_OF_DOCS.read_text()
    for name, program in rows.items():
        cells = " | ".join("yes" if is_moved(variant, program) else "no" for variant in VARIANTS)
        assert f"| {name} | {cells} |" in text, (name, cells)
