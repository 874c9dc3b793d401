"""The JSON objects: their form is part of the interface, and `schema` changes with it."""

from typing import Any

import pytest
from command_line import FIX_AREA, klpemu

Form = dict[str, Any]

# A form is a dict of forms by key, a list with the form of each element, a type, or several types.
FINDING: Form = {
    "step": str,
    "invariant": str,
    "what": str,
    "address": (str, None),
    "symbol": (str, None),
    "expected": (str, None),
    "found": (str, None),
    "details": [str],
}
VERDICT: Form = {"schema": int, "verb": str, "holds": bool, "checks": int, "findings": [FINDING]}
INSTRUCTION: Form = {"address": str, "place": str, "bytes": str, "text": str, "comment": str}
TRACE: Form = {"functions": [str], "executed": int, "returned": int, "instructions": [INSTRUCTION]}
FAULT: Form = {"error": str, "address": (str, None), "registers": dict, "last": [str]}
FUNCTION: Form = {
    "function": str,
    "place": str,
    "site": str,
    "bytes": str,
    "text": str,
    "func_stack": [str],
    "enabled_functions": (str, None),
}
MOMENT: Form = {
    "seconds": float,
    "kind": str,
    "text": str,
    "task": (str, None),
    "version": (str, None),
    "how": (str, None),
}
TASK: Form = {
    "name": str,
    "pid": int,
    "cpu": int,
    "kind": str,
    "state": str,
    "version": (str, None),
    "pending": bool,
    "doing": (str, None),
    "stack": [str],
    "why": (str, None),
    "how": (str, None),
    "returned": [{"call": str, "returned": int}],
}
STEP: Form = {
    "step": str,
    "action": str,
    "stage": (str, None),
    "line": (int, None),
    "holds": bool,
    "checks": dict,
    "findings": [FINDING],
    "log": [str],
    "functions": [FUNCTION],
    "not_loaded": [str],
    "returned": (int, None),
    "contents": ([str], None),
    "trace": (TRACE, None),
    "error": (str, None),
    "fault": (FAULT, None),
    "expected": [FINDING],
    "seconds": (float, None),
    "transition": (str, None),
    "timeline": ([MOMENT], None),
    "tasks": ([TASK], None),
    "in_the_way": [TASK],
}
SITE: Form = {
    "place": str,
    "section": str,
    "offset": int,
    "address": str,
    "functions": [str],
    "bytes": str,
    "kind": str,
    "reason": (str, None),
}
TOTALS: Form = {"call": int, "nop5": int, "refused": int, "padding": int}
CODE: Form = {"offset": int, "bytes": str, "text": str, "comment": (str, None)}
REPLACED: Form = {
    "function": str,
    "sympos": int,
    "place": (str, None),
    "site": (str, None),
    "problem": (str, None),
    "replacement": str,
    "address": str,
    "instructions": [CODE],
}
KLP_RELOCATION: Form = {
    "section": str,
    "object": str,
    "place": str,
    "type": str,
    "symbol": str,
    "addend": int,
    "address": (str, None),
    "resolved": (str, None),
    "problem": (str, None),
    "is_due": bool,
}
INFO: Form = {
    "schema": int,
    "verb": str,
    "holds": bool,
    "file": str,
    "name": str,
    "modinfo": dict,
    "parameters": [{"name": str, "type": (str, None), "description": (str, None)}],
    "declared": bool,
    "replace": (bool, None),
    "states": [{"id": int, "version": int}],
    "missing": [str],
    "problems": [str],
    "objects": [{"name": str, "loaded": bool, "callbacks": dict, "functions": [REPLACED]}],
    "klp_relocations": [KLP_RELOCATION],
}
INFO_OF_A_KERNEL: Form = {
    "schema": int,
    "verb": str,
    "holds": bool,
    "file": str,
    "banner": str,
    "cpus": int,
    "cpu": str,
    "handler": str,
    "symbols": int,
    "sites": int,
    "return_thunk": str,
    "decisions": dict,
    "applied": [{"table": str, "applied": int, "left": int, "refused": [str]}],
    "answered": [str],
    "refused": [str],
}
FORMS: dict[str, Any] = {
    "info": (INFO, INFO_OF_A_KERNEL),
    "demo": {**VERDICT, "steps": [STEP]},
    "verify": {**VERDICT, "steps": [STEP]},
    "run": {
        **VERDICT,
        "scenarios": [
            {"file": str, "title": (str, None), "variants": [str], "steps": [STEP], "left_out": int}
        ],
    },
    "trace": {**VERDICT, "call": str, "patches": [str], "trace": (TRACE, None), "fault": (FAULT, None)},
    "sites": {
        "schema": int,
        "verb": str,
        "holds": bool,
        "totals": TOTALS,
        "files": [{"file": str, "totals": TOTALS, "sites": [SITE]}],
    },
}


