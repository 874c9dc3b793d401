"""Tasks, schedules and the steps about them in scenario files: what they say, and where they are wrong."""

from pathlib import Path

import pytest

from emu.timer import JIFFY_INSTRUCTIONS
from klpemu.kernel import Kernel
from klpemu.scenario import Action, DeclaredTask, Scenario
from klpemu.scenario_file import ScenarioError, read_scenario
from klpemu.task_file import system_tasks

GOOD = """\
cpus = 2
preempt = "full"
schedule = ["worker:120", "init", "kworker/0:1",
    "kworker/0:1:7"]

[[patch]]
name = "fix_steps"
code = "builtin:fix_steps.o"
objects.vmlinux = [{ old = "nap", new = "new_nap" }]

[[task]]
name = "worker"
program = ["transact(100)", "sleep(50)",
    "fork", "exit"]
repeat = true
count = 3

[[task]]
name = "late"
program = ["nap(10)"]
kthread = true
cpu = 1
repeat = 2
start = false

[[step]]
spawn = "late"

[[step]]
run = "500 ms"
tasks = { worker = "patched", late = ["unpatched", "in nap"] }
returned = { worker = 0x22, late = [1, -2] }
transition = "fix_steps"
finding = "versions_are_never_mixed"

[[step]]
wait = "transition"
within = "1.5 s"
transition = ""

[[step]]
reverse = "fix_steps"

[[step]]
force = "fix_steps"
"""


def read(tmp_path: Path, text: str) -> Scenario:
    file = tmp_path / "scenario.toml"
    file.write_text(text)
    return read_scenario(file)


def test_a_scenario_says_which_tasks_there_are_and_who_goes_on(tmp_path: Path) -> None:
    scenario = read(tmp_path, GOOD)
    assert (scenario.cpus, scenario.full_preemption, scenario.seed) == (2, True, None)
    assert scenario.schedule == (
        ("worker", 120),
        ("init", JIFFY_INSTRUCTIONS),
        ("kworker/0:1", JIFFY_INSTRUCTIONS),
        ("kworker/0:1", 7),
    )
    program = ("transact(100)", "sleep(50)", "fork", "exit")
    assert scenario.tasks == {
        "worker": DeclaredTask("worker", program, repeat=None, count=3, line=13),
        "late": DeclaredTask("late", ("nap(10)",), True, 1, 2, start=False, line=20),
    }


def test_steps_start_tasks_let_time_go_by_and_expect_how_tasks_stand(tmp_path: Path) -> None:
    spawn, run, wait, reverse, force = read(tmp_path, GOOD).steps
    assert (spawn.action, spawn.target) == (Action.SPAWN, "late")
    assert (run.action, run.msecs, run.name) == (Action.RUN, 500, "run 500 ms")
    assert run.tasks == {"worker": ("patched",), "late": ("unpatched", "in nap")}
    assert run.returned == {"worker": (0x22,), "late": (1, -2)}
    assert (run.transition, run.findings) == ("fix_steps", ("versions_are_never_mixed",))
    assert (wait.action, wait.msecs, wait.transition) == (Action.WAIT, 1500, "")
    assert (reverse.action, force.action) == (Action.REVERSE, Action.FORCE)
    assert (spawn.transition, spawn.msecs, spawn.tasks) == (None, None, {})


def test_without_a_word_about_it_there_is_one_vcpu_and_voluntary_preemption(tmp_path: Path) -> None:
    scenario = read(tmp_path, '[[step]]\nrun = "2 min"\n')
    assert (scenario.cpus, scenario.full_preemption, scenario.schedule) == (1, False, ())
    assert scenario.steps[0].msecs == 120_000


@pytest.mark.parametrize("cpus", [1, 3])
def test_the_tasks_that_every_kernel_has_are_known_by_name(cpus: int) -> None:
    kernel = Kernel.load(cpus=cpus)
    assert sorted(system_tasks(cpus)) == sorted(each.name for each in kernel.tasks.states())


