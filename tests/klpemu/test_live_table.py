"""Scenarios with tasks on a terminal: the table that stays, narrow terminals, Ctrl-C, pipes that close."""

import re
import signal
from io import StringIO
from pathlib import Path

import pytest
from command_line import klpemu, process
from terminal import Terminal, on_a_terminal, screen

from klpemu.output import Output
from klpemu.scenario import Action, DeclaredTask, Scenario, Step
from klpemu.scenario_display import ScenarioDisplay
from klpemu.step_runner import StepRunner

CONSISTENCY = "builtin:consistency.toml"
ENDLESS = """
[[task]]
name = "worker"
program = ["both_steps()", "sleep(20)"]
repeat = true

[[step]]
run = "10 s"

[[step]]
run = "86400 s"
"""
COLOR = re.compile(r"\x1b\[[\d;]*m")


@pytest.fixture(scope="module")
def printed() -> str:
    """What the scenario prints on a terminal of 100 columns."""
    return on_a_terminal("run", CONSISTENCY, columns=100)


def test_each_step_leaves_one_table_and_above_it_what_has_happened(printed: str) -> None:
    lines = screen(printed)
    start, end = lines.index("enable fix_steps"), lines.index("run 1 s", lines.index("enable fix_steps"))
    step = lines[start:end]
    titles = [line for line in step if line.startswith("  at ")]
    assert titles == ["  at 1.004 s, fix_steps in transition, 1 of 8 tasks left"]
    at = step.index(titles[0])
    assert step[at + 1].split() == ["task", "CPU", "kind", "state", "version", "doing"]
    assert step[at + 2].split()[:5] == ["sleeper:4", "1", "user", "sleeping", "unpatched"]
    assert all(line.startswith("  [") for line in step[1:at])
    assert "  [    1.004] worker:5 is patched now: stack check" in step[1:at]


def test_the_terminal_says_what_a_file_says(printed: str) -> None:
    """Line for line, but for how the tables are laid out and where lines are wrapped."""
    lines = [line for line in screen(printed) if line.startswith("  [") and len(line) < 90]
    plain = klpemu("run", CONSISTENCY).out.splitlines()
    assert [line for line in plain if line.startswith("  [") and len(line) < 90] == lines
    assert screen(printed)[-2:] == [plain[-1], ""]


class _Tty(StringIO):
    def isatty(self) -> bool:
        return True


def test_the_table_is_drawn_again_and_again_while_time_goes_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klpemu.output.PICTURE_SECONDS", 0.0)
    monkeypatch.setattr("klpemu.output.PICTURE_SHARE", 0)
    monkeypatch.setattr("sys.stdout", out := _Tty())
    monkeypatch.setenv("TERM", "xterm-256color")
    worker = DeclaredTask("worker", ("sleep(100)",), repeat=None)
    display = ScenarioDisplay(
        Output("run", as_json=False, color="auto"), StepRunner(Scenario(tasks={"worker": worker}))
    )
    display.perform(Step(Action.RUN, "1 s", msecs=1000))
    times = [float(each) for each in re.findall(r"at (\d+\.\d+) s, no transition", out.getvalue())]
    assert times == sorted(times)
    assert len(set(times)) >= 10
    assert sum(line.startswith("  at ") for line in screen(out.getvalue())) == 1


def test_sixty_columns_are_enough_for_the_tables() -> None:
    lines = screen(on_a_terminal("run", CONSISTENCY, columns=60))
    assert [line for line in lines if len(line) > 60 and " " in line.strip()] == []
    heads = [line.split() for line in lines if line.strip().startswith("task ")]
    assert ["task", "state", "version", "doing"] in heads
    assert all("CPU" not in each for each in heads)


def test_no_color_leaves_the_picture_and_takes_the_colour() -> None:
    text = on_a_terminal("run", CONSISTENCY, columns=100, NO_COLOR="1")
    assert COLOR.search(text) is None
    assert screen(text) == screen(COLOR.sub("", on_a_terminal("run", CONSISTENCY, columns=100)))


def test_the_cursor_is_never_hidden(printed: str) -> None:
    assert "\x1b[?25" not in printed


def test_elsewhere_nothing_is_drawn_over() -> None:
    assert "\x1b" not in klpemu("run", CONSISTENCY).out
    assert "\r" not in klpemu("run", CONSISTENCY).out


def test_json_is_all_that_is_printed_on_a_terminal_too() -> None:
    assert on_a_terminal("run", "--json", CONSISTENCY, columns=100).startswith('{\n  "schema": 1')


def test_ctrl_c_in_the_middle_of_a_step_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    scenario = tmp_path / "endless.toml"
    scenario.write_text(ENDLESS)
    terminal = Terminal("run", str(scenario), columns=100)
    terminal.read("run 86400 s")
    terminal.child.send_signal(signal.SIGINT)
    assert terminal.finish() == 130
    assert screen(terminal.text)[-2:] == ["klpemu: interrupted", ""]
    assert terminal.text.count("\x1b[?") == 0


def test_ctrl_c_elsewhere_is_one_line(tmp_path: Path) -> None:
    scenario = tmp_path / "endless.toml"
    scenario.write_text(ENDLESS)
    with process(["run", str(scenario)], preexec_fn=_take_ctrl_c) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line == "run 86400 s\n":
                break
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=30)
        assert (child.returncode, err) == (130, "klpemu: interrupted\n")


def test_lines_come_while_the_step_goes_on_and_a_closed_pipe_ends_it(tmp_path: Path) -> None:
    forking = '[[task]]\nname = "parent"\nprogram = ["fork", "sleep(1000)"]\n'
    scenario = tmp_path / "forking.toml"
    scenario.write_text(f'{forking}repeat = true\n[[step]]\nrun = "86400 s"\n')
    with process(["run", str(scenario)]) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        lines = [child.stdout.readline() for _ in range(5)]
        assert "is forked by parent:3" in lines[-1]
        child.stdout.close()
        assert child.stderr.read() == ""
        assert child.wait() == 141


def _take_ctrl_c() -> None:
    """A shell starts what runs in the background with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
