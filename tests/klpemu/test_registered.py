"""Scenarios of patches that are registered, and the variants that scenarios name."""

from pathlib import Path

import pytest
from command_line import klpemu

from klpemu.scenario import Action
from klpemu.scenario_file import ScenarioError, read_scenario

PATCH = '[[patch]]\nname = "fix_area"\ncode = "builtin:fix_area.o"\n' \
    'objects.vmlinux = [{ old = "area_of", new = "fixed_area_of" }]\n'  # fmt: skip
REGISTERED = 'variant = "patches_registered"\n'
STEPS = '[[step]]\nregister = "fix_area"\n[[step]]\nenable = "fix_area"\n[[step]]\ndisable = "fix_area"\n' \
    '[[step]]\nunregister = "fix_area"\n'  # fmt: skip


def scenario(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "scenario.toml"
    path.write_text(text)
    return path


def test_a_variant_is_read_and_its_steps_are_known(tmp_path: Path) -> None:
    read = read_scenario(scenario(tmp_path, REGISTERED + PATCH + STEPS))
    assert read.variants == ("patches_registered",)
    assert [step.action for step in read.steps] == [
        Action.REGISTER,
        Action.ENABLE,
        Action.DISABLE,
        Action.UNREGISTER,
    ]


def test_the_header_says_which_kernel_it_is(tmp_path: Path) -> None:
    outcome = klpemu("run", str(scenario(tmp_path, 'title = "old"\n' + REGISTERED + PATCH + STEPS)))
    assert outcome.status == 0
    assert outcome.out.splitlines()[:2] == ["old", "a variant of the kernel: patches_registered"]


def test_no_variant_outlives_its_scenario(tmp_path: Path) -> None:
    old = scenario(tmp_path, REGISTERED + PATCH + STEPS)
    outcome = klpemu("run", str(old), "builtin:patch-stack.toml")
    assert (outcome.status, outcome.err) == (0, "")


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        (
            'variant = "patches_regstered"\n',
            1,
            "no variant is called 'patches_regstered'; did you mean patches_reg",
        ),
        ('variant = "zzz"\n', 1, "no variant is called 'zzz'; there are funcs_immediate, nops_kept, "),
        ('variant = ["nops_kept", "zzz"]\n', 1, "no variant is called 'zzz'"),
        ('variant = "nops_kept(x)"\n', 1, "write nops_kept"),
        ('variant = "patches_immediate"\n', 1, "write patches_immediate(NAME, ...)"),
        ("variant = 3\n", 1, "expected"),
        ('[[step]]\nregister = "x"\n', 2, "this kernel has no step 'register'"),
        ('[[step]]\nunregister = "x"\n', 2, 'write variant = "patches_registered"'),
        (REGISTERED + '[[step]]\nregister = "x"\n', 3, "no patch 'x' is declared"),
    ],
)
def test_mistakes_name_the_line_and_what_is_known(
    tmp_path: Path, text: str, line: int, expected: str
) -> None:
    path = scenario(tmp_path, text)
    with pytest.raises(ScenarioError) as caught:
        read_scenario(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert expected in str(caught.value)


@pytest.mark.parametrize("step", ["enable", "unregister"])
def test_what_nobody_registered_is_refused(tmp_path: Path, step: str) -> None:
    errno = {"enable": "EINVAL", "unregister": "ENOENT"}[step]
    text = f'{REGISTERED}{PATCH}[[step]]\n{step} = "fix_area"\nerror = "{errno}"\nlog = []\n'
    outcome = klpemu("run", str(scenario(tmp_path, text)))
    assert (outcome.status, outcome.err) == (0, "")
