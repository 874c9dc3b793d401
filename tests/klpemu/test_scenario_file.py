"""Scenario files: what they say, and on which line they are wrong."""

from pathlib import Path

import pytest

from klpemu.call_expression import CallExpression
from klpemu.fixtures import fixture
from klpemu.scenario import Action
from klpemu.scenario_file import ScenarioError, read_scenario
from patches.livepatch import Func

GOOD = """\
title = "a title"
modules = ["builtin:nop_mcount.o"]
budget = 1_000

[[patch]]
name = "fix_area"
code = "builtin:fix_area.o"
replace = true
objects.vmlinux = [
    { old = "area_of", new = "fixed_area_of" },
    { old = "same_name", new = "fixed_perimeter_of", sympos = 2 },
]

[[step]]
stage = "first"
note = "explained"
enable = "fix_area"
log = ["livepatch: enabling patch 'fix_area'"]

[[step]]
trace = "area_of(3, 4)"
returns = 12
through = ["area_of"]
executed = 67

[[step]]
unload = "nop_mcount"
error = "EBUSY"
"""


def test_a_scenario_says_what_there_is_and_what_is_done(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text(GOOD)
    scenario = read_scenario(tmp_path / "good.toml")
    assert (scenario.title, scenario.budget, scenario.kernel) == ("a title", 1000, None)
    assert list(scenario.modules) == [fixture("nop_mcount.o")]
    patch = scenario.patches["fix_area"]
    assert (patch.replace, patch.code) == (True, fixture("fix_area.o"))
    assert patch.objects["vmlinux"][1] == Func("same_name", "fixed_perimeter_of", 2)
    enable, trace, unload = scenario.steps
    assert (enable.action, enable.target, enable.stage, enable.note, enable.line) == (
        Action.ENABLE,
        "fix_area",
        "first",
        "explained",
        14,
    )
    assert enable.log == ("livepatch: enabling patch 'fix_area'",)
    assert trace.call == CallExpression("area_of", (3, 4))
    assert (trace.returns, trace.through, trace.executed, trace.log) == (12, ("area_of",), 67, None)
    assert (unload.action, unload.error) == (Action.UNLOAD, "EBUSY")


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "fix.o").write_bytes(fixture("fix_area.o").read_bytes())
    text = GOOD.replace('"builtin:fix_area.o"', '"fix.o"')
    (tmp_path / "deep" / "good.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert read_scenario(Path("deep/good.toml")).patches["fix_area"].code == Path("deep/fix.o")


@pytest.mark.parametrize(
    ("old", "new", "line", "expected"),
    [
        ("budget", "bugdet", 3, "unknown key 'bugdet' in a scenario; did you mean 'budget'?"),
        ("budget = 1_000", "zzz = 1", 3, "unknown key 'zzz' in a scenario; known are title, kernel"),
        ("budget = 1_000", "budget = 0", 3, "'budget' must be at least 1 instruction"),
        ("budget = 1_000", "budget = true", 3, "'budget' is a boolean; expected an integer"),
        ("budget = 1_000", "budget = 1" + "0" * 30, 3, "'budget' does not fit 64 bits"),
        ('title = "a title"', "title = 3", 1, "'title' is an integer; expected a string"),
        ('["builtin:nop_mcount.o"]', '["builtin:nop_mcount.o",\n 3]', 3, "'modules[1]' is an integer"),
        ('["builtin:nop_mcount.o"]', '["gone.ko"]', 2, "gone.ko: No such file or directory"),
        ('["builtin:nop_mcount.o"]', '["builtin:gone.o"]', 2, "no such built-in file"),
        ("title =", 'kernel = "gone.o"\ntitle =', 1, "gone.o: No such file or directory"),
        ('name = "fix_area"', "", 5, "'name' is missing; expected a string"),
        ('name = "fix_area"', 'name = ""', 6, "'name' is empty"),
        ("builtin:fix_area.o", "gone.o", 7, "gone.o: No such file or directory"),
        ("replace = true", "replace = 1", 8, "'replace' is an integer; expected true or false"),
        ("replace", "replaces", 8, "unknown key 'replaces' in a patch; did you mean 'replace'?"),
        ('{ old = "area_of",', '{ oldd = "area_of",', 10, "'old' is missing; expected a string"),
        ("sympos = 2", "sympos = -2", 11, "'sympos' is no position"),
        ("sympos = 2", "pos = 2", 11, "unknown key 'pos' in a function"),
        ("objects.vmlinux = [", "objects.vmlinux = []\nx = [", 9, "'vmlinux' is empty"),
        ("objects.vmlinux = [", 'objects.vmlinux = ["area_of",', 9, "'vmlinux[0]' is a string"),
        ('enable = "fix_area"', 'enable = "fix_aera"', 17, "is declared; did you mean 'fix_area'?"),
        ('enable = "fix_area"', 'enabel = "fix_area"', 17, "unknown key 'enabel' in a step; actions"),
        ('enable = "fix_area"', "", 14, "a step with nothing to do; give it exactly one of load"),
        ('enable = "fix_area"', 'enable = "fix_area"\nunload = "x"', 14, "a step with 'unload' and 'enable'"),
        ('enable = "fix_area"', 'enable = "fix_area"\nreturns = 1', 18, "unknown key 'returns' in a step"),
        ('log = ["livepatch', 'log = [7, "livepatch', 18, "'log[0]' is an integer; expected a string"),
        ("area_of(3, 4)", "area_of 3, 4", 21, "'area_of 3, 4' is no call"),
        ("executed = 67", "executed = 6.7", 24, "'executed' is a float; expected an integer"),
        ('"area_of(3, 4)"', '"area_of(3, 4)"\nerror = "x"', 23, "'returns' cannot be expected together"),
        ('unload = "nop_mcount"', 'load = "gone.ko"', 27, "gone.ko: No such file or directory"),
        ('title = "a title"', 'title = "a title', 1, "Illegal character"),
        ("[[step]]\nunload", "[[step]\nunload", 26, "Expected"),
        ("budget = 1_000", "budget = 1_000\nbudget = 2", 4, "Cannot overwrite a value"),
    ],
)  # fmt: skip
def test_a_mistake_is_reported_with_its_line(
    tmp_path: Path, old: str, new: str, line: int, expected: str
) -> None:
    file = tmp_path / "bad.toml"
    assert old in GOOD
    file.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ScenarioError) as caught:
        read_scenario(file)
    assert expected in str(caught.value)
    assert caught.value.where == f"{file}:{line}"


def test_a_second_patch_of_one_name_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(GOOD + '[[patch]]\nname = "fix_area"\ncode = "builtin:fix_area.o"\n')
    with pytest.raises(ScenarioError, match=r"bad\.toml:30: a second patch 'fix_area'"):
        read_scenario(file)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", ":1: 'step' is missing; expected an array of tables"),
        (b"a = [", ":1: Invalid value"),
        (b"\n\xff\xfe", ":2: is not UTF-8"),
        (b"x = " + b"[" * 100_000, "nested too deeply"),
        (b"\r\n\r\nx = 1\r\n[[step]]\r\n", ":4: a step with nothing to do"),
    ],
    ids=["empty", "unfinished", "binary", "nested", "CR LF"],
)
def test_what_is_no_scenario_at_all_is_refused(tmp_path: Path, data: bytes, expected: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(data)
    with pytest.raises(ScenarioError) as caught:
        read_scenario(file)
    assert expected in str(caught.value)
