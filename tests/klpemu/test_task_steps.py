"""Scenarios with tasks: what steps do to them, what can be expected of them, and what ends a scenario."""

from pathlib import Path
from typing import Any

import pytest
from command_line import klpemu

from emu.timer import HZ
from klpemu.fixtures import fixture
from klpemu.scenario import Action, DeclaredTask, Scenario, Step
from klpemu.step_runner import StepResult, StepRunner
from klpemu.watched_schedule import is_settled
from patches.livepatch import Func, Patch

PATCH = """
[[patch]]
name = "fix_steps"
code = "builtin:fix_steps.o"
objects.vmlinux = [
    { old = "step_one", new = "new_step_one" },
    { old = "step_two", new = "new_step_two" },
    { old = "nap", new = "new_nap" },
]
"""
SLEEPER = '[[task]]\nname = "sleeper"\nprogram = ["nap(2500)"]\nrepeat = true\n'
WORKER = '[[task]]\nname = "worker"\nprogram = ["both_steps()", "sleep(40)"]\nrepeat = true\n'
BLOCKED = '[[task]]\nname = "blocked"\nprogram = ["await_delivery()"]\n'
RUN = '[[step]]\nrun = "1 s"\n'
ENABLE = '[[step]]\nenable = "fix_steps"\n'
FIX_STEPS = Patch(
    "fix_steps",
    {"vmlinux": [Func("step_one", "new_step_one"), Func("step_two", "new_step_two"), Func("nap", "new_nap")]},
    code="builtin:fix_steps.o",
)
FIX_NAP = Patch("fix_steps", {"vmlinux": [Func("nap", "new_nap")]}, code="builtin:fix_steps.o")


def outcome_of(tmp_path: Path, text: str, status: int = 0) -> dict[str, Any]:
    """The JSON object of a scenario's run."""
    file = tmp_path / "scenario.toml"
    file.write_text(text)
    outcome = klpemu("run", "--json", str(file))
    assert outcome.status == status, outcome
    return outcome.object


def findings(tmp_path: Path, text: str) -> list[str]:
    """What is found in a scenario that must have findings."""
    return [each["what"] for each in outcome_of(tmp_path, text, 1)["findings"]]


def performed(steps: list[Step], **options: Any) -> list[StepResult]:
    """The results of steps on a kernel with a sleeper and a worker."""
    tasks = {
        "sleeper": DeclaredTask("sleeper", ("nap(2500)",), repeat=None),
        "worker": DeclaredTask("worker", ("both_steps()", "user(20)"), repeat=None),
    }
    runner = StepRunner(Scenario(patches={"fix_steps": FIX_STEPS}, tasks=tasks, **options))
    return [runner.perform(step) for step in steps]


@pytest.mark.parametrize(
    ("expectation", "expected"),
    [
        ('tasks = { sleeper = "patched" }', "found sleeper:3 unpatched in msleep, nap, expected"),
        ('tasks = { worker = "unpatched" }', "found worker:4 patched, expected worker unpatched"),
        ('tasks = { sleeper = "in new_nap" }', "expected sleeper in new_nap"),
        ('tasks = { sleeper = "exited" }', "in msleep, nap, expected sleeper exited"),
        ('tasks = { late = "patched" }', "found no task late, expected late patched"),
        ("returned = { worker = 0x11 }", "found worker: 0x22, expected 0x11"),
        ("returned = { worker = [0x11, 0x11, 0x22] }", "0x22 0x22 0x22, expected 0x11 0x11 0x22"),
        ("returned = { sleeper = 1 }", "found no call of sleeper, expected 0x1"),
        ('transition = ""', "found fix_steps, expected none"),
        ('finding = "versions_are_never_mixed"', "found nothing, expected versions_are_never_mixed"),
        ("log = []", "sleeper:3 is sleeping on function nap'], expected []"),
    ],
)  # fmt: skip
def test_an_expectation_that_is_not_met_is_a_finding(tmp_path: Path, expectation: str, expected: str) -> None:
    late = '[[task]]\nname = "late"\nprogram = ["exit"]\nstart = false\n'
    found = findings(tmp_path, f"{PATCH}{SLEEPER}{WORKER}{late}{ENABLE}{RUN}{expectation}\n")
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    "expectation",
    [
        'tasks = { sleeper = ["unpatched", "in nap", "in msleep"], worker = "patched" }',
        'tasks = { late = "exited", init = "patched" }',
        "returned = { worker = [0x22, 0x22] }",
        'transition = "fix_steps"',
    ],
)
def test_an_expectation_that_is_met_is_a_check(tmp_path: Path, expectation: str) -> None:
    late = '[[task]]\nname = "late"\nprogram = ["exit"]\nstart = false\n'
    text = f"{PATCH}{SLEEPER}{WORKER}{late}{ENABLE}{RUN}"
    without = outcome_of(tmp_path, text)["checks"]
    assert outcome_of(tmp_path, f"{text}{expectation}\n")["checks"] > without


