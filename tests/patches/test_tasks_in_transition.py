"""Transitions with tasks that are in the middle of something: kernel/livepatch/transition.c, task by task."""

from collections.abc import Sequence

import pytest
from livepatches import Raw, livepatch

from emu.errno import KernelErrno
from emu.schedules import Seeded
from emu.task import Task
from klpemu import Func, Kernel, Patch
from klpemu.tasks import TaskState, TransitionStuck

STEPS = (Func("step_one", "new_step_one"), Func("step_two", "new_step_two"))
NAP = Func("nap", "new_nap")
OLD, NEW, NEWER = 0x11, 0x22, 0x33


def steps(*more: Func, code: str = "fix_steps", replace: bool = False) -> Patch:
    """Another version of step_one and step_two."""
    return livepatch(code, *STEPS, *more, replace=replace)


@pytest.fixture
def kernel() -> Kernel:
    """One vCPU, every call observed."""
    return Kernel.load(observe=True)


def state(kernel: Kernel, name: str) -> TaskState:
    (found,) = (each for each in kernel.tasks.states() if each.name == name)
    return found


def sleeper(kernel: Kernel, *program: str, name: str = "sleeper", kthread: bool = False) -> Task:
    """A task that is asleep in the first call of its program, which it repeats for ever."""
    task = kernel.tasks.spawn(name, program, kthread=kthread, repeat=None)
    kernel.tasks.run(100)
    return task


def results(kernel: Kernel, name: str) -> list[int]:
    return [value for _, value in state(kernel, name).returned]


def log_since(kernel: Kernel, count: int) -> list[str]:
    return [line.removeprefix("livepatch: ") for line in kernel.log[count:]]


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


# One transition at a time; turning round; forcing.


def test_a_second_transition_is_refused_while_one_is_on(kernel: Kernel) -> None:
    kernel.enable(livepatch("fix_area", Func("area_of", "fixed_area_of")))
    sleeper(kernel, "nap(3000)")
    kernel.enable(steps(NAP))
    before = len(kernel.log)
    with pytest.raises(KernelErrno) as enabling:
        kernel.enable(livepatch("fix_steps2", NAP))
    with pytest.raises(KernelErrno) as disabling:
        kernel.disable("fix_area")
    assert (enabling.value.name, disabling.value.name) == ("EBUSY", "EBUSY")
    assert log_since(kernel, before) == []
    kernel.verify("refused").raise_for_findings()
    kernel.tasks.wait_for_transition()
    kernel.disable("fix_area")
    kernel.tasks.wait_for_transition()


def test_patching_is_reversed_in_the_middle(kernel: Kernel) -> None:
    sleeper(kernel, "nap(5000)", "both_steps()")
    sleeper(kernel, "both_steps()", "sleep(100)", name="worker")
    kernel.enable(steps(NAP))
    kernel.tasks.run(500)
    assert results(kernel, "worker")[-1] == NEW
    before = len(kernel.log)
    kernel.disable("fix_steps")
    kernel.tasks.wait_for_transition()
    assert kernel.enabled == []
    kernel.tasks.run(500)
    assert results(kernel, "worker")[-1] == OLD
    assert log_since(kernel, before)[:2] == [
        "'fix_steps': reversing transition from patching to unpatching",
        "'fix_steps': starting unpatching transition",
    ]
    assert log_since(kernel, before)[-1] == "'fix_steps': unpatching complete"
    kernel.verify("after").raise_for_findings()


def test_unpatching_is_reversed_in_the_middle(kernel: Kernel) -> None:
    kernel.enable(steps(NAP))
    sleeper(kernel, "nap(5000)", "both_steps()")
    kernel.disable("fix_steps")
    assert state(kernel, "sleeper").version == "patched"
    kernel.reverse("fix_steps")
    assert "livepatch: 'fix_steps': reversing transition from unpatching to patching" in kernel.log
    kernel.tasks.wait_for_transition()
    assert [each.patch.name for each in kernel.enabled] == ["fix_steps"]
    kernel.verify("after").raise_for_findings()
    kernel.tasks.run(6000)
    assert results(kernel, "sleeper")[:2] == [2, NEW]


