"""The consistency invariants find what a kernel with a bug in it would do."""

import pytest

from emu.traps import GuestFault
from klpemu import Func, Kernel, Patch
from patches import stack_check, transition
from patches.invariants.finding import Finding
from patches.klp import klp_for_each_func, klp_for_each_object

STEPS = (Func("step_one", "new_step_one"), Func("step_two", "new_step_two"))
NAP = Func("nap", "new_nap")


def fix_steps(*funcs: Func) -> Patch:
    return Patch("fix_steps", {"vmlinux": funcs}, code="builtin:fix_steps.o")


@pytest.fixture
def kernel() -> Kernel:
    kernel = Kernel.load(observe=True)
    kernel.tasks.spawn("sleeper", ["nap(3000)", "both_steps()"], repeat=None)
    kernel.tasks.run(100)
    return kernel


def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack check that sees nothing."""
    monkeypatch.setattr(stack_check.StackCheck, "first_on", lambda self, entries: None)


def found(kernel: Kernel, invariant: str) -> list[Finding]:
    return [each for each in kernel.verify().findings if each.invariant == invariant]


def test_nothing_is_found_where_nothing_is_wrong_and_each_invariant_was_asked(kernel: Kernel) -> None:
    kernel.enable(fix_steps(*STEPS, NAP))
    kernel.tasks.wait_for_transition()
    kernel.tasks.run(5000)
    kernel.disable("fix_steps")
    kernel.tasks.wait_for_transition()
    report = kernel.verify()
    assert report.holds
    assert report.checks["versions_are_never_mixed"] > 3
    assert report.checks["switched_tasks_have_left_what_changes"] > 3
    assert report.checks["nobody_runs_what_is_freed"] >= 3


def test_a_task_that_is_switched_in_the_middle_of_what_changes_is_found(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    blind(monkeypatch)
    kernel.enable(fix_steps(*STEPS, NAP))
    assert kernel.in_transition == ""
    (finding,) = found(kernel, "switched_tasks_have_left_what_changes")
    assert "sleeper:3 was switched while nap is on its stack, which 'fix_steps' changes" in finding.what


def test_code_that_is_freed_under_a_sleeper_is_found_before_it_returns_into_it(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.enable(fix_steps(NAP))
    kernel.tasks.wait_for_transition()
    kernel.tasks.run(4000)
    blind(monkeypatch)
    kernel.disable("fix_steps")
    (finding,) = found(kernel, "nobody_runs_what_is_freed")
    assert "sleeper:3 still has new_nap of 'fix_steps' on its stack" in finding.what
    with pytest.raises(GuestFault):
        kernel.tasks.run(5000)


def test_a_flag_that_everybody_obeys_at_once_is_found_as_a_mixture(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """func->transition forgotten: the next call is new, whatever the task called before."""
    kernel.tasks.spawn("between", ["transact(3000)"], repeat=None)
    kernel.tasks.run(100)
    init = transition.klp_init_transition

    def forgetful(klp, patch, state):  # type: ignore[no-untyped-def]
        init(klp, patch, state)
        for func in (func for obj in klp_for_each_object(patch) for func in klp_for_each_func(obj)):
            func.transition = False

    monkeypatch.setattr(transition, "klp_init_transition", forgetful)
    kernel.enable(fix_steps(*STEPS, NAP, Func("transact", "new_transact")))
    kernel.tasks.run(3200)
    findings = found(kernel, "versions_are_never_mixed")
    assert any("between:4 called the old" in each.what for each in findings)


def test_a_report_is_given_once(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    blind(monkeypatch)
    kernel.enable(fix_steps(*STEPS, NAP))
    assert found(kernel, "switched_tasks_have_left_what_changes")
    assert not found(kernel, "switched_tasks_have_left_what_changes")
