"""Transitions with tasks that are in the middle of something: kernel/livepatch/transition.c, task by task."""

from collections.abc import Sequence

import pytest
from livepatches import Raw, livepatch
from sleepers import NAP, NEW, NEWER, OLD, log_since, results, sleeper, state, steps

from emu.schedules import Seeded
from emu.task import Task
from klpemu import Func, Kernel
from klpemu.tasks import TransitionStuck


@pytest.fixture
def kernel() -> Kernel:
    """One vCPU, every call observed."""
    return Kernel.load(observe=True)


# Who is switched, when, and how.


def test_a_task_that_sleeps_in_a_patched_function_keeps_the_old_version_until_it_leaves(
    kernel: Kernel,
) -> None:
    sleeper(kernel, "nap(3000)", "both_steps()")
    kernel.enable(steps(NAP))
    assert kernel.in_transition == "fix_steps"
    assert state(kernel, "sleeper").why == "is sleeping on function nap"
    assert state(kernel, "sleeper").version == "unpatched"
    assert {each.version for each in kernel.tasks.states() if each.name != "sleeper"} == {"patched"}
    kernel.verify("in transition").raise_for_findings()
    kernel.tasks.wait_for_transition()
    kernel.tasks.run(6000)
    assert results(kernel, "sleeper")[:3] == [1, NEW, 2], "nap was old to its end, then all is new"
    kernel.verify("after").raise_for_findings()


def test_a_task_that_sleeps_elsewhere_is_switched_at_once_by_the_stack_check(kernel: Kernel) -> None:
    sleeper(kernel, "nap_below(4, 3000)")
    kernel.enable(steps())
    assert kernel.in_transition == ""
    kernel.verify("after").raise_for_findings()


def test_the_old_version_is_looked_for_however_deep_it_is_on_the_stack(kernel: Kernel) -> None:
    sleeper(kernel, "nap_below(6, 3000)")
    kernel.enable(livepatch("fix_steps", Func("nap_below", "new_nap")))
    assert state(kernel, "sleeper").why == "is sleeping on function nap_below"
    kernel.reverse("fix_steps")
    assert kernel.in_transition == "fix_steps", "a reversal leaves the rest to the work that is scheduled"
    kernel.tasks.wait_for_transition()
    assert kernel.machine.timers.seconds < 3


def test_with_two_patches_the_version_in_between_is_what_must_not_be_on_the_stack(kernel: Kernel) -> None:
    """list_is_singular(): the original, else the previous func; here a sleeper in the middle version."""
    kernel.enable(livepatch("fix_steps", NAP))
    sleeper(kernel, "nap(5000)")
    original = sleeper_in_original = state(kernel, "sleeper")
    assert any("new_nap" in each for each in sleeper_in_original.stack), original
    kernel.enable(livepatch("fix_steps2", NAP))
    assert state(kernel, "sleeper").why == "is sleeping on function nap"
    kernel.tasks.wait_for_transition()
    kernel.tasks.run(5500)
    assert results(kernel, "sleeper") == [2, 3]


def test_a_sleeper_in_the_original_does_not_hold_a_patch_on_top_of_another(kernel: Kernel) -> None:
    """Only a version that is taken over from counts: who sleeps in one below it is switched."""
    sleeper(kernel, "nap(60000)")
    kernel.enable(livepatch("fix_steps", NAP))
    kernel.force("fix_steps")
    kernel.tasks.wait_for_transition()
    assert kernel.in_transition == ""
    kernel.enable(livepatch("fix_steps2", NAP))
    assert kernel.in_transition == ""


def test_when_unpatching_the_patchs_own_function_must_not_be_on_the_stack(kernel: Kernel) -> None:
    kernel.enable(livepatch("fix_steps", NAP))
    sleeper(kernel, "nap(5000)")
    kernel.disable("fix_steps")
    assert state(kernel, "sleeper").why == "is sleeping on function nap"
    assert state(kernel, "sleeper").version == "patched"
    kernel.tasks.wait_for_transition()
    kernel.tasks.run(6000)
    assert results(kernel, "sleeper") == [2, 1]
    kernel.verify("after").raise_for_findings()


def test_a_user_task_switches_by_itself_when_it_returns_to_user_space(kernel: Kernel) -> None:
    sleeper(kernel, "nap(300)", "both_steps()")
    kernel.enable(steps(NAP))
    kernel.tasks.run(350)  # long before the next attempt
    assert state(kernel, "sleeper").version == "patched"
    assert not state(kernel, "sleeper").pending
    assert results(kernel, "sleeper")[:2] == [1, NEW]


def test_an_idle_task_switches_in_its_idle_loop() -> None:
    kernel = Kernel.load(cpus=2, observe=True)
    kernel.enable(steps())
    assert "livepatch: klp_try_switch_task: swapper/1:0 is running" in kernel.log
    assert kernel.in_transition
    assert state(kernel, "swapper/1").pending
    kernel.tasks.run(4)
    assert state(kernel, "swapper/1").version == "patched"
    kernel.tasks.wait_for_transition()
    assert kernel.machine.timers.seconds <= 1.5


