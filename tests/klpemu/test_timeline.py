"""What happens on a kernel, in order: who switched when and how, who came and went, what was logged."""

import pytest

from klpemu import Func, Kernel, Patch
from klpemu.timeline import Moment, MomentKind, Timeline

FIX_STEPS = Patch(
    "fix_steps",
    {"vmlinux": [Func("step_one", "new_step_one"), Func("nap", "new_nap")]},
    code="builtin:fix_steps.o",
)


@pytest.fixture
def kernel() -> Kernel:
    return Kernel.load(cpus=2)


def told(timeline: Timeline, kind: MomentKind, task: str = "") -> list[Moment]:
    timeline.look()
    return [each for each in timeline.moments if each.kind is kind and each.task.startswith(task)]


def switches(timeline: Timeline, task: str) -> list[tuple[str, str]]:
    return [(each.version, each.how) for each in told(timeline, MomentKind.SWITCH, task)]


def test_a_task_that_sleeps_elsewhere_is_switched_by_stack_check(kernel: Kernel) -> None:
    kernel.tasks.spawn("sleeper", ["sleep(5000)"])
    kernel.tasks.run(100)
    timeline = Timeline(kernel.machine)
    kernel.enable(FIX_STEPS)
    assert switches(timeline, "sleeper") == [("patched", "stack check")]
    assert told(timeline, MomentKind.SWITCH, "sleeper")[0].text == "sleeper:4 is patched now: stack check"


def test_a_task_in_the_way_switches_on_its_return_to_user_space_and_the_time_is_told(kernel: Kernel) -> None:
    kernel.tasks.spawn("sleeper", ["nap(2500)", "sleep(9000)"])
    kernel.tasks.run(100)
    timeline = Timeline(kernel.machine)
    kernel.enable(FIX_STEPS)
    assert switches(timeline, "sleeper") == []
    kernel.tasks.wait_for_transition()
    assert switches(timeline, "sleeper") == [("patched", "return to user space")]
    assert told(timeline, MomentKind.SWITCH, "sleeper")[0].seconds == pytest.approx(2.504)


def test_an_idle_task_switches_in_its_loop(kernel: Kernel) -> None:
    kernel.tasks.spawn("sleeper", ["nap(2500)"], cpu=0)
    kernel.tasks.run(100)
    timeline = Timeline(kernel.machine)
    kernel.enable(FIX_STEPS)
    kernel.tasks.wait_for_transition()
    assert ("patched", "idle loop") in switches(timeline, "swapper/")


def test_a_task_that_is_forced_switches_where_it_is(kernel: Kernel) -> None:
    kernel.tasks.spawn("sleeper", ["nap(60000)"])
    kernel.tasks.run(100)
    timeline = Timeline(kernel.machine)
    kernel.enable(FIX_STEPS)
    kernel.tasks.run(500)
    kernel.force("fix_steps")
    assert switches(timeline, "sleeper") == [("patched", "forced")]
    assert timeline.how["sleeper:4"] == "forced"


def test_a_reversal_switches_those_back_that_had_switched(kernel: Kernel) -> None:
    kernel.tasks.spawn("sleeper", ["nap(60000)"])
    kernel.tasks.spawn("other", ["sleep(60000)"])
    kernel.tasks.run(100)
    timeline = Timeline(kernel.machine)
    kernel.enable(FIX_STEPS)
    kernel.reverse("fix_steps")
    kernel.tasks.wait_for_transition()
    assert switches(timeline, "sleeper") == []
    assert [version for version, _ in switches(timeline, "other")] == ["patched", "unpatched"]


def test_how_a_task_has_switched_is_forgotten_when_the_transition_is_over(kernel: Kernel) -> None:
    kernel.tasks.spawn("sleeper", ["nap(2500)", "sleep(9000)"])
    kernel.tasks.spawn("other", ["sleep(9000)"])
    kernel.tasks.run(100)
    timeline = Timeline(kernel.machine)
    kernel.enable(FIX_STEPS)
    assert timeline.how["other:5"] == "stack check"
    assert "sleeper:4" not in timeline.how
    kernel.tasks.wait_for_transition()
    assert timeline.how == {}


def test_a_child_and_its_parent_are_named_and_an_exit_is_told(kernel: Kernel) -> None:
    timeline = Timeline(kernel.machine)
    kernel.tasks.spawn("parent", ["fork", "sleep(100)", "exit"])
    kernel.tasks.run(50)
    assert [each.text for each in told(timeline, MomentKind.FORK)] == ["parent:5 is forked by parent:4"]
    assert told(timeline, MomentKind.EXIT) == []
    kernel.tasks.run(500)
    assert sorted(each.text for each in told(timeline, MomentKind.EXIT)) == [
        "parent:4 exits",
        "parent:5 exits",
    ]


def test_a_child_does_not_switch_by_being_forked(kernel: Kernel) -> None:
    kernel.tasks.spawn("sleeper", ["nap(60000)"])
    kernel.tasks.spawn("parent", ["sleep(500)", "fork", "sleep(60000)"])
    kernel.tasks.run(100)
    timeline = Timeline(kernel.machine)
    kernel.enable(FIX_STEPS)
    kernel.tasks.run(1000)
    assert [each.task for each in told(timeline, MomentKind.FORK)] == ["parent:6"]
    assert switches(timeline, "parent:6") == []


def test_results_are_kept_by_name_when_the_task_is_gone(kernel: Kernel) -> None:
    timeline = Timeline(kernel.machine)
    kernel.tasks.spawn("once", ["area_of(3, 4)", "area_of(1, 1)"])
    kernel.tasks.spawn("once", ["area_of(5, 5)"])
    timeline.look()
    kernel.tasks.run(500)
    assert kernel.tasks.named("once") == []
    assert timeline.returned()["once"] == [[7, 2], [10]]


def test_the_log_has_its_times_and_stands_between_what_it_is_about(kernel: Kernel) -> None:
    kernel.tasks.spawn("sleeper", ["nap(2500)", "sleep(9000)"])
    kernel.tasks.run(100)
    timeline = Timeline(kernel.machine)
    kernel.enable(FIX_STEPS)
    kernel.tasks.wait_for_transition()
    assert [each.text for each in told(timeline, MomentKind.LOG)] == kernel.log
    texts = [each.text for each in timeline.moments]
    seconds = [each.seconds for each in timeline.moments]
    assert seconds == sorted(seconds)
    sleeper = texts.index("sleeper:4 is patched now: return to user space")
    complete = texts.index("livepatch: 'fix_steps': patching complete")
    assert texts.index("livepatch: 'fix_steps': starting patching transition") < sleeper < complete
    assert seconds[complete] > seconds[sleeper] > seconds[0]
