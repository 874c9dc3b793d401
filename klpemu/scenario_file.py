"""Reading a scenario from TOML.  Every error names the file and the line: docs/cli.md describes the form."""

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from elf.errors import KlpemuError
from emu.cpu_features import CPUS
from klpemu import toml_lines
from klpemu.boot_machine import DEFAULT_CPU, HANDLERS
from klpemu.scenario import REGISTRATION, Scenario
from klpemu.step_file import Declared, file_of, read_step
from klpemu.task_file import MAX_CPUS, read_schedule, read_tasks, system_tasks
from klpemu.toml_table import ScenarioError, Table, did_you_mean
from patches.livepatch import Func, Patch
from patches.variants import variant

__all__ = ["ScenarioError", "read_scenario"]

_SYNTAX_PLACE: Final = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)")
_PREEMPT: Final = ("voluntary", "full")


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
    return _scenario(Table(document, (), lines, str(path)), path.parent)


def _scenario(table: Table, base: Path) -> Scenario:
    title = table.text("title", "")
    kernel = table.text("kernel") if table.has("kernel") else table.text("kernel", "")
    modules = table.texts("modules") or ()
    budget = table.integer("budget")
    if budget is not None and budget < 1:
        raise table.error("must be at least 1 instruction", "budget")
    cpus = table.number("cpus", 1, MAX_CPUS, 1) or 1
    full_preemption = _full_preemption(table)
    seed = table.integer("seed")
    if seed is not None and table.has("schedule"):
        raise table.error("cannot be given together with 'schedule'", "seed", advice="one of them decides")
    patches = _patches(table, base)
    tasks = read_tasks(table, cpus)
    system = system_tasks(cpus)
    schedule = read_schedule(table, [*tasks, *system])
    variants = _variants(table)
    handler = _one_of(table, "handler", HANDLERS)
    system_map = table.text("system_map", "")
    cpu = _one_of(table, "cpu", CPUS) or DEFAULT_CPU
    declared = Declared(list(patches), list(tasks), system, base, REGISTRATION in variants)
    steps = [read_step(each, declared) for each in table.tables("step")]
    table.finish("a scenario")
    return Scenario(
        path=table.file,
        title=title,
        kernel=file_of(table, "kernel", kernel, base) if kernel else None,
        handler=handler,
        cpu=cpu,
        system_map=file_of(table, "system_map", system_map, base) if system_map else None,
        modules=[file_of(table, "modules", each, base) for each in modules],
        cpus=cpus,
        full_preemption=full_preemption,
        seed=seed,
        schedule=schedule,
        patches=patches,
        tasks=tasks,
        steps=steps,
        budget=budget or 0,
        base=base,
        variants=variants,
    )


def _variants(table: Table) -> tuple[str, ...]:
    texts = table.text_or_texts("variant")
    for index, text in enumerate(texts):
        try:
            variant(text)
        except KlpemuError as error:
            raise table.error(str(error), "variant", index, bare=True) from error
    return texts


def _one_of(table: Table, key: str, known: Iterable[str]) -> str | None:
    """A name among those that are known; None without the key."""
    name = table.text(key, "")
    if name and name not in known:
        advice = did_you_mean(name, [*known], f"there are {', '.join(known)}")
        raise table.error(f"no {key} is called '{name}'", key, bare=True, advice=advice)
    return name or None


def _full_preemption(table: Table) -> bool:
    """`preempt`, as on the kernel's command line."""
    model = table.text("preempt", _PREEMPT[0])
    if model not in _PREEMPT:
        advice = did_you_mean(model, _PREEMPT, f"there are {' and '.join(_PREEMPT)}")
        raise table.error(f"is '{model}'", "preempt", advice=advice)
    return model == "full"


def _patches(table: Table, base: Path) -> dict[str, Patch]:
    patches: dict[str, Patch] = {}
    for each in table.tables("patch", needed=False):
        patch = _patch(each, base)
        if patch.name in patches:
            raise each.error(f"a second patch '{patch.name}'", "name", bare=True, advice="names are unique")
        patches[patch.name] = patch
    return patches


def _patch(table: Table, base: Path) -> Patch:
    name = table.text("name")
    code = file_of(table, "code", table.text("code"), base)
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


def _func(table: Table) -> Func:
    old, new, sympos = table.text("old"), table.text("new"), table.integer("sympos") or 0
    if not 0 <= sympos < 1 << 32:
        raise table.error("is no position; count from 1", "sympos")
    table.finish("a function")
    return Func(old, new, sympos)
