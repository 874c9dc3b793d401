"""The picture of tasks: which are shown, in which columns, and what is said of each."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from klpemu.task_table import ROWS_SHOWN, TaskPicture
from klpemu.tasks import TaskState

IDLE = TaskState("swapper/0", 0, 0, "idle", "running", "patched", False, "")


def task(name: str = "sleeper", pid: int = 4, **members: Any) -> TaskState:
    known: dict[str, Any] = {
        "cpu": 1, "kind": "user", "state": "sleeping", "version": "unpatched", "pending": True,
        "doing": "nap(2500): msleep", "stack": ("msleep+0x3/0x4", "nap+0xe/0x20"),
        "why": "is sleeping on function nap",
    }  # fmt: skip
    return TaskState(name, pid, **(known | members))


def picture(*tasks: TaskState, transition: str = "fix_steps", **members: Any) -> TaskPicture:
    return TaskPicture(1.5, transition, (*tasks, IDLE), members.pop("how", {}), **members)


def test_a_row_says_who_where_in_which_version_and_why() -> None:
    title, heads, row = picture(task()).lines()
    assert title == "at 1.500 s, fix_steps in transition, 1 of 2 tasks left"
    assert heads.split() == ["task", "CPU", "kind", "state", "version", "doing"]
    assert row.split(maxsplit=5) == [
        *("sleeper:4", "1", "user", "sleeping", "unpatched"),
        "nap(2500): msleep; is sleeping on function nap",
    ]


def test_columns_stand_below_their_heads() -> None:
    _, heads, *rows = picture(task(), task("a_longer_name", 5, kind="kthread", state="in user space")).lines()
    for head in ("CPU", "kind", "state", "version", "doing"):
        at = heads.index(head)
        assert all(row[at - 1] == " " and row[at] != " " for row in rows)
    assert all(line == line.rstrip() for line in (heads, *rows))


def test_without_a_transition_there_are_no_versions() -> None:
    title, heads, row = picture(task(version="", pending=False, why=""), transition="").lines()
    assert title == "at 1.500 s, no transition"
    assert "version" not in heads
    assert row.endswith("nap(2500): msleep")


def test_who_has_switched_is_told_how_until_it_has_to_switch_back() -> None:
    how = {"sleeper:4": "stack check"}
    switched = task(version="patched", pending=False, why="")
    assert picture(switched, how=how).lines()[-1].endswith("msleep; switched: stack check")
    assert picture(task(), how=how).lines()[-1].endswith("is sleeping on function nap")


@pytest.mark.parametrize(
    ("doing", "stack", "expected"),
    [
        ("nap_below(5, 7): msleep", ("msleep+0x3/0x4", "nap+0xe/0x20", "nap_below+0x1/0x30"), "in nap"),
        ("nap(5): msleep", ("msleep+0x3/0x4", "nap+0xe/0x20"), "nap(5): msleep"),
        ("nap(5): msleep", ("msleep+0x3/0x4", "new_nap+0xe/0x18 [fix]"), "msleep, in new_nap"),
        ("crunch(5)", ("asm_sysvec_apic_timer_interrupt+0x3/0x5", "step_one+0x5/0x10"), "in step_one"),
        ("crunch(5)", ("(no unwind information for 0x1)",), "crunch(5)"),
        ("sleep(5): nanosleep", (), "sleep(5): nanosleep"),
    ],
)  # fmt: skip
def test_the_innermost_function_is_named_unless_what_the_task_does_says_it(
    doing: str, stack: tuple[str, ...], expected: str
) -> None:
    assert picture(task(doing=doing, stack=stack, why="")).lines()[-1].endswith(expected)


def test_the_kernel_s_own_tasks_are_shown_while_they_have_to_switch() -> None:
    init = task("init", 1, version="patched", pending=False, why="")
    waiting = task("kworker/0:1", 2)
    assert [each.name for each in picture(init, waiting, task()).shown] == ["kworker/0:1", "sleeper"]


def test_of_too_many_tasks_those_in_the_way_are_shown_and_the_rest_is_counted() -> None:
    switched = [
        task("done", pid, version="patched", pending=False, why="") for pid in range(10, 10 + ROWS_SHOWN)
    ]
    lines = picture(*switched, task(), task("sleeper", 5)).lines()
    assert len(lines) == 2 + ROWS_SHOWN + 1
    assert [line.split()[0] for line in lines[2:4]] == ["sleeper:4", "sleeper:5"]
    assert lines[-1] == "and 2 more: 2 patched"


def test_that_nobody_can_go_on_is_said() -> None:
    assert picture(task(), transition="", blocked=True).lines()[0] == (
        "at 1.500 s, no transition; nobody can go on, and no timer is armed"
    )


@pytest.mark.parametrize("narrow", [False, True])
def test_what_is_drawn_says_the_same_within_sixty_columns(narrow: bool) -> None:
    output = StringIO()
    drawn = picture(task(), task("a_15_bytes_name", 12345, state="in user space")).drawing(narrow=narrow)
    Console(file=output, width=60 if narrow else 100).print(drawn)
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= (60 if narrow else 100)
    words = " ".join(output.getvalue().split())
    assert "fix_steps in transition" in words
    assert "a_15_bytes_name:12345" in words
    assert "unpatched" in words
    assert ("CPU" in words) is not narrow
