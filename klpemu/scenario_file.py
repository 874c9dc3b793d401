"""Reading a scenario from TOML.  Every error names the file and the line: docs/cli.md describes the form."""

import difflib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from elf.errors import KlpemuError
from klpemu import toml_lines
from klpemu.call_expression import parse_call
from klpemu.fixtures import locate
from klpemu.scenario import Action, Scenario, Step
from patches.livepatch import Func, Patch

__all__ = ["ScenarioError", "read_scenario"]

_ACTIONS: Final = [each for each in Action if each is not Action.BOOT]
_SYNTAX_PLACE: Final = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)")


class ScenarioError(KlpemuError):
    """A scenario file that cannot be read or says something that makes no sense; `where` is `file:line`."""


def read_scenario(path: Path) -> Scenario:
    """Read and check a scenario file; raises `ScenarioError`."""
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ScenarioError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ScenarioError("is not UTF-8, which TOML must be", where=f"{path}:{line}") from error
    except ValueError as error:
        raise ScenarioError(f"cannot be read: {error}", where=repr(str(path))) from error
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _SYNTAX_PLACE.search(str(error))
        line = int(found[1]) if found and found[1] else max(1, len(text.splitlines()))
        raise ScenarioError(_SYNTAX_PLACE.sub("", str(error)), where=f"{path}:{line}") from error
    except RecursionError as error:
        raise ScenarioError("is nested too deeply", where=str(path)) from error
    lines = toml_lines.key_lines(text.replace("\r\n", "\n"))
    return _scenario(_Table(document, (), lines, str(path)), path.parent)


class _Table:
    """One table of the file, read key by key; `finish` refuses the keys that nobody asked for."""

    def __init__(
        self, values: dict[str, Any], path: toml_lines.Path, lines: dict[toml_lines.Path, int], file: str
    ):
        self._values = values
        self._path = path
        self._lines = lines
        self._file = file
        self._known: list[str] = []

    @property
    def line(self) -> int:
        return self._line(self._path)

    def has(self, key: str) -> bool:
        return key in self._values

    def text(self, key: str, default: str | None = None) -> str:
        value = self._value(key, str, "a string", default)
        if not value and default is None:
            raise self.error("is empty", key)
        return str(value)

    def integer(self, key: str) -> int | None:
        if key not in self._values:
            self._known.append(key)
            return None
        value = int(self._value(key, int, "an integer"))
        if not -(1 << 63) <= value < 1 << 64:
            raise self.error("does not fit 64 bits", key)
        return value

    def boolean(self, key: str) -> bool:
        return bool(self._value(key, bool, "true or false", False))

    def texts(self, key: str) -> tuple[str, ...] | None:
        if key not in self._values:
            self._known.append(key)
            return None
        values = self._value(key, list, "an array of strings")
        for index, each in enumerate(values):
            if not isinstance(each, str):
                raise self._wrong_type(f"{key}[{index}]", each, "a string", (*self._path, key, index))
        return tuple(values)

    def table(self, key: str) -> "_Table":
        values = self._value(key, dict, "a table", {})
        return _Table(values, (*self._path, key), self._lines, self._file)

    def tables(self, key: str, *, needed: bool = True) -> list["_Table"]:
        values = self._value(key, list, "an array of tables", None if needed else [])
        for index, each in enumerate(values):
            if not isinstance(each, dict):
                raise self._wrong_type(f"{key}[{index}]", each, "a table", (*self._path, key, index))
        return [
            _Table(each, (*self._path, key, index), self._lines, self._file)
            for index, each in enumerate(values)
        ]

    def names(self) -> list[str]:
        return list(self._values)

    def finish(self, what: str) -> None:
        for key in self._values:
            if key not in self._known:
                close = difflib.get_close_matches(key, self._known, 1)
                advice = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(self._known)}"
                raise self.error(f"unknown key '{key}' in {what}", key, advice=advice, bare=True)

    def error(self, what: str, key: str = "", *, advice: str = "", bare: bool = False) -> ScenarioError:
        path = (*self._path, key) if key else self._path
        text = f"'{key}' {what}" if key and not bare else what
        return ScenarioError(text, where=f"{self._file}:{self._line(path)}", advice=advice)

    def _value(self, key: str, wanted: type, what: str, default: Any = None) -> Any:
        self._known.append(key)
        if key not in self._values:
            if default is not None:
                return default
            raise self.error(f"'{key}' is missing; expected {what}")
        value = self._values[key]
        # TOML's booleans are no integers, Python's are.
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise self._wrong_type(key, value, what, (*self._path, key))
        return value

    def _wrong_type(self, name: str, value: Any, wanted: str, path: toml_lines.Path) -> ScenarioError:
        found = _TYPES.get(type(value), type(value).__name__)
        return ScenarioError(
            f"'{name}' is {found}; expected {wanted}", where=f"{self._file}:{self._line(path)}"
        )

    def _line(self, path: toml_lines.Path) -> int:
        """The line of a place, or of the nearest one around it that has one."""
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)