def test_the_idle_task_of_a_vcpu_that_is_offline_is_switched_at_once() -> None:
    kernel = Kernel.load(cpus=2, observe=True)
    kernel.machine.sched.runqueues[1].online = False
    kernel.enable(steps())
    assert kernel.in_transition == ""


def test_a_kthread_never_returns_to_user_space_and_is_switched_where_it_sleeps(kernel: Kernel) -> None:
    sleeper(kernel, "nap(1500)", "both_steps()", "sleep(5000)", kthread=True)
    kernel.enable(steps(NAP))
    kernel.tasks.run(1600)
    assert results(kernel, "sleeper") == [1, OLD], "still old: nobody has looked at it since"
    kernel.tasks.wait_for_transition()
    assert state(kernel, "sleeper").doing == "sleep(5000): nanosleep"


def test_a_task_that_runs_in_user_space_is_moved_by_an_interrupt(kernel: Kernel) -> None:
    kernel = Kernel.load(cpus=2, observe=True)
    kernel.tasks.spawn("computing", ["user(60000)"], cpu=1)
    kernel.tasks.run(100)
    kernel.enable(steps())
    assert "is running" in "".join(log_since(kernel, 0))
    kernel.tasks.run(20)
    assert state(kernel, "computing").version == "patched"
    kernel.tasks.wait_for_transition()
    assert kernel.machine.timers.seconds < 3


# Retries, signals.


def test_retries_come_at_whole_virtual_seconds(kernel: Kernel) -> None:
    sleeper(kernel, "nap(5300)")
    kernel.tasks.run(330)
    kernel.enable(steps(NAP))
    seconds, lines = [], len(kernel.log)
    while kernel.in_transition:
        kernel.tasks.run(4)
        if any("sleeping on function" in line for line in kernel.log[lines:]):
            seconds.append(kernel.machine.timers.jiffies % 250)
        lines = len(kernel.log)
    assert len(seconds) >= 4
    assert set(seconds) == {1}, "one jiffy later this test looks"


def test_after_fifteen_retries_user_tasks_get_a_fake_signal_and_the_log_says_so_once(kernel: Kernel) -> None:
    """A task in pause() is moved by it, one in msleep() is not."""
    pausing, napping = Func("sys_pause", "new_nap"), NAP
    sleeper(kernel, "sys_pause()", name="pausing")
    sleeper(kernel, "nap(40000)", "sleep(60000)", name="napping")
    began = kernel.machine.timers.seconds
    kernel.enable(livepatch("fix_steps", pausing, napping))
    kernel.tasks.run(30_000, lambda: state(kernel, "pausing").version == "patched")
    assert 14 < kernel.machine.timers.seconds - began < 17
    assert state(kernel, "napping").version == "unpatched"
    kernel.tasks.wait_for_transition()
    assert kernel.log.count("livepatch: signaling remaining tasks") == 1


def test_kthreads_are_woken_from_an_interruptible_sleep(kernel: Kernel) -> None:
    sleeper(kernel, "sys_pause()", "sleep(1000000)", kthread=True)
    kernel.enable(livepatch("fix_steps", Func("sys_pause", "new_nap")))
    kernel.tasks.run(14_000)
    assert state(kernel, "sleeper").doing.startswith("sys_pause")
    kernel.tasks.wait_for_transition()
    assert kernel.machine.timers.seconds < 20


def test_a_transition_that_cannot_end_is_reported_with_the_tasks_in_the_way(kernel: Kernel) -> None:
    sleeper(kernel, "nap(1000000000)")
    kernel.enable(steps(NAP))
    with pytest.raises(TransitionStuck) as caught:
        kernel.tasks.wait_for_transition()
    assert [each.name for each in caught.value.tasks] == ["sleeper"]
    report = caught.value.report()
    assert "sleeper:3 is sleeping on function nap" in report
    assert "nap+0x" in report
    assert "msleep+0x" in report
    kernel.reverse("fix_steps")
    kernel.tasks.wait_for_transition()
    assert kernel.enabled == []


# What the stack check cannot see.


def test_a_patch_that_leaves_the_caller_out_lets_a_sleeper_mix_across_a_switch_point(kernel: Kernel) -> None:
    """transact() is not patched: asleep between its two calls it is switched, rightly by the rules.

    The consistency model knows functions on stacks, not meanings; whoever wants both calls alike patches
    their caller, too.
    """
    sleeper(kernel, "transact(3000)")
    kernel.enable(steps())
    assert kernel.in_transition == ""
    kernel.tasks.run(3500)
    assert results(kernel, "sleeper") == [0x12]
    kernel.verify("after").raise_for_findings()


