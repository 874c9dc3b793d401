"""PATCH on the command line."""

from pathlib import Path

import pytest

from elf.errors import KlpemuError
from klpemu.patch_argument import parse_patch, parse_patches
from patches.livepatch import Func


@pytest.fixture(autouse=True)
def code(tmp_path: Path, fixtures_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory in which several names stand for a readable object."""
    monkeypatch.chdir(tmp_path)
    for name in ("fix.o", "my-fix.ko", "a:b.o", "a=b.o"):
        (tmp_path / name).write_bytes((fixtures_dir / "fix_area.o").read_bytes())


def test_a_pair_is_a_function_of_vmlinux() -> None:
    patch = parse_patch("fix.o:area_of=fixed_area_of")
    assert (patch.name, patch.code, patch.replace) == ("fix", Path("fix.o"), False)
    assert patch.objects == {"vmlinux": [Func("area_of", "fixed_area_of")]}


def test_an_object_and_a_position_hold_for_their_pair_only() -> None:
    patch = parse_patch("fix.o:libarc4:arc4_crypt=x,same_name,2=y,vmlinux:fib=z,libarc4:b.cold=w")
    assert patch.objects == {
        "libarc4": [Func("arc4_crypt", "x"), Func("b.cold", "w")],
        "vmlinux": [Func("same_name", "y", 2), Func("fib", "z")],
    }


def test_replace_comes_last() -> None:
    assert parse_patch("fix.o:a=b,replace").replace
    assert parse_patch("fix.o:a=b,c,1=d,replace").replace
    # A function may be called so.
    assert parse_patch("fix.o:replace=b").objects == {"vmlinux": [Func("replace", "b")]}


def test_the_patch_is_named_as_a_module_would_be() -> None:
    assert parse_patch("./my-fix.ko:a=b").name == "my_fix"
    assert parse_patch("builtin:fix_area.o:a=b").name == "fix_area"


def test_a_file_may_have_colons_and_equals_signs_in_its_name() -> None:
    assert parse_patch("a:b.o:c=d").code == Path("a:b.o")
    assert parse_patch("a=b.o:c=d").code == Path("a=b.o")


def test_a_file_alone_declares_nothing() -> None:
    assert parse_patch("my-fix.ko").objects == {}


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("", "no colon"),
        ("fix.o:", "no pairs behind the colon"),
        ("fix.o:area_of", "'area_of' is no pair"),
        ("fix.o:a=b,", "'' is no pair"),
        ("fix.o:a=b,c", "'c' is no pair"),
        ("fix.o:a=", "'a=' is no pair"),
        ("fix.o:a=b=c", "'a=b=c' is no pair"),
        ("fix.o:a,x=b", "'a' is no pair"),
        ("fix.o:2a=b", "'2a=b' is no pair"),
        ("fix.o:replace,a=b", "replace must come last"),
        (":a=b", "no file before the colon"),
        ("fix.o:a=b,a=c", "'a' is replaced twice"),
        ("fix.o:a=b,a,1=c", "'a' is replaced twice"),
        ("fix.o,a=b", "no colon between"),
        ("gone.o:a=b", "gone.o: cannot be read"),
    ],
)
def test_what_is_wrong_is_said(argument: str, expected: str) -> None:
    with pytest.raises(KlpemuError) as caught:
        parse_patch(argument)
    assert expected in str(caught.value)


def test_two_patches_of_one_name_are_refused() -> None:
    assert list(parse_patches(["fix.o:a=b", "my-fix.ko:a=b"])) == ["fix", "my_fix"]
    with pytest.raises(KlpemuError, match="a second patch 'fix'"):
        parse_patches(["fix.o:a=b", "./fix.o:c=d"])