def test_the_tasks_of_a_count_are_all_alike_and_all_must_be_as_expected(tmp_path: Path) -> None:
    tasks = f"{SLEEPER}count = 3\n{WORKER}"
    (found,) = findings(tmp_path, f'{PATCH}{tasks}{RUN}tasks = {{ sleeper = "in nap", worker = "in nap" }}\n')
    assert "worker:6" in found
    object_ = outcome_of(tmp_path, f"{PATCH}{tasks}{RUN}")
    states = object_["scenarios"][0]["steps"][-1]["tasks"]
    assert [each["pid"] for each in states if each["name"] == "sleeper"] == [3, 4, 5]


def test_what_a_task_has_returned_is_known_after_it_is_gone(tmp_path: Path) -> None:
    once = '[[task]]\nname = "once"\nprogram = ["both_steps()", "area_of(3, -4)"]\n'
    outcome_of(tmp_path, f'{once}{RUN}tasks = {{ once = "exited" }}\nreturned = {{ once = [0x11, -1] }}\n')


def test_a_task_that_does_not_start_by_itself_is_spawned_by_a_step_as_often_as_one_likes(
    tmp_path: Path,
) -> None:
    late = '[[task]]\nname = "late"\nprogram = ["nap(2000)"]\nstart = false\ncount = 2\n'
    spawn = '[[step]]\nspawn = "late"\n'
    object_ = outcome_of(tmp_path, f"{late}{RUN}{spawn}{spawn}{RUN}")
    steps = object_["scenarios"][0]["steps"]
    assert [sum(task["name"] == "late" for task in step["tasks"]) for step in steps] == [0, 0, 2, 4, 4]


def test_an_unknown_function_is_reported_with_the_line_of_the_program(tmp_path: Path) -> None:
    file = tmp_path / "scenario.toml"
    file.write_text('[[task]]\nname = "worker"\nprogram = ["both_step()"]\n' + RUN)
    outcome = klpemu("run", str(file))
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err == (f"klpemu: {file}:3: task 'worker': symbol 'both_step' not found in symbol table\n")


# What cannot end.


def test_a_transition_that_is_not_over_in_time_is_a_finding_with_stacks_and_the_scenario_goes_on(
    tmp_path: Path,
) -> None:
    wait = '[[step]]\nwait = "transition"\nwithin = "1 s"\n'
    object_ = outcome_of(tmp_path, f"{PATCH}{SLEEPER}{ENABLE}{wait}{RUN}{RUN}", 1)
    (found,) = object_["findings"]
    assert found["invariant"] == "the_transition_ends"
    assert "is not over after 1 virtual seconds; sleeper:3 is sleeping on function nap" in found["what"]
    steps = object_["scenarios"][0]["steps"]
    assert (len(steps), object_["scenarios"][0]["left_out"]) == (5, 0)
    (task,) = steps[2]["in_the_way"]
    assert (task["name"], task["why"]) == ("sleeper", "is sleeping on function nap")
    assert [place.split("+")[0] for place in task["stack"]] == ["msleep", "nap"]


def test_a_transition_in_which_nobody_switches_for_a_minute_never_ends(tmp_path: Path) -> None:
    forever = '[[task]]\nname = "forever"\nprogram = ["nap(1000000000)"]\n'
    file = tmp_path / "scenario.toml"
    file.write_text(f'{PATCH}{forever}{RUN}{ENABLE}[[step]]\nwait = "transition"\n')
    outcome = klpemu("run", str(file))
    assert (outcome.status, outcome.err) == (1, "")
    lines = outcome.out.splitlines()
    at = next(number for number, line in enumerate(lines) if "the_transition_ends" in line)
    assert "does not end: in 60 virtual seconds no task switched; forever:3 is sleeping" in lines[at]
    assert lines[at + 1] == "    forever:3 on CPU 0, sleeping, nap(1000000000): msleep"
    assert [line.split("+")[0] for line in lines[at + 2 : at + 4]] == ["      msleep", "      nap"]


