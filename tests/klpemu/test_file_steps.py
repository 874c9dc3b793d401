"""Steps that read, list and write files of the kernel, and look into its log."""

from pathlib import Path

import pytest
from command_line import klpemu

from elf.errors import KlpemuError
from klpemu.scenario_file import read_scenario

PATCH = """[[patch]]
name = "fix_area"
code = "builtin:fix_area.o"
objects.vmlinux = [{ old = "area_of", new = "fixed_area_of" }]
[[step]]
enable = "fix_area"
"""
ENABLED = "/sys/kernel/livepatch/fix_area/enabled"


def run(tmp_path: Path, step: str) -> dict[str, object]:
    """The last of a scenario's steps, as JSON: the one given, when fix_area is enabled."""
    file = tmp_path / "scenario.toml"
    file.write_text(f"{PATCH}[[step]]\n{step}\n")
    last: dict[str, object] = klpemu("run", "--json", str(file)).object["scenarios"][0]["steps"][-1]
    return last


def refused(tmp_path: Path, step: str) -> str:
    file = tmp_path / "scenario.toml"
    file.write_text(f"{PATCH}[[step]]\n{step}\n")
    with pytest.raises(KlpemuError) as raised:
        read_scenario(file)
    return str(raised.value)


@pytest.mark.parametrize("expected", ['"1"', '"1\\n"', '["1"]'])
def test_a_file_is_read_and_compared_line_by_line(tmp_path: Path, expected: str) -> None:
    step = run(tmp_path, f'read = "{ENABLED}"\ncontents = {expected}')
    assert (step["step"], step["contents"], step["findings"]) == (f"read {ENABLED}", ["1"], [])
    assert step["checks"]["contents_are_the_expected_ones"] == 1  # type: ignore[index]  # of an object


def test_contents_that_are_not_the_expected_ones_are_a_finding(tmp_path: Path) -> None:
    step = run(tmp_path, f'read = "{ENABLED}"\ncontents = "0"')
    (finding,) = step["findings"]  # type: ignore[misc]  # of an object
    assert finding["what"] == "found ['1'], expected ['0']"


def test_a_directory_is_listed(tmp_path: Path) -> None:
    step = run(tmp_path, 'list = "/sys/kernel/livepatch"\ncontents = ["fix_area"]')
    assert (step["contents"], step["holds"]) == (["fix_area"], True)


def test_the_log_is_looked_into(tmp_path: Path) -> None:
    line = "livepatch: 'fix_area': patching complete"
    step = run(tmp_path, f'dmesg = "complete"\ncontents = "{line}"\nlog = []')
    assert (step["contents"], step["holds"]) == ([line], True)


def test_a_write_writes_its_value(tmp_path: Path) -> None:
    step = run(tmp_path, f'write = "{ENABLED}"\nvalue = "0"')
    assert step["step"] == f"write {ENABLED} = 0"
    assert step["log"][-1] == "livepatch: 'fix_area': unpatching complete"  # type: ignore[index]  # of an object
    assert step["contents"] is None


def test_an_expected_error_of_a_write(tmp_path: Path) -> None:
    step = run(tmp_path, f'write = "{ENABLED}"\nvalue = "1"\nerror = "EINVAL"')
    assert step["holds"] is True
    assert "in the requested state already" in str(step["error"])


def test_an_unexpected_error_names_the_step_and_its_line(tmp_path: Path) -> None:
    file = tmp_path / "scenario.toml"
    file.write_text(f'{PATCH}[[step]]\nread = "/sys/no/such"\n')
    outcome = klpemu("run", str(file))
    assert outcome.status == 2
    assert f"{file}:7: read /sys/no/such: /sys/no/such: no such file or directory (-ENOENT)" in outcome.err


def test_for_people_the_contents_are_shown(tmp_path: Path) -> None:
    file = tmp_path / "scenario.toml"
    file.write_text(f'{PATCH}[[step]]\nread = "{ENABLED}"\n')
    assert f"read {ENABLED}\n  1\n" in klpemu("run", str(file)).out


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (f'write = "{ENABLED}"', "'value' is missing"),
        ('read = "enabled"', "expected a path that begins with a slash"),
        (f'read = "{ENABLED}"\nvalue = "1"', "unknown key 'value'"),
        (f'read = "{ENABLED}"\ncontents = 1', "'contents' is an integer"),
        (f'read = "{ENABLED}"\ncontents = "1"\nerror = "EIO"', "cannot be expected together with 'error'"),
        ('enable = "fix_area"\ncontents = "1"', "unknown key 'contents'"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, step: str, problem: str) -> None:
    assert problem in refused(tmp_path, step)
