"""Performing scenarios: an expectation that is not met is a finding, and each step is followed by checks."""

from pathlib import Path

import pytest
from command_line import FIX_AREA, ROOT, klpemu

from elf.errors import KlpemuError
from klpemu.fixtures import fixture
from klpemu.kernel import Kernel
from klpemu.scenario import Action, Scenario, Step
from klpemu.scenario_file import read_scenario
from klpemu.step_runner import StepRunner
from patches.livepatch import Func, Patch

PATCH = '[[patch]]\nname = "fix_area"\ncode = "builtin:fix_area.o"\n' \
    'objects.vmlinux = [{ old = "area_of", new = "fixed_area_of" }]\n'  # fmt: skip


def findings(tmp_path: Path, steps: str) -> list[str]:
    """The findings of a scenario with `fix_area` declared."""
    file = tmp_path / "scenario.toml"
    file.write_text(PATCH + steps)
    outcome = klpemu("run", "--json", str(file))
    object_ = outcome.object
    assert outcome.status == (1 if object_["findings"] else 0)
    assert object_["holds"] is not bool(object_["findings"])
    return [f"{each['step']}: {each['what']}" for each in object_["findings"]]


WORLDS = {"fuzz.toml", "fuzz-stock.toml"}  # of `klpemu fuzz`: their steps are examples, not a sequence
SCENARIOS = sorted({path.name for path in (ROOT / "fixtures" / "scenarios").glob("*.toml")} - WORLDS)


def test_there_are_scenarios_of_what_tasks_can_do() -> None:
    words = ("consistency", "replace-in-transition", "reverse", "force", "stuck", "signal", "fork-exit")
    assert {f"{word}.toml" for word in (*words, "deadlock", "demo", "refused")} <= set(SCENARIOS)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_built_in_scenarios_hold(name: str) -> None:
    outcome = klpemu("run", f"builtin:{name}")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.splitlines()[-1].endswith("checks hold")


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ('call = "area_of(3, 4)"\nreturns = 12', "found 7 (0x7), expected 12"),
        ('trace = "area_of(3, 4)"\nreturns = 12', "found 7 (0x7), expected 12"),
        ('trace = "area_of(3, 4)"\nthrough = []', "found ['area_of'], expected []"),
        ('trace = "area_of(3, 4)"\nexecuted = 4', "found 3, expected 4"),
        ('enable = "fix_area"\nerror = "EBUSY"', "found nothing failed, expected EBUSY"),
        ('disable = "fix_area"\nerror = "EBUSY"', "(-ENOENT); enable it first, expected EBUSY"),
        ('disable = "fix_area"\nerror = "no such thing"', "enable it first, expected no such thing"),
        ('call = "area_of(3, 4)"\nlog = ["x"]', "found [], expected ['x']"),
        ('enable = "fix_area"\nlog = []', "found [\"livepatch: enabling patch 'fix_area'\""),
        ('call = "jump_nowhere()"', "jump to unmapped address 0xffffffffdeadb000"),
    ],
)
def test_an_expectation_that_is_not_met_is_a_finding(tmp_path: Path, step: str, expected: str) -> None:
    found = findings(tmp_path, f"[[step]]\n{step}\n")
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    "step",
    [
        'call = "area_of(3, 4)"\nreturns = 7\nlog = []',
        'call = "area_of(3, -4)"\nreturns = -1',
        'trace = "area_of(3, -4)"\nreturns = 0xffffffffffffffff\nthrough = ["area_of"]\nexecuted = 3',
        'disable = "fix_area"\nerror = "ENOENT"',
        'disable = "fix_area"\nerror = "is not enabled"',
        'call = "jump_nowhere()"\nerror = "jump to unmapped address"',
    ],
)
def test_an_expectation_that_is_met_is_a_check_that_holds(tmp_path: Path, step: str) -> None:
    assert findings(tmp_path, f"[[step]]\n{step}\n") == []