def misfits(value: Any, form: Any, path: str = "") -> list[str]:
    """Where a value does not have its form."""
    if isinstance(form, tuple):
        return [] if any(not misfits(value, each, path) for each in form) else [f"{path} is {value!r}"]
    if isinstance(form, dict):
        if not isinstance(value, dict) or list(value) != list(form):
            return [f"{path}: {list(value) if isinstance(value, dict) else value!r}, not {list(form)}"]
        return [found for key, each in form.items() for found in misfits(value[key], each, f"{path}.{key}")]
    if isinstance(form, list):
        if not isinstance(value, list):
            return [f"{path} is {value!r}"]
        return [found for n, each in enumerate(value) for found in misfits(each, form[0], f"{path}[{n}]")]
    return [] if (value is None if form is None else type(value) is form) else [f"{path} is {value!r}"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo"],
        ["run", "builtin:demo.toml", "builtin:refused.toml"],
        ["run", "builtin:force.toml", "builtin:stuck.toml", "builtin:deadlock.toml"],
        ["verify", FIX_AREA, "--call", "area_of(3, 4)=13"],
        ["verify", FIX_AREA, "--call", "jump_nowhere()"],
        ["trace", "--patch", FIX_AREA, "area_of", "3", "4"],
        ["trace", "jump_nowhere"],
        ["sites", "builtin:kernel.o", "builtin:single_nops.o", "builtin:patchable.o", "builtin:linked.elf"],
        ["sites", "--summary", "builtin:kernel.o"],
        ["info", "--module", "builtin:lamp.ko", "builtin:klp_lamp.ko"],
        ["info", "builtin:klp_lamp.ko"],
        ["info"],
    ],
    ids=" ".join,
)
def test_each_verb_s_object_has_its_documented_form(arguments: list[str]) -> None:
    outcome = klpemu(*arguments, "--json")
    object_ = outcome.object
    assert misfits(object_, FORMS[arguments[0]]) == []
    assert (object_["schema"], object_["verb"]) == (1, arguments[0])
    assert outcome.status == (0 if object_["holds"] else 1)


def test_the_form_of_a_misfit_is_recognised() -> None:
    assert misfits({"a": 1}, {"a": int}) == []
    assert misfits({"a": True}, {"a": int}) == [".a is True"]
    assert misfits({"a": 1, "b": 2}, {"a": int}) != []
    assert misfits([{"a": None}], [{"a": (str, None)}]) == []
    assert misfits([{"a": 3}], [{"a": (str, None)}]) == ["[0].a is 3"]


def test_numbers_agree_with_the_text() -> None:
    object_ = klpemu("demo", "--json").object
    text = klpemu("demo").out
    assert text.splitlines()[-1] == f"all {object_['checks']} checks hold"
    assert object_["checks"] == sum(sum(step["checks"].values()) for step in object_["steps"])
    assert [step["returned"] for step in object_["steps"] if step["action"] == "trace"] == [
        7,
        12,
        120000,
        7,
        7,
    ]


def test_sites_agree_with_the_file() -> None:
    (file,) = klpemu("sites", "--json", "builtin:single_nops.o").object["files"]
    (site,) = file["sites"]
    assert (site["place"], site["functions"], site["bytes"]) == (
        ".text+0x0",
        ["single_nops+0x0/0xa"],
        "9090909090",
    )
    assert site["kind"] == "refused"
    assert "preempted between" in site["reason"]
