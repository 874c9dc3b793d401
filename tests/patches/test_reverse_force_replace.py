"""Transitions refused, turned round, forced, inherited, ended by exit; atomic replace in the middle."""

import pytest
from livepatches import livepatch
from sleepers import NAP, NEW, NEWER, OLD, log_since, results, sleeper, state, steps

from emu.errno import KernelErrno
from klpemu import Func, Kernel


@pytest.fixture
def kernel() -> Kernel:
    """One vCPU, every call observed."""
    return Kernel.load(observe=True)


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
    assert kernel.machine.view("module", module.struct).refcnt.counter == 2
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