def test_the_guest_s_failure_ends_the_scenario_and_a_wrong_value_does_not(tmp_path: Path) -> None:
    file = tmp_path / "scenario.toml"
    call = '[[step]]\ncall = "area_of(3, 4)"\nreturns = 8\n'
    file.write_text(f'{call}{call}[[step]]\ncall = "jump_nowhere()"\n{call}{call}')
    outcome = klpemu("run", "--json", str(file))
    (scenario,) = outcome.object["scenarios"]
    assert [each["step"] for each in scenario["steps"]][1:] == ["call area_of(3, 4)"] * 2 + [
        "call jump_nowhere()"
    ]
    assert (scenario["left_out"], len(outcome.object["findings"])) == (2, 3)
    assert scenario["steps"][-1]["fault"]["registers"]["rip"] == "0xffffffffdeadb000"
    assert "2 steps left out" in klpemu("run", str(file)).out


def test_an_unexpected_error_names_file_line_and_step(tmp_path: Path) -> None:
    file = tmp_path / "scenario.toml"
    file.write_text(PATCH + '[[step]]\nenable = "fix_area"\n[[step]]\nenable = "fix_area"\n')
    outcome = klpemu("run", str(file))
    assert outcome.status == 2
    assert outcome.err.startswith(f"klpemu: {file}:7: enable fix_area: ")
    assert outcome.err.count("\n") == 1
    assert klpemu("run", "--json", str(file)).out == ""


