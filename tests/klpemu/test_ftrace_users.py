"""Other users of ftrace, from Python and as steps of a scenario; and a step's own schedule."""

from pathlib import Path

import pytest

from elf.errors import KlpemuError
from emu.cpu import Stop
from emu.errno import KernelErrno
from klpemu import Func, Kernel, Patch
from klpemu.ftrace_users import FtraceUsers
from klpemu.scenario import Action
from klpemu.scenario_file import ScenarioError, read_scenario
from klpemu.step_runner import StepRunner

FIX = Patch("fix_area", {"vmlinux": [Func("area_of", "fixed_area_of")]}, code="builtin:fix_area.o")


@pytest.fixture
def kernel() -> Kernel:
    return Kernel.load()


def calls(kernel: Kernel) -> int:
    """How often the newest tracer was called."""
    ops = next(kernel.machine.ftrace.each_ops())
    return int.from_bytes(kernel.machine.space.read(ops.private, 8), "little")


def test_a_tracer_sees_the_calls_of_its_functions_and_no_others(kernel: Kernel) -> None:
    FtraceUsers(kernel).register("counter", ["area_of", "perimeter_of"])
    kernel.call("many_calls", 5)
    kernel.call("perimeter_of", 3, 4)
    assert calls(kernel) == 6
    assert kernel.verify().holds


def test_a_tracer_and_a_patch_share_a_function(kernel: Kernel) -> None:
    users = FtraceUsers(kernel)
    kernel.enable(FIX)
    users.register("counter", ["area_of"])
    assert kernel.call("area_of", 3, 4) == 12
    assert calls(kernel) == 1
    kernel.disable("fix_area")
    assert kernel.call("area_of", 3, 4) == 7
    assert calls(kernel) == 2
    users.unregister("counter")
    assert kernel.verify().holds
    assert kernel.site_of("area_of")[1] == bytes.fromhex("0f1f440000")


def test_a_tracer_that_has_gone_leaves_nothing(kernel: Kernel) -> None:
    before = kernel.patches.live()
    users = FtraceUsers(kernel)
    users.register("counter", ["area_of"])
    assert kernel.patches.live() != before
    users.unregister("counter")
    assert kernel.patches.live() == before


def test_a_name_is_taken_once_and_given_back_once(kernel: Kernel) -> None:
    users = FtraceUsers(kernel)
    users.register("counter", ["area_of"])
    with pytest.raises(KernelErrno, match="EEXIST"):
        users.register("counter", ["area_of"])
    users.unregister("counter")
    with pytest.raises(KernelErrno, match="ENOENT"):
        users.unregister("counter")


def scenario(directory: Path, text: str) -> StepRunner:
    path = directory / "scenario.toml"
    path.write_text(text)
    return StepRunner(read_scenario(path))


STEPS = """
[[step]]
ftrace = "counter"
functions = ["area_of"]

[[step]]
call = "many_calls(3)"

[[step]]
unftrace = "counter"
"""


def test_steps_register_and_unregister_a_tracer(tmp_path: Path) -> None:
    runner = scenario(tmp_path, STEPS)
    first, second, third = runner.scenario.steps
    assert (first.action, first.functions, third.action) == (Action.FTRACE, ("area_of",), Action.UNFTRACE)
    assert runner.perform(first).report.holds
    assert runner.perform(second).report.holds
    assert calls(runner.kernel) == 3
    assert runner.perform(third).report.holds


@pytest.mark.parametrize("functions", ["", "functions = []\n"])
def test_a_tracer_without_functions_is_a_mistake(tmp_path: Path, functions: str) -> None:
    with pytest.raises(ScenarioError, match="an ftrace user without functions"):
        scenario(tmp_path, f'[[step]]\nftrace = "counter"\n{functions}')


SCHEDULED = """
cpus = 2

[[task]]
name = "other"
cpu = 1
program = ["many_calls(200)"]

[[step]]
call = "area_of(3, 4)"
returns = 7
schedule = [{schedule}]
"""


def turns(runner: StepRunner, number: int) -> list[int]:
    """Every number of instructions that the vCPU gets from now on."""
    cpu, counts = runner.kernel.machine.cpus[number], list[int]()
    run = cpu.run

    def counted(count: int) -> Stop:
        counts.append(count)
        return run(count)

    cpu.run = counted  # type: ignore[method-assign]  # to see what the schedule gives it
    return counts


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ('"init*50"', []),
        ('"other", "other:10", "other:20", "init*50"', [10, 20]),
        ('"other", "other:10*2", "init*50"', [10, 10]),
    ],
)
def test_a_step_is_performed_by_its_own_schedule(tmp_path: Path, schedule: str, expected: list[int]) -> None:
    """The first turn of `other` begins its program; what is left when init is done is dropped."""
    runner = scenario(tmp_path, SCHEDULED.format(schedule=schedule))
    counts, own = turns(runner, 1), runner.kernel.machine.hub.schedule
    assert runner.perform(runner.scenario.steps[0]).report.holds
    assert counts == expected
    assert runner.kernel.machine.hub.schedule is own, "the scenario's, behind the operation"


@pytest.mark.parametrize(
    ("entry", "message"),
    [("init*0", "no number of turns"), ("nobody*3", "no task 'nobody'"), ("init*x", "no task 'init\\*x'")],
)
def test_a_mistake_in_a_schedule_names_it(tmp_path: Path, entry: str, message: str) -> None:
    with pytest.raises(KlpemuError, match=message):
        scenario(tmp_path, SCHEDULED.format(schedule=f'"{entry}"'))
