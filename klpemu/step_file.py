"""Reading the `[[step]]` tables of a scenario."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elf.errors import KlpemuError
from klpemu.call_expression import parse_call
from klpemu.expectations import INVARIANTS, TASK_WORDS, is_task_word
from klpemu.file_steps import LOOKS
from klpemu.fixtures import locate
from klpemu.scenario import Action, Step
from klpemu.task_file import read_schedule
from klpemu.toml_table import Table, did_you_mean

__all__ = ["Declared", "file_of", "read_step"]

TRANSITION: Final = "transition"
_ACTIONS: Final = [each for each in Action if each is not Action.BOOT]
_OF_REGISTRATION: Final = (Action.REGISTER, Action.UNREGISTER)
_OF_A_PATCH: Final = (Action.ENABLE, Action.DISABLE, Action.REVERSE, Action.FORCE, *_OF_REGISTRATION)
_DURATION: Final = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)\s*(ms|s|min)")
_MSECS: Final = {"ms": 1, "s": 1000, "min": 60_000}
_LONGEST: Final = 24 * 3600 * 1000  # ms


@dataclass(frozen=True, slots=True)
class Declared:
    """What steps can name: patches, tasks, the tasks that every kernel has; and where their paths begin.

    `registration` says that patches are registered and unregistered (patches/variants/registration.py).
    """

    patches: Sequence[str]
    tasks: Sequence[str]
    system_tasks: Sequence[str]
    base: Path
    registration: bool = False


def read_step(table: Table, declared: Declared) -> Step:
    """One step; raises `ScenarioError`."""
    action = _action(table)
    target = table.text(action.value)
    call = None
    msecs = None
    if action in (Action.CALL, Action.TRACE):
        try:
            call = parse_call(target)
        except KlpemuError as error:
            raise table.error(str(error), action.value, bare=True) from error
    elif action in _OF_REGISTRATION and not declared.registration:
        what = f"this kernel has no step '{action.value}': a patch is enabled when it is loaded"
        advice = 'kernels before v5.1 had it; write variant = "patches_registered" above the first table'
        raise table.error(what, action.value, bare=True, advice=advice)
    elif action in _OF_A_PATCH:
        _known(table, action.value, target, declared.patches, "patch", "declare it with [[patch]]")
    elif action in (Action.LOAD, Action.MODPROBE):
        file_of(table, action.value, target, declared.base)
    elif action is Action.SPAWN:
        _known(table, action.value, target, declared.tasks, "task", "declare it with [[task]]")
    elif action in (Action.READ, Action.LIST, Action.WRITE) and not target.startswith("/"):
        raise table.error(f"is '{target}'; expected a path that begins with a slash", action.value)
    elif action is Action.RUN:
        msecs = _duration(table, action.value, target)
    elif action is Action.WAIT:
        if target != TRANSITION:
            advice = did_you_mean(target, [TRANSITION], f"it can wait for '{TRANSITION}'")
            raise table.error(f"no step can wait for '{target}'", action.value, bare=True, advice=advice)
        within = table.text("within", "")
        msecs = _duration(table, "within", within) if table.has("within") else None
    step = Step(
        action,
        target,
        call,
        msecs,
        error=table.text("error", ""),
        log=table.texts("log"),
        transition=_transition(table, declared),
        tasks=_tasks(table, declared),
        returned=_returned(table, declared),
        findings=_findings(table),
        value=table.text("value") if action is Action.WRITE else "",
        parameters=table.text("parameters", "") if action is Action.MODPROBE else "",
        contents=_lines(table, "contents") if action in LOOKS else None,
        functions=_functions(table) if action is Action.FTRACE else (),
        schedule=read_schedule(table, [*declared.tasks, *declared.system_tasks]),
        fail_alloc=table.text("fail_alloc", ""),
        stage=table.text("stage", ""),
        note=table.text("note", ""),
        line=table.line,
        returns=table.integer("returns") if call else None,
        through=table.texts("through") if action is Action.TRACE else None,
        executed=table.integer("executed") if action is Action.TRACE else None,
    )
    if step.error and step.returns is not None:
        raise table.error("cannot be expected together with 'error'", "returns")
    if step.error and step.contents is not None:
        raise table.error("cannot be expected together with 'error'", "contents")
    table.finish(f"a step that does '{action.value}'")
    return step


def file_of(table: Table, key: str, name: str, base: Path) -> Path:
    """The file that a key names, which must be there."""
    try:
        path = locate(name, base)
    except KlpemuError as error:
        raise table.error(str(error), key, bare=True) from error
    if not path.exists():
        raise table.error(f"{path}: No such file or directory", key, bare=True)
    return path


def _action(table: Table) -> Action:
    actions = [each for each in _ACTIONS if table.has(each.value)]
    if len(actions) == 1:
        return actions[0]
    names = [each.value for each in _ACTIONS]
    found = " and ".join(f"'{each.value}'" for each in actions) or "nothing to do"
    unknown = [key for key in table.names() if difflib.get_close_matches(key, names, 1, 0.75)]
    if not actions and unknown:
        text = f"unknown key '{unknown[0]}' in a step"
        raise table.error(text, unknown[0], bare=True, advice=f"actions are {', '.join(names)}")
    raise table.error(f"a step with {found}", advice=f"give it exactly one of {', '.join(names)}")


def _known(table: Table, key: str, name: str, known: Sequence[str], what: str, otherwise: str) -> None:
    if name not in known:
        advice = did_you_mean(name, known, otherwise)
        raise table.error(f"no {what} '{name}' is declared", key, bare=True, advice=advice)


def _duration(table: Table, key: str, text: str) -> int:
    """Virtual milliseconds."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise table.error(f"is '{text}'; expected a time like '500 ms' or '2 s'", key)
    msecs = round(float(found[1]) * _MSECS[found[2]])
    if not 0 < msecs <= _LONGEST:
        raise table.error(f"is '{text}'; expected 1 ms to {_LONGEST // 1000:,} s", key)
    return msecs