def test_all_scenarios_are_read_before_the_first_is_performed(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("x = 1")
    outcome = klpemu("run", "builtin:demo.toml", str(tmp_path / "bad.toml"))
    assert (outcome.status, outcome.out) == (2, "")


REFUSED = [
    ("fix_area.o", Func("nope", "fixed_area_of")),
    ("fix_area.o", Func("area_of", "nope")),
    ("fix_all.o", Func("notrace_add", "fixed_sum_many")),
    ("fix_same_name.o", Func("same_name", "fixed_same_name_one")),
    ("fix_same_name.o", Func("same_name", "fixed_same_name_one", 3)),
    ("bad_site.o", Func("area_of", "bad_site")),
    ("no_site.o", Func("read_twin", "nope")),
]


@pytest.mark.parametrize(("code", "func"), REFUSED, ids=lambda value: getattr(value, "old", value))
def test_nothing_of_a_refused_patch_stays(code: str, func: Func) -> None:
    """The kernel is as it was, to the last byte, list and record; another patch is still on, and works."""
    good = Patch("good", {"vmlinux": [Func("area_of", "fixed_area_of")]}, fixture("fix_area.o"))
    bad = Patch("bad", {"vmlinux": [Func("fib", func.new), func]}, fixture(code))
    runner = StepRunner(Scenario(patches={"good": good, "bad": bad}))
    kernel = runner.kernel
    assert runner.perform(Step(Action.ENABLE, "good")).report.holds
    modules, listed = set(kernel.machine.modules.objects), kernel.machine.ftrace.enabled_functions()
    text = kernel.machine.space.read(kernel.site_of("fib")[0], 5)
    with pytest.raises(KlpemuError):
        runner.perform(Step(Action.ENABLE, "bad"))
    assert kernel.verify().findings == ()
    assert set(kernel.machine.modules.objects) == modules
    assert kernel.machine.ftrace.enabled_functions() == listed
    assert kernel.machine.space.read(kernel.site_of("fib")[0], 5) == text
    assert kernel.call("area_of", 3, 4) == 12
    assert runner.perform(Step(Action.DISABLE, "good")).report.holds


@pytest.fixture
def damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw write to a site, before the checks of every step."""
    verify = Kernel.verify

    def damaged(kernel: Kernel, *arguments: str, **options: bool) -> object:
        kernel.machine.space.write(kernel.site_of("fib")[0], b"\xcc")
        return verify(kernel, *arguments, **options)

    monkeypatch.setattr(Kernel, "verify", damaged)


@pytest.mark.usefixtures("damage")
@pytest.mark.parametrize(
    "arguments",
    [["demo"], ["run", "builtin:demo.toml"], ["verify", FIX_AREA], ["trace", "area_of", "3", "4"]],
    ids=lambda value: value[0],
)
def test_what_the_checks_find_makes_the_status_1_in_every_verb(arguments: list[str]) -> None:
    outcome = klpemu(*arguments)
    assert (outcome.status, outcome.err) == (1, "")
    assert "text_matches_records: text differs" in outcome.out
    assert "all " not in outcome.out.splitlines()[-1]
    assert klpemu(*arguments, "--json").object["holds"] is False


@pytest.mark.usefixtures("damage")
def test_a_finding_says_what_is_wrong_byte_for_byte() -> None:
    outcome = klpemu("verify", FIX_AREA)
    lines = outcome.out.splitlines()
    assert any(
        line.startswith("  klpemu: boot: text_matches_records: ") and "fib+0x0" in line for line in lines
    )
    assert "    expected 0f 1f 44 00 00  nop dword ptr [rax + rax]" in lines
    assert any(line.startswith("    found    cc 1f 44 00 00  int3") for line in lines)
    assert "holds" not in lines[-1]
    assert "checks made" in lines[-1]


@pytest.mark.parametrize("action", ["call", "trace"])
def test_damage_done_by_a_step_is_a_finding_of_that_step(
    action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(Kernel, action)

    def damaging(kernel: Kernel, function: str, *arguments: int, **options: bool) -> object:
        result = original(kernel, function, *arguments, **options)
        kernel.machine.space.write(kernel.site_of("fib")[0], b"\xcc")
        return result

    monkeypatch.setattr(Kernel, action, damaging)
    found = findings(tmp_path, f'[[step]]\nenable = "fix_area"\n[[step]]\n{action} = "area_of(3, 4)"\n')
    assert found == [f"{action} area_of(3, 4): text differs"]


def test_the_value_of_a_call_is_expected_once_all_patches_are_enabled() -> None:
    patches = ["builtin:fix_area.o:area_of=fixed_area_of", "builtin:fix_area2.o:area_of=area_in_cm"]
    assert klpemu("verify", *patches, "--call", "area_of(3, 4)=120000").status == 0
    outcome = klpemu("verify", *patches, "--call", "area_of(3, 4)=12", "--json")
    (found,) = outcome.object["findings"]
    assert (outcome.status, found["what"]) == (1, "found 120000 (0x1d4c0), expected 12")
    returned = [each["returned"] for each in outcome.object["steps"] if each["action"] == "call"]
    assert returned == [7, 12, 120000, 12, 7]


def test_functions_of_an_object_that_is_not_loaded_are_announced() -> None:
    outcome = klpemu("verify", "builtin:fix_area.o:area_of=fixed_area_of,nomod:f=fixed_perimeter_of")
    assert outcome.status == 0
    assert "object nomod is not loaded: nothing of it is patched yet" in outcome.out


def test_a_livepatch_module_is_loaded_by_its_own_init_function() -> None:
    outcome = klpemu("verify", "builtin:klp_area.ko", "--call", "area_of(3, 4)")
    assert (outcome.status, outcome.err) == (0, "")
    assert "livepatch: 'klp_area': patching complete" in outcome.out
    assert [line for line in outcome.out.splitlines() if line.startswith("disable")] == ["disable klp_area"]


def test_a_replacing_patch_leaves_only_itself_to_be_removed() -> None:
    patches = [
        "builtin:fix_area.o:area_of=fixed_area_of",
        "builtin:fix_shapes.o:perimeter_of=checked_perimeter_of",
    ]
    plain = klpemu("verify", *patches).out
    replaced = klpemu("verify", patches[0], f"{patches[1]},replace").out
    disables = [
        [line for line in out.splitlines() if line.startswith("disable")] for out in (plain, replaced)
    ]
    assert disables == [["disable fix_shapes", "disable fix_area"], ["disable fix_shapes"]]


def test_the_demonstration_is_a_scenario_that_run_performs_too() -> None:
    steps = read_scenario(fixture("demo.toml")).steps
    assert [step.stage for step in steps if step.stage] != []
    run, demo = klpemu("run", "--json", "builtin:demo.toml").object, klpemu("demo", "--json").object
    assert run["scenarios"][0]["steps"] == demo["steps"]