_TYPES: Final = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a float",
    list: "an array",
    dict: "a table",
}


def _scenario(table: _Table, base: Path) -> Scenario:
    title = table.text("title", "")
    kernel = table.text("kernel") if table.has("kernel") else table.text("kernel", "")
    modules = table.texts("modules") or ()
    budget = table.integer("budget")
    if budget is not None and budget < 1:
        raise table.error("must be at least 1 instruction", "budget")
    patches: dict[str, Patch] = {}
    for each in table.tables("patch", needed=False):
        patch = _patch(each, base)
        if patch.name in patches:
            raise each.error(f"a second patch '{patch.name}'", "name", bare=True, advice="names are unique")
        patches[patch.name] = patch
    steps = [_step(each, list(patches), base) for each in table.tables("step")]
    table.finish("a scenario")
    return Scenario(
        path=table.error("").where.rpartition(":")[0],
        title=title,
        kernel=_locate(table, "kernel", kernel, base) if kernel else None,
        modules=[_locate(table, "modules", each, base) for each in modules],
        patches=patches,
        steps=steps,
        budget=budget or 0,
        base=base,
    )


def _patch(table: _Table, base: Path) -> Patch:
    name = table.text("name")
    code = _locate(table, "code", table.text("code"), base)
    replace = table.boolean("replace")
    objects: dict[str, list[Func]] = {}
    declared = table.table("objects")
    for objname in declared.names():
        funcs = declared.tables(objname)
        if not funcs:
            raise declared.error(
                "is empty", objname, advice="name at least one function, or leave the object out"
            )
        objects[objname] = [_func(each) for each in funcs]
    table.finish("a patch")
    return Patch(name, objects, code, replace)


def _func(table: _Table) -> Func:
    old, new, sympos = table.text("old"), table.text("new"), table.integer("sympos") or 0
    if not 0 <= sympos < 1 << 32:
        raise table.error("is no position; count from 1", "sympos")
    table.finish("a function")
    return Func(old, new, sympos)


def _step(table: _Table, patches: Sequence[str], base: Path) -> Step:
    actions = [each for each in _ACTIONS if table.has(each.value)]
    names = ", ".join(each.value for each in _ACTIONS)
    if len(actions) != 1:
        found = " and ".join(f"'{each.value}'" for each in actions) or "nothing to do"
        unknown = [key for key in table.names() if difflib.get_close_matches(key, names.split(", "), 1, 0.75)]
        if not actions and unknown:
            raise table.error(
                f"unknown key '{unknown[0]}' in a step", unknown[0], bare=True, advice=f"actions are {names}"
            )
        raise table.error(f"a step with {found}", advice=f"give it exactly one of {names}")
    action = actions[0]
    target = table.text(action.value)
    call = None
    if action in (Action.CALL, Action.TRACE):
        try:
            call = parse_call(target)
        except KlpemuError as error:
            raise table.error(str(error), action.value, bare=True) from error
    elif action in (Action.ENABLE, Action.DISABLE) and target not in patches:
        close = difflib.get_close_matches(target, patches, 1)
        advice = f"did you mean '{close[0]}'?" if close else "declare it with [[patch]]"
        raise table.error(f"no patch '{target}' is declared", action.value, bare=True, advice=advice)
    elif action is Action.LOAD:
        _locate(table, action.value, target, base)
    step = Step(
        action,
        target,
        call,
        error=table.text("error", ""),
        log=table.texts("log"),
        stage=table.text("stage", ""),
        note=table.text("note", ""),
        line=table.line,
        returns=table.integer("returns") if call else None,
        through=table.texts("through") if action is Action.TRACE else None,
        executed=table.integer("executed") if action is Action.TRACE else None,
    )
    if step.error and step.returns is not None:
        raise table.error("cannot be expected together with 'error'", "returns")
    table.finish(f"a step that does '{action.value}'")
    return step


def _locate(table: _Table, key: str, name: str, base: Path) -> Path:
    try:
        path = locate(name, base)
    except KlpemuError as error:
        raise table.error(str(error), key, bare=True) from error
    if not path.exists():
        raise table.error(f"{path}: No such file or directory", key, bare=True)
    return path