def test_an_unreliable_stack_keeps_a_task_where_it_is(kernel: Kernel) -> None:
    task = sleeper(kernel, "nap_below(3, 3000)")
    raw = Raw(kernel)
    sp = raw.view("task_struct", task.struct).thread.sp
    slot = next(
        at
        for at in range(sp, task.stack_top, 8)
        if kernel.machine.kallsyms.describe(raw.u64(at)).startswith("nap_below+")
    )
    kept = raw.put(slot, 0xFFFF_FFFF_DEAD_0000)
    kernel.enable(steps())
    assert state(kernel, "sleeper").why == "has an unreliable stack"
    assert "livepatch: klp_try_switch_task: sleeper:3 has an unreliable stack" in kernel.log
    raw.put(slot, int.from_bytes(kept, "little"))
    kernel.tasks.wait_for_transition()


@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_schedule_nobody_mixes_versions(seed: int) -> None:
    """Any order at doors and instructions, two vCPUs: the property that all of it is for.

    Full preemption only up to the first patch; the test below says why.
    """
    kernel = Kernel.load(cpus=2, observe=True)
    kernel.machine.hub.schedule = Seeded(seed)
    kernel.machine.sched.full_preemption = True
    programs: Sequence[Sequence[str]] = (
        ["both_steps()", "sleep(12)"],
        ["transact(40)", "sleep(20)"],
        ["nap(30)", "both_steps()"],
        ["crunch(20)", "sleep(30)"],
    )
    for number, program in enumerate(programs):
        kernel.tasks.spawn(f"task_{number}", program, repeat=None, cpu=number % 2)
    for number in range(2):
        kernel.tasks.spawn(f"kthread_{number}", ["both_steps()", "sleep(30)"], kthread=True, repeat=None)
    kernel.tasks.run(100)
    transact = Func("transact", "new_transact")
    kernel.enable(steps(NAP, transact))
    kernel.tasks.wait_for_transition()
    kernel.verify("enabled").raise_for_findings()
    kernel.machine.sched.full_preemption = False
    kernel.tasks.run(20)
    assert not any(task.preempted for task in kernel.machine.tasks)
    kernel.enable(steps(NAP, code="fix_steps2", replace=True))
    kernel.tasks.run(50)
    kernel.reverse("fix_steps2") if kernel.in_transition else None
    kernel.tasks.wait_for_transition()
    kernel.verify("replaced, or not").raise_for_findings()
    for each in [each.patch.name for each in kernel.enabled]:
        kernel.disable(each)
        kernel.tasks.wait_for_transition()
    report = kernel.verify("disabled")
    report.raise_for_findings()
    # A task that is taken off between two calls in a function that is not patched may be switched there.
    seen = {value for each in kernel.tasks.states() for text, value in each.returned if "both" in text}
    assert OLD in seen
    assert seen & {NEW, NEWER}


class OneFirst:
    """Nobody but the task that the host waits for."""

    interleaves = False

    def pick(self, tasks: Sequence[Task], finishing: Task) -> tuple[Task, int | None]:
        return (finishing if finishing in tasks else tasks[0]), None


@pytest.mark.parametrize("stacked", [False, True], ids=["over the original", "over another patch"])
def test_with_full_preemption_a_task_can_be_switched_between_the_handlers_answer_and_the_return(
    stacked: bool,
) -> None:
    """Found by klpemu, in the rules of 6.1; a kernel that is not booted with preempt=full cannot get there.

    The handler has stored new_func in pt_regs.ip and preemption is on again, but the trampoline has not yet
    copied it to the return slot, where the unwinder would see it: the stack still says original+0x5.  Over
    the original that is enough to hold the task; over another patch only that patch's function counts, which
    is not on the stack yet, and then runs although the task was switched.
    """
    kernel = Kernel.load(observe=True)
    machine = kernel.machine
    if stacked:
        kernel.enable(steps())
    else:
        kernel.enable(livepatch("fix_area", Func("area_of", "fixed_area_of")))
    victim = kernel.tasks.spawn("victim", ["both_steps()", "sleep(9000)"], kthread=True)
    other = kernel.tasks.spawn("other", ["crunch(3)"], kthread=True)
    machine.hub.advance(victim)
    decided = machine.symbol("ftrace_call") - machine.symbol("ftrace_caller") + 5
    site = kernel.address_of("step_one") + 5
    for _ in range(1000):
        machine.hub.advance(victim, 1)
        rip = victim.cpu.registers()["rip"]
        if machine.kallsyms.describe(rip).startswith(f"ftrace_trampoline+{decided:#x}/") or (
            not stacked and rip == site
        ):
            break
    machine.sched.full_preemption = True
    machine.hub.advance(other)
    assert victim.preempted
    assert any(each.startswith("step_one+0x5/") for each in state(kernel, "victim").stack)
    schedule, machine.hub.schedule = machine.hub.schedule, OneFirst()
    kernel.enable(steps(code="fix_steps2"))
    machine.hub.schedule = schedule
    assert kernel.in_transition == ("" if stacked else "fix_steps2")
    kernel.tasks.run(3000)
    if stacked:
        assert results(kernel, "victim") == [0x23]
        (finding,) = kernel.verify().findings
        assert "called the old new_step_one and then the new new_step_two of 'fix_steps2'" in finding.what
    else:
        assert results(kernel, "victim") == [OLD]
        kernel.tasks.wait_for_transition()
        kernel.verify().raise_for_findings()
