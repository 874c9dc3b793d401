"""A function that ends in a jump is not on the stack while what it has jumped to sleeps."""

from pathlib import Path

from emu.task import Task
from klpemu import Func, Kernel, Patch


def asleep(kernel: Kernel, call: str) -> Task:
    task = kernel.tasks.spawn("sleeper", [call, "sleep(60000)"])
    kernel.tasks.run(8)
    return task


def stack_of(kernel: Kernel, task: Task) -> list[str]:
    return [each.split("+")[0] for each in kernel.tasks.state_of(task).stack]


def test_a_patch_does_not_wait_for_it_and_nobody_finds_fault_with_that(fixtures_dir: Path) -> None:
    """refuse_nap() jumps to msleep(), framed_tail() to framed_nap()."""
    kernel = Kernel.load(observe=True)
    kernel.load_module(fixtures_dir / "frames.o")
    refused, napping = asleep(kernel, "framed_checked(50)"), asleep(kernel, "framed_tail(3000)")
    assert stack_of(kernel, refused) == ["msleep", "framed_checked.cold"]
    assert stack_of(kernel, napping) == ["msleep", "framed_nap"]
    funcs = [Func("refuse_nap", "new_nap"), Func("framed_tail", "new_transact")]
    kernel.enable(Patch("fix_steps", {"frames": funcs}, fixtures_dir / "fix_steps.o"))
    assert kernel.in_transition == ""
    kernel.verify().raise_for_findings()


def test_a_patch_waits_for_what_it_has_jumped_to(fixtures_dir: Path) -> None:
    kernel = Kernel.load(observe=True)
    kernel.load_module(fixtures_dir / "frames.o")
    task = asleep(kernel, "framed_tail(3000)")
    funcs = [Func("framed_nap", "new_nap")]
    kernel.enable(Patch("fix_steps", {"frames": funcs}, fixtures_dir / "fix_steps.o"))
    assert kernel.in_transition == "fix_steps"
    assert kernel.tasks.state_of(task).why == "is sleeping on function framed_nap"
    kernel.tasks.wait_for_transition()
    kernel.verify().raise_for_findings()


def test_a_task_in_the_cold_part_of_a_function_escapes_the_kernels_check_and_is_found_by_ours(
    fixtures_dir: Path,
) -> None:
    """klp_check_stack_func() looks from the function's symbol to the next one; the cold part is elsewhere."""
    kernel = Kernel.load(observe=True)
    kernel.load_module(fixtures_dir / "frames.o")
    task = asleep(kernel, "framed_checked(50)")
    assert stack_of(kernel, task) == ["msleep", "framed_checked.cold"]
    funcs = [Func("framed_checked", "new_nap")]
    kernel.enable(Patch("fix_steps", {"frames": funcs}, fixtures_dir / "fix_steps.o"))
    assert kernel.in_transition == ""
    (finding,) = kernel.verify().findings
    assert finding.invariant == "switched_tasks_have_left_what_changes"
    assert "was switched while framed_checked is on its stack" in finding.what