def test_a_reversal_and_back_again_ends_where_it_began(kernel: Kernel) -> None:
    sleeper(kernel, "nap(5000)", "both_steps()")
    # Somebody must stay switched, or each reversal would complete at once.
    kernel.tasks.spawn("other", ["nap(9000)"])
    kernel.enable(steps(NAP))
    kernel.tasks.run(4950)
    assert state(kernel, "sleeper").version == "patched"
    kernel.disable("fix_steps")
    assert kernel.in_transition == "fix_steps"
    kernel.reverse("fix_steps")
    kernel.tasks.wait_for_transition()
    kernel.verify("after").raise_for_findings()
    assert [each.patch.name for each in kernel.enabled] == ["fix_steps"]


def test_forcing_switches_everybody_and_its_price_is_found(kernel: Kernel) -> None:
    """transact() has called the old step_one; forced, it goes on with the new step_two."""
    sleeper(kernel, "transact(3000)")
    kernel.enable(steps(Func("transact", "new_transact")))
    assert state(kernel, "sleeper").version == "unpatched"
    kernel.force("fix_steps")
    assert "livepatch: forcing remaining tasks to the patched state" in kernel.log
    kernel.tasks.wait_for_transition()
    kernel.tasks.run(3500)
    assert results(kernel, "sleeper") == [0x12]
    report = kernel.verify("forced")
    assert [each.invariant for each in report.findings] == ["versions_are_never_mixed"]
    assert "called the old transact and then the new new_step_two" in report.findings[0].what


def test_a_patch_whose_removal_was_forced_keeps_its_module(kernel: Kernel) -> None:
    kernel.enable(steps(NAP))
    sleeper(kernel, "nap(5000)")
    module = kernel.enabled[0].module
    kernel.disable("fix_steps")
    kernel.force("fix_steps")
    kernel.tasks.wait_for_transition()
    assert kernel.enabled == []
    assert "fix_steps" in kernel.machine.modules.objects
    assert kernel.machine.view("module", module.struct).refcnt.counter == 1
    kernel.tasks.run(11_000)
    assert results(kernel, "sleeper") == [2, 1], "it could return into the code, which is still there"


def test_a_replaced_patch_keeps_its_module_if_the_replacement_was_forced(kernel: Kernel) -> None:
    kernel.enable(steps(NAP))
    sleeper(kernel, "nap(5000)")
    kernel.enable(steps(code="fix_steps2", replace=True))
    kernel.force("fix_steps2")
    kernel.tasks.wait_for_transition()
    assert [each.patch.name for each in kernel.enabled] == ["fix_steps2"]
    assert "fix_steps" in kernel.machine.modules.objects


def test_forcing_a_patch_that_is_not_in_transition_is_einval(kernel: Kernel) -> None:
    kernel.enable(steps())
    with pytest.raises(KernelErrno) as caught:
        kernel.force("fix_steps")
    assert caught.value.name == "EINVAL"


# Fork and exit.


def test_a_child_has_its_parents_state_and_flag(kernel: Kernel) -> None:
    kernel.tasks.spawn("parent", ["nap(2000)", "fork", "both_steps()", "sleep(100000)"])
    kernel.tasks.spawn("other", ["nap(60000)"])
    kernel.tasks.run(100)
    kernel.enable(steps(NAP))
    kernel.tasks.run(100)
    parents = kernel.tasks.named("parent")
    assert len(parents) == 1
    struct = kernel.machine.view("task_struct", parents[0].struct)
    assert (struct.patch_state, bool(struct.thread_info.flags & 1 << 13)) == (0, True)
    child: list[tuple[int, bool, int, bool]] = []
    copy = kernel.machine.klp_copy_process

    def look(new: int, parent: int) -> None:
        copy(new, parent)
        views = [kernel.machine.view("task_struct", each) for each in (new, parent)]
        child.extend(
            (view.patch_state, bool(view.thread_info.flags & 1 << 13))
            for view in views  # type: ignore[misc]
        )

    kernel.machine.klp_copy_process = look
    kernel.tasks.run(3000)
    assert child[0] == child[1]
    assert len(kernel.tasks.named("parent")) == 2
    for task in kernel.tasks.named("parent"):
        assert [value for text, value in task.program.results if text == "both_steps()"] == [NEW]
    kernel.verify("forked").raise_for_findings()


