"""Writing a scenario as TOML, so that `klpemu.scenario_file` reads back the same."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from emu.timer import JIFFY_INSTRUCTIONS
from klpemu.boot_machine import DEFAULT_CPU
from klpemu.fixtures import shown
from klpemu.scenario import Action, DeclaredTask, Scenario, Step
from patches.livepatch import Patch

__all__ = ["scenario_text", "step_lines"]

_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def scenario_text(scenario: Scenario, comment: Sequence[str] = ()) -> str:
    """The scenario as a file; `comment` are lines to stand above it.

    Where the steps stand in their file is not kept; relative paths are written as they are.
    """
    tables = [
        [f"# {line}".rstrip() for line in comment] + list(_head(scenario)),
        *(list(_patch(each)) for each in scenario.patches.values()),
        *(list(_task(each)) for each in scenario.tasks.values()),
        *(step_lines(each) for each in scenario.steps),
    ]
    return "\n\n".join("\n".join(each) for each in tables if each) + "\n"


def step_lines(step: Step) -> list[str]:
    """The `[[step]]` table of one step."""
    lines = ["[[step]]"]
    lines += [
        f"{key} = {_string(text)}" for key, text in (("stage", step.stage), ("note", step.note)) if text
    ]
    lines.append(f"{step.action.value} = {_string(_target(step))}")
    if step.action is Action.WRITE:
        lines.append(f"value = {_string(step.value)}")
    if step.action is Action.WAIT and step.msecs is not None:
        lines.append(f"within = {_string(f'{step.msecs} ms')}")
    for key, text in (
        ("parameters", step.parameters),
        ("fail_alloc", step.fail_alloc),
        ("error", step.error),
    ):
        lines += [f"{key} = {_string(text)}"] if text else []
    lines += [f"functions = {_strings(step.functions)}"] if step.functions else []
    lines += [f"schedule = {_strings(_turns(step.schedule))}"] if step.schedule else []
    for name, value in (("returns", step.returns), ("executed", step.executed)):
        lines += [] if value is None else [f"{name} = {value}"]
    for name, texts in (("log", step.log), ("through", step.through), ("contents", step.contents)):
        lines += [] if texts is None else [f"{name} = {_strings(texts)}"]
    lines += [] if step.transition is None else [f"transition = {_string(step.transition)}"]
    if step.tasks:
        lines.append(_inline("tasks", {name: _strings(words) for name, words in step.tasks.items()}))
    if step.returned:
        lines.append(_inline("returned", {name: _numbers(each) for name, each in step.returned.items()}))
    lines += [f"finding = {_strings(step.findings)}"] if step.findings else []
    return lines


def _head(scenario: Scenario) -> Iterator[str]:
    if scenario.title:
        yield f"title = {_string(scenario.title)}"
    if scenario.variants:
        yield f"variant = {_strings(scenario.variants)}"
    if scenario.kernel is not None:
        yield f"kernel = {_string(shown(scenario.kernel))}"
    if scenario.handler is not None:
        yield f"handler = {_string(scenario.handler)}"
    if scenario.cpu != DEFAULT_CPU:
        yield f"cpu = {_string(scenario.cpu)}"
    if scenario.modules:
        yield f"modules = {_strings(shown(each) for each in scenario.modules)}"
    if scenario.cpus != 1:
        yield f"cpus = {scenario.cpus}"
    if scenario.full_preemption:
        yield 'preempt = "full"'
    if scenario.budget:
        yield f"budget = {scenario.budget}"
    if scenario.seed is not None:
        yield f"seed = {scenario.seed}"
    if scenario.schedule:
        yield f"schedule = {_strings(_turns(scenario.schedule))}"


def _patch(patch: Patch) -> Iterator[str]:
    yield "[[patch]]"
    yield f"name = {_string(patch.name)}"
    yield f"code = {_string(shown(patch.code))}"
    if patch.replace:
        yield "replace = true"
    for name, funcs in patch.objects.items():
        yield f"objects.{name} = ["
        for func in funcs:
            sympos = f", sympos = {func.sympos}" if func.sympos else ""
            yield f"    {{ old = {_string(func.old)}, new = {_string(func.new)}{sympos} }},"
        yield "]"


def _task(task: DeclaredTask) -> Iterator[str]:
    yield "[[task]]"
    yield f"name = {_string(task.name)}"
    if task.kthread:
        yield "kthread = true"
    if task.cpu is not None:
        yield f"cpu = {task.cpu}"
    yield f"program = {_strings(task.program)}"
    if task.repeat != 1:
        yield f"repeat = {'true' if task.repeat is None else task.repeat}"
    if task.count != 1:
        yield f"count = {task.count}"
    if not task.start:
        yield "start = false"


def _target(step: Step) -> str:
    return str(step.call) if step.call is not None else step.target


def _turns(schedule: Iterable[tuple[str, int]]) -> Iterator[str]:
    """The entries as they are written: equal ones of a jiffy together."""
    for (name, instructions), group in itertools.groupby(schedule):
        times = len(list(group))
        if instructions != JIFFY_INSTRUCTIONS:
            yield from itertools.repeat(f"{name}:{instructions}", times)
        else:
            yield name if times == 1 else f"{name}*{times}"


def _inline(key: str, table: Mapping[str, str]) -> str:
    return f"{key} = {{ {', '.join(f'{_string(name)} = {value}' for name, value in table.items())} }}"


def _numbers(values: Iterable[int]) -> str:
    return f"[{', '.join(str(each) for each in values)}]"


def _strings(texts: Iterable[str]) -> str:
    return f"[{', '.join(_string(each) for each in texts)}]"


def _string(text: str) -> str:
    """A basic string of TOML (v1.0.0, "String"): control characters are escaped."""
    if text.isprintable() and '"' not in text and "\\" not in text:  # as nearly all are
        return f'"{text}"'
    return '"' + "".join(_ESCAPES.get(each) or _character(each) for each in text) + '"'


def _character(each: str) -> str:
    return f"\\u{ord(each):04x}" if ord(each) < 0x20 or ord(each) == 0x7F else each