def _transition(table: Table, declared: Declared) -> str | None:
    if not table.has("transition"):
        table.text("transition", "")
        return None
    name = table.text("transition", "")
    if name:
        _known(table, "transition", name, declared.patches, "patch", 'write "" for none')
    return name


def _tasks(table: Table, declared: Declared) -> Mapping[str, tuple[str, ...]]:
    found = {}
    tasks = table.table("tasks")
    for name in tasks.names():
        _known_task(tasks, name, declared)
        words = tasks.text_or_texts(name)
        if not words:
            raise tasks.error("is empty", name)
        for index, word in enumerate(words):
            if not is_task_word(word):
                advice = did_you_mean(word, TASK_WORDS, f"known are {', '.join(TASK_WORDS)}")
                raise tasks.error(f"no task can be '{word}'", name, index, bare=True, advice=advice)
        found[name] = words
    return found


def _returned(table: Table, declared: Declared) -> Mapping[str, tuple[int, ...]]:
    found = {}
    returned = table.table("returned")
    for name in returned.names():
        _known_task(returned, name, declared)
        found[name] = returned.integer_or_integers(name)
        if not found[name]:
            raise returned.error("is empty", name)
    return found


def _known_task(table: Table, name: str, declared: Declared) -> None:
    known = [*declared.tasks, *declared.system_tasks]
    _known(table, name, name, known, "task", "declare it with [[task]]")


def _lines(table: Table, key: str) -> tuple[str, ...] | None:
    """Lines of text: one string, with or without the newline at its end, or an array with one for each."""
    if not table.has(key):
        table.text(key, "")
        return None
    return tuple(line for text in table.text_or_texts(key) for line in text.splitlines())


def _functions(table: Table) -> tuple[str, ...]:
    functions = table.texts("functions")
    if not functions:
        raise table.error("an ftrace user without functions", advice='write functions = ["area_of"]')
    return functions


def _findings(table: Table) -> tuple[str, ...]:
    names = table.text_or_texts("finding")
    for index, name in enumerate(names):
        if name not in INVARIANTS:
            advice = did_you_mean(name, INVARIANTS, f"there are {', '.join(INVARIANTS)}")
            raise table.error(f"no invariant is called '{name}'", "finding", index, bare=True, advice=advice)
    return names