@pytest.mark.parametrize(
    ("old", "new", "line", "expected"),
    [
        ("cpus = 2", "cpus = 9", 1, "'cpus' is 9; expected 1 to 8"),
        ("cpus = 2", "cpus = 0", 1, "'cpus' is 0; expected 1 to 8"),
        ("cpus = 2", 'cpus = "2"', 1, "'cpus' is a string; expected an integer"),
        ('"full"', '"ful"', 2, "'preempt' is 'ful'; did you mean 'full'?"),
        ('"full"', '"full"\nseed = 1', 3, "'seed' cannot be given together with 'schedule'"),
        ('"worker:120"', '"wroker:120"', 3, "no task 'wroker' to go on; did you mean 'worker'?"),
        ("kworker/0:1:7", "swapper/2", 4, "no task 'swapper/2' to go on"),
        ("worker:120", "worker:0", 3, "'worker:0' is no number of instructions"),
        ("worker:120", "worker:x", 3, "no task 'worker:x' to go on"),
        ('schedule = ["', 'schedule = []\nx = ["', 3, "'schedule' is empty"),
        ('"worker"\n', '"init"\n', 12, "every kernel has a task 'init'"),
        ('"late"\n', '"worker"\n', 19, "a second task 'worker'; names are unique"),
        ('"late"\n', '"a23456789 123456"\n', 19, "expected at most 15 printable bytes"),
        ('"late"\n', '"a\\tb"\n', 19, "expected at most 15 printable bytes"),
        ('program = ["nap(10)"]', "", 18, "'program' is missing; write what the task does"),
        ('["nap(10)"]', "[]", 20, "'program' is empty"),
        ('"fork", "exit"', '"frok", "exit"', 14, "'frok' is nothing that a task can do; did you mean fork?"),
        ('"fork", "exit"', '"sleep", "exit"', 14, "did you mean sleep(MS)?"),
        ('"fork", "exit"', '"nap(1", "exit"', 14, "'nap(1' is no call; write it like"),
        ('"fork", "exit"', '"user(9999999999)"', 14, "is too long; write milliseconds"),
        ('["nap(10)"]', '["fork"]', 20, "a kernel thread cannot 'fork'; it has no user space"),
        ('["nap(10)"]', '["user(5)"]', 20, "a kernel thread cannot 'user(5)'"),
        ("cpu = 1", "cpu = 2", 22, "'cpu' is 2; expected 0 to 1"),
        ("repeat = 2", "repeat = 0", 23, "'repeat' is 0; expected 1 to"),
        ("repeat = 2", 'repeat = "ever"', 23, "'repeat' is a string; expected an integer"),
        ("start = false", "start = 0", 24, "'start' is an integer; expected true or false"),
        ("start", "strat", 24, "unknown key 'strat' in a task; did you mean 'start'?"),
        ("count = 3", "count = -1", 16, "'count' is -1; expected 1 to 10,000"),
        ('spawn = "late"', 'spawn = "lat"', 27, "no task 'lat' is declared; did you mean 'late'?"),
        ('spawn = "late"', 'spawn = "init"', 27, "no task 'init' is declared"),
        ('"500 ms"', '"500"', 30, "'run' is '500'; expected a time like '500 ms' or '2 s'"),
        ('"500 ms"', '"0 ms"', 30, "'run' is '0 ms'; expected 1 ms to 86,400 s"),
        ('"500 ms"', '"86401 s"', 30, "expected 1 ms to 86,400 s"),
        ('"500 ms"', "500", 30, "'run' is an integer; expected a string"),
        ('worker = "patched"', 'wroker = "patched"', 31, "no task 'wroker' is declared; did you mean"),
        ('worker = "patched"', 'worker = "pached"', 31, "no task can be 'pached'; did you mean 'patched'?"),
        ('worker = "patched"', "worker = []", 31, "'worker' is empty"),
        ('worker = "patched"', "worker = 1", 31, "'worker' is an integer; expected a string or an array"),
        ("worker = 0x22", 'worker = "x"', 32, "'worker' is a string; expected an integer or an array"),
        ("[1, -2]", "[1, 2.5]", 32, "'late[1]' is a float; expected an integer"),
        ("[1, -2]", "[]", 32, "'late' is empty"),
        ("late = [1", "lat = [1", 32, "no task 'lat' is declared; did you mean 'late'?"),
        ('transition = "fix_steps"', 'transition = "fix"', 33, "no patch 'fix' is declared"),
        ('finding = "versions_are_never_mixed"', 'finding = "mixed"', 34, "no invariant is called 'mixed'"),
        ('wait = "transition"', 'wait = "transitoin"', 37, "'transitoin'; did you mean 'transition'?"),
        ('"1.5 s"', '"soon"', 38, "'within' is 'soon'; expected a time"),
        ('run = "500 ms"', 'run = "5 s"\nwithin = "5 s"', 31, "unknown key 'within' in a step that does"),
        ('reverse = "fix_steps"', 'reverse = "fix"', 42, "no patch 'fix' is declared"),
        ('force = "fix_steps"', 'force = "fix_step"', 45, "did you mean 'fix_steps'?"),
    ],
)  # fmt: skip
def test_a_mistake_is_reported_with_its_line(
    tmp_path: Path, old: str, new: str, line: int, expected: str
) -> None:
    assert old in GOOD
    with pytest.raises(ScenarioError) as caught:
        read(tmp_path, GOOD.replace(old, new, 1))
    assert expected in str(caught.value)
    assert caught.value.where == f"{tmp_path / 'scenario.toml'}:{line}"
