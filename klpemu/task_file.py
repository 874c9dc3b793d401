"""Reading the `[[task]]` tables of a scenario, and its schedule."""

import re
from collections.abc import Mapping, Sequence
from typing import Final

from elf.errors import KlpemuError
from emu.fork import TASK_COMM_LEN
from emu.timer import JIFFY_INSTRUCTIONS
from klpemu.scenario import DeclaredTask
from klpemu.tasks import parse_operation
from klpemu.toml_table import Table, did_you_mean

__all__ = ["MAX_CPUS", "read_schedule", "read_tasks", "system_tasks"]

MAX_CPUS: Final = 8
MAX_COUNT: Final = 10_000
MAX_REPEAT: Final = 1 << 31
MAX_INSTRUCTIONS: Final = 1 << 31
MAX_TIMES: Final = 100_000
_NUMBERED: Final = re.compile(r"#[1-9][0-9]{0,4}$")


def system_tasks(cpus: int) -> list[str]:
    """The names of the tasks that every kernel has; `init` makes the requests of the steps."""
    others = [f"task{number + 1}" for number in range(1, cpus)]
    return ["init", *others, "kworker/0:1", *(f"swapper/{number}" for number in range(cpus))]


def read_tasks(table: Table, cpus: int) -> Mapping[str, DeclaredTask]:
    """The declared tasks by name; raises `ScenarioError`."""
    tasks: dict[str, DeclaredTask] = {}
    for each in table.tables("task", needed=False):
        task = _task(each, cpus)
        if task.name in tasks:
            raise each.error(f"a second task '{task.name}'", "name", bare=True, advice="names are unique")
        if task.name in system_tasks(cpus):
            text = f"every kernel has a task '{task.name}'"
            raise each.error(text, "name", bare=True, advice="call yours otherwise")
        tasks[task.name] = task
    return tasks


def read_schedule(table: Table, tasks: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """The entries "NAME:INSTRUCTIONS" or "NAME" (as many as a jiffy has) of the key `schedule`.

    "NAME*TIMES" is so many entries "NAME".  Of several tasks with one name "NAME#2" is the second that can
    go on.
    """
    entries = table.texts("schedule")
    if entries == ():
        raise table.error("is empty", "schedule", advice="leave it out, and the vCPUs take turns")
    return tuple(
        turn for index, text in enumerate(entries or ()) for turn in _turns(table, index, text, tasks)
    )


def _turns(table: Table, index: int, text: str, tasks: Sequence[str]) -> list[tuple[str, int]]:
    name, star, times = text.rpartition("*")
    if not star or not times.isascii() or not times.isdigit():
        return [_turn(table, index, text, tasks)]
    if not 0 < int(times) <= MAX_TIMES:
        raise table.error(f"'{text}' is no number of turns", "schedule", index, bare=True)
    return [_turn(table, index, name, tasks)] * int(times)


def _turn(table: Table, index: int, text: str, tasks: Sequence[str]) -> tuple[str, int]:
    # Before the colon is looked at: a kworker has one in its name.
    if text in tasks or _NUMBERED.sub("", text) in tasks:
        return text, JIFFY_INSTRUCTIONS
    name, colon, number = text.rpartition(":")
    if not colon or not number.isascii() or not number.isdigit():
        name, number = text, ""
    if name not in tasks and _NUMBERED.sub("", name) not in tasks:
        advice = did_you_mean(name, tasks, f"there are {', '.join(tasks)}")
        raise table.error(f"no task '{name}' to go on", "schedule", index, bare=True, advice=advice)
    if not 0 < int(number) <= MAX_INSTRUCTIONS:
        raise table.error(f"'{text}' is no number of instructions", "schedule", index, bare=True)
    return name, int(number)


def _task(table: Table, cpus: int) -> DeclaredTask:
    name = table.text("name")
    if len(name.encode()) >= TASK_COMM_LEN or not name.isprintable():
        raise table.error(f"is '{name}'; expected at most {TASK_COMM_LEN - 1} printable bytes", "name")
    kthread = table.boolean("kthread")
    declared = DeclaredTask(
        name=name,
        program=_program(table, kthread=kthread),
        kthread=kthread,
        cpu=table.number("cpu", 0, cpus - 1, None),
        repeat=_repeat(table),
        count=table.number("count", 1, MAX_COUNT, 1) or 1,
        start=table.boolean("start", True),
        line=table.line_of("program"),
    )
    table.finish("a task")
    return declared


def _program(table: Table, *, kthread: bool) -> tuple[str, ...]:
    program = table.texts("program")
    if not program:
        what = "'program' is missing" if program is None else "'program' is empty"
        advice = 'write what the task does, like ["transact(100)", "sleep(50)"]'
        raise table.error(what, "program" if program == () else "", bare=True, advice=advice)
    for index, text in enumerate(program):
        try:
            parse_operation(text, kthread=kthread)
        except KlpemuError as error:
            raise table.error(str(error), "program", index, bare=True) from error
    return program


def _repeat(table: Table) -> int | None:
    """How often the program runs: a number, or None for ever, which is written `true`."""
    if table.is_boolean("repeat"):
        return None if table.boolean("repeat") else 1
    return table.number("repeat", 1, MAX_REPEAT, 1)