def test_within_is_all_that_counts_if_it_is_given(tmp_path: Path) -> None:
    """A sleeper that comes round after more than a minute."""
    late = '[[task]]\nname = "late"\nprogram = ["nap(70000)"]\n'
    wait = '[[step]]\nwait = "transition"\nwithin = "2 min"\ntransition = ""\n'
    outcome_of(tmp_path, f"{PATCH}{late}{RUN}{ENABLE}{wait}")


@pytest.mark.parametrize("error", ["", 'error = "deadlock: init waits for"\n'])
def test_a_deadlock_ends_the_scenario_unless_it_is_expected(tmp_path: Path, error: str) -> None:
    call = f'[[step]]\ncall = "await_delivery()"\n{error}'
    object_ = outcome_of(tmp_path, f"{BLOCKED}{RUN}{call}{RUN}", 0 if error else 1)
    steps = object_["scenarios"][0]["steps"]
    assert [each["invariant"] for each in object_["findings"]] == ([] if error else ["somebody_can_go_on"])
    assert object_["scenarios"][0]["left_out"] == (0 if error else 1)
    in_the_way = steps[2]["in_the_way"]
    assert [each["name"] for each in in_the_way] == ["init", "blocked"]
    for each in in_the_way:
        assert [place.split("+")[0] for place in each["stack"]] == ["wait_for_completion", "await_delivery"]


def test_tasks_that_wait_for_a_step_are_no_deadlock(tmp_path: Path) -> None:
    call = '[[step]]\ncall = "deliver()"\n'
    file = tmp_path / "scenario.toml"
    file.write_text(f'{BLOCKED}{RUN}{call}{RUN}tasks = {{ blocked = "exited" }}\n')
    outcome = klpemu("run", str(file))
    assert outcome.status == 0
    titles = [line for line in outcome.out.splitlines() if line.startswith("  at ")]
    assert [title.endswith("nobody can go on, and no timer is armed") for title in titles] == [
        True,
        False,
        False,
    ]


def test_a_task_that_fails_is_named_and_its_registers_are_shown(tmp_path: Path) -> None:
    bad = '[[task]]\nname = "bad"\nprogram = ["sleep(100)", "jump_nowhere()"]\n'
    file = tmp_path / "scenario.toml"
    file.write_text(f"{bad}{WORKER}{RUN}{RUN}")
    outcome = klpemu("run", str(file))
    assert outcome.status == 1
    assert "the_guest_goes_on: bad:3: jump to unmapped address 0xffffffffdeadb000" in outcome.out
    assert "1 step left out" in outcome.out
    assert "rip ffffffffdeadb000" in outcome.err


def test_a_task_s_failure_can_be_expected_and_the_others_go_on(tmp_path: Path) -> None:
    bad = '[[task]]\nname = "bad"\nprogram = ["jump_nowhere()"]\n'
    text = f'{bad}{WORKER}{RUN}error = "unmapped address"\n{RUN}returned = {{ worker = 0x11 }}\n'
    outcome_of(tmp_path, text)


def test_a_finding_that_is_expected_is_told_and_does_not_count(tmp_path: Path) -> None:
    object_ = outcome_of(tmp_path, fixture("force.toml").read_text())
    told = [each["what"] for step in object_["scenarios"][0]["steps"] for each in step["expected"]]
    assert len(told) == 1
    assert "called the new new_transact and then the old step_two" in told[0]


# Who goes on.


STEPS = [
    Step(Action.RUN, "300 ms", msecs=300),
    Step(Action.ENABLE, "fix_steps"),
    Step(Action.WAIT, "transition"),
    Step(Action.DISABLE, "fix_steps"),
    Step(Action.WAIT, "transition", transition=""),
]


def story(results: list[StepResult]) -> list[tuple[float, str]]:
    return [(each.seconds, each.text) for result in results for each in result.timeline or ()]