def test_a_child_that_is_born_unpatched_switches_by_itself(kernel: Kernel) -> None:
    """The parent forks before it has returned to user space: the child begins unpatched, and pending."""
    seen = []
    kernel.tasks.spawn("parent", ["sleep(500)", "fork", "both_steps()", "nap(60000)"])
    kernel.tasks.spawn("other", ["nap(30000)"])
    kernel.tasks.run(100)
    kernel.enable(steps(NAP))
    struct = kernel.machine.view("task_struct", kernel.tasks.named("parent")[0].struct)
    # As if the stack check had not come to it yet.
    struct.patch_state = 0
    struct.thread_info.flags = struct.thread_info.flags | 1 << 13
    kernel.machine.events.listeners.append(lambda event: seen.append((event.note, event.address)))
    kernel.tasks.run(1000)
    returns = {address for note, address in seen if note == "return to user space"}
    assert {task.struct for task in kernel.tasks.named("parent")} <= returns
    assert [state.version for state in kernel.tasks.states() if state.name == "parent"] == ["patched"] * 2


def test_a_task_that_exits_no_longer_holds_the_transition(kernel: Kernel) -> None:
    kernel.tasks.spawn("leaving", ["nap(2500)", "exit"])
    kernel.tasks.run(100)
    kernel.enable(steps(NAP))
    kernel.tasks.run(500)
    assert kernel.in_transition
    kernel.tasks.wait_for_transition()
    assert kernel.tasks.named("leaving") == []
    kernel.verify("after").raise_for_findings()


# Atomic replace.


@pytest.fixture
def replacing(kernel: Kernel) -> Kernel:
    """fix_steps (step_one, step_two, nap) is being replaced by fix_steps2 (step_one, step_two only)."""
    kernel.enable(steps(NAP))
    sleeper(kernel, "nap(3000)", "both_steps()")
    sleeper(kernel, "both_steps()", "nap(10)", "sleep(100)", name="worker")
    kernel.enable(steps(code="fix_steps2", replace=True))
    assert kernel.in_transition == "fix_steps2"
    return kernel


def test_in_a_replace_each_task_has_the_old_patch_or_the_new_one_or_the_original_by_a_nop(
    replacing: Kernel,
) -> None:
    assert replacing.function_stack("nap") == ["nop", "new_nap+0x0/0x18 [fix_steps]"]
    replacing.verify("in transition").raise_for_findings()
    replacing.tasks.run(1000)
    assert results(replacing, "worker")[-2:] in ([NEWER, 1], [1, NEWER]), "the new one, and through the nop"
    assert state(replacing, "sleeper").version == "unpatched"
    assert any("new_nap" in each for each in state(replacing, "sleeper").stack)


def test_after_a_replace_the_nops_and_the_old_patch_are_gone(replacing: Kernel) -> None:
    replacing.tasks.wait_for_transition()
    assert replacing.function_stack("nap") == []
    assert replacing.site_of("nap")[1].hex() == "0f1f440000"
    assert [each.patch.name for each in replacing.enabled] == ["fix_steps2"]
    replacing.verify("after").raise_for_findings()
    replacing.tasks.run(4000)
    assert results(replacing, "sleeper")[:2] == [2, NEWER]


def test_a_replace_is_reversed_and_the_old_patch_is_as_it_was(replacing: Kernel) -> None:
    replacing.disable("fix_steps2")
    replacing.tasks.wait_for_transition()
    assert [each.patch.name for each in replacing.enabled] == ["fix_steps"]
    replacing.verify("after").raise_for_findings()
    replacing.tasks.run(4000)
    assert results(replacing, "worker")[-1] in (NEW, 2)


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
