"""The commands of a recording: which there are, and what they do to a kernel."""

from collections.abc import Callable

import pytest

from elf.errors import KlpemuError
from klpemu import Kernel
from klpemu.module_tree import ModuleTree
from klpemu.recording import Command
from klpemu.replay_commands import ReplayCommands, Result, parse

PATCH = "/sys/kernel/livepatch/own_a"


@pytest.fixture
def run() -> Callable[[str], Result]:
    """Carries a command out on a kernel of its own."""
    kernel = Kernel.load()

    def wait(holds: Callable[[], bool]) -> bool:
        return holds() or kernel.tasks.run(2_000, holds)

    commands = ReplayCommands(kernel, ModuleTree([], "6.1.0"), wait)
    return lambda cmd: commands.run(parse(Command(cmd, 0, ()), "here"))


def test_a_livepatch_comes_and_goes(run: Callable[[str], Result]) -> None:
    assert run("insmod own_a.ko") == Result()
    assert run("transition-complete own_a") == Result()
    assert run("cat /proc/cmdline") == Result(0, ("own A",))
    assert run(f"cat {PATCH}/enabled") == Result(0, ("1",))
    assert run("ls /sys/kernel/livepatch") == Result(0, ("own_a",))
    assert run("rmmod own_a") == Result(1, ("rmmod: ERROR: Module own_a is in use",))
    assert run(f"echo 0 > {PATCH}/enabled") == Result()
    assert run("gone own_a") == Result()
    assert run("rmmod own_a") == Result()
    assert run("ls /sys/kernel/livepatch") == Result()


def test_parameters_are_given_on_and_can_be_written(run: Callable[[str], Result]) -> None:
    assert run("insmod own_a.ko hold=7") == Result()
    assert run("cat /sys/module/own_a/parameters/hold") == Result(0, ("7",))
    assert run("echo 0 > /sys/module/own_a/parameters/hold") == Result()
    assert run("cat /sys/module/own_a/parameters/hold") == Result(0, ("0",))
    assert run("echo x > /sys/module/own_a/parameters/hold") == Result(1, ("Invalid argument",))


def test_head_shows_the_first_lines(run: Callable[[str], Result]) -> None:
    assert run("head -1 /proc/meminfo").out == run("cat /proc/meminfo").out[:1]
    assert run("head -n 2 /proc/meminfo").out == run("cat /proc/meminfo").out[:2]


def test_the_patch_state_of_a_task_is_a_file_of_proc(run: Callable[[str], Result]) -> None:
    assert run("cat /proc/1/patch_state") == Result(0, ("-1",))
    assert run("cat /proc/999/patch_state") == Result(1, ("No such file or directory",))


def test_what_is_not_there_is_an_exit_status(run: Callable[[str], Result]) -> None:
    assert run("cat /proc/nothing") == Result(1, ("No such file or directory",))
    assert run("rmmod own_b").rc == 1
    assert run("gone own_a") == Result()


def test_a_patch_that_stays_is_not_gone(run: Callable[[str], Result]) -> None:
    run("insmod own_a.ko")
    assert run("gone own_a") == Result(1)


def test_a_module_that_is_nowhere_is_an_error(run: Callable[[str], Result]) -> None:
    with pytest.raises(KlpemuError, match=r"there is no module 'own_x\.ko'; --modules DIR says where"):
        run("insmod own_x.ko")


@pytest.mark.parametrize(
    "cmd",
    ["reboot", "", "cat relative", "cat /a | sort", "echo 1", "head /proc/meminfo", "rmmod a b", "insmod 'a"],
)
def test_other_commands_are_refused_by_name(cmd: str) -> None:
    with pytest.raises(KlpemuError) as raised:
        parse(Command(cmd, 0, ()), "recording.json: sequence[3]")
    assert "recording.json: sequence[3]" in str(raised.value)
    assert f"'{cmd}'" in str(raised.value)
    assert "\n" not in str(raised.value)