def test_a_seed_decides_and_the_same_one_decides_the_same() -> None:
    first, second = (performed(STEPS, cpus=2, seed=1) for _ in range(2))
    assert [each.report.findings for each in first] == [()] * len(STEPS)
    assert story(first) == story(second)
    # Many schedules look alike from outside, but not all.
    assert any(story(performed(STEPS, cpus=2, seed=seed)) != story(first) for seed in range(2, 9))


def test_full_preemption_takes_a_task_off_its_vcpu_in_the_middle_of_guest_code() -> None:
    def preempted(full: bool) -> bool:
        tasks = {"busy": DeclaredTask("busy", ("crunch(2000)",), repeat=None, count=2)}
        runner = StepRunner(Scenario(tasks=tasks, seed=1, full_preemption=full))
        states = [runner.perform(Step(Action.RUN, "20 ms", msecs=20)).tasks for _ in range(5)]
        return any(task.state == "preempted" for each in states if each for task in each.states)

    assert (preempted(False), preempted(True)) == (False, True)


def test_an_explicit_schedule_says_who_goes_on_from_the_first_step(tmp_path: Path) -> None:
    two = '[[task]]\nname = "one"\nprogram = ["crunch(5)"]\n[[task]]\nname = "two"\nprogram = ["crunch(5)"]\n'

    def order(names: list[str]) -> list[str]:
        schedule = ", ".join(f'"{name}"' for name in names)
        object_ = outcome_of(tmp_path, f"cpus = 2\nschedule = [{schedule}]\n{two}{RUN}")
        moments = object_["scenarios"][0]["steps"][1]["timeline"]
        return [each["task"].split(":")[0] for each in moments if each["kind"] == "exit"]

    assert order(["one"] * 9) == ["one", "two"]
    assert order(["two"] * 9) == ["two", "one"]


def test_a_schedule_that_names_who_cannot_go_on_is_bad_input(tmp_path: Path) -> None:
    file = tmp_path / "scenario.toml"
    file.write_text(f'schedule = ["worker", "kworker/0:1"]\n{WORKER}{RUN}')
    outcome = klpemu("run", str(file))
    assert outcome.status == 2
    assert outcome.err == (
        f"klpemu: {file}:6: run 1 s: schedule, entry 2: 'kworker/0:1' cannot go on; these can: worker\n"
    )


def test_steps_that_end_in_the_middle_of_kernel_work_are_judged_when_it_is_done() -> None:
    """The completion waits for a preempted task to give its vCPU up of its own accord: for some 200 ms."""
    tasks = {"busy": DeclaredTask("busy", ("crunch(3000)",), cpu=0, repeat=None)}
    tasks["napping"] = DeclaredTask("napping", ("nap(700)",), cpu=0, repeat=None)
    runner = StepRunner(Scenario(full_preemption=True, patches={"fix_steps": FIX_NAP}, tasks=tasks))
    steps = [*STEPS[:4], Step(Action.RUN, "900 ms", msecs=900)]
    results = [runner.perform(step) for step in steps]
    while runner.kernel.in_transition:
        results.append(runner.perform(Step(Action.RUN, "20 ms", msecs=20)))
    assert [finding for each in results for finding in each.report.findings] == []


@pytest.mark.parametrize("seed", range(3))
def test_nobody_is_in_the_middle_of_a_service_when_a_step_is_judged(seed: int) -> None:
    tasks = {"busy": DeclaredTask("busy", ("fork", "exit"), count=2, start=False)}
    runner = StepRunner(Scenario(cpus=2, seed=seed, tasks=tasks))
    services = 0
    for _ in range(30):
        runner.perform(Step(Action.SPAWN, "busy"))
        runner.kernel.machine.run(lambda: not is_settled(runner.kernel.machine), 1)
        services += not is_settled(runner.kernel.machine)
        runner.perform(Step(Action.RUN, "4 ms", msecs=4))
        assert is_settled(runner.kernel.machine)
    assert services


def test_a_task_that_is_only_ever_preempted_holds_no_step_up_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between two system calls it is in user space for a moment; a grace period must not miss that."""
    monkeypatch.setattr("emu.hub.PATIENCE", HZ)
    tasks = {"busy": DeclaredTask("busy", ("crunch(3000)",), repeat=None)}
    runner = StepRunner(Scenario(full_preemption=True, patches={"fix_steps": FIX_NAP}, tasks=tasks))
    for step in STEPS[1:]:
        assert runner.perform(step).report.findings == ()
