"""`klpemu sites`."""

import shutil
from pathlib import Path

import pytest
from command_line import klpemu

from elf.image import Image
from elf.mcount import fentry_sites


def rows(*arguments: str) -> list[list[str]]:
    """The columns of the lines about sites."""
    lines = klpemu("sites", *arguments).out.splitlines()
    return [line.split(maxsplit=7) for line in lines if line.startswith("  ") and not line.startswith("   ")]


def test_a_site_has_place_function_bytes_and_kind() -> None:
    assert rows("builtin:late_site.o") == [
        [".text+0x6", "late_site+0x6/0x13", "e8", "00", "00", "00", "00", "call __fentry__"]
    ]
    assert [row[-1] for row in rows("builtin:nop_mcount.o")] == ["nop5"] * 4


def test_padding_is_no_site_and_no_finding() -> None:
    outcome = klpemu("sites", "builtin:patchable.o")
    assert (outcome.status, outcome.err) == (0, "")
    assert "no fentry site, 4 of padding" in outcome.out
    assert [row[-1] for row in rows("builtin:patchable.o")] == ["padding, no site on x86"] * 4


def test_a_refused_site_is_a_finding_with_its_reason() -> None:
    outcome = klpemu("sites", "builtin:single_nops.o")
    assert outcome.status == 1
    assert "1 site (1 refused)" in outcome.out
    assert "a task can be preempted between them" in outcome.out


def test_a_file_without_sites_is_said_to_have_none() -> None:
    outcome = klpemu("sites", "builtin:no_site.o")
    assert (outcome.status, outcome.out) == (0, "builtin:no_site.o: no fentry site\n")


def test_linked_files_have_virtual_addresses(fixtures_dir: Path) -> None:
    wanted = [f"{site.address:#x}" for site in fentry_sites(Image.open(fixtures_dir / "linked.elf"))]
    assert wanted
    assert [row[0] for row in rows("builtin:linked.elf")] == wanted


def test_a_directory_stands_for_its_modules_and_the_sum_is_last(tmp_path: Path, fixtures_dir: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("one.ko", "deep/two.ko", "deep/ignored.o"):
        shutil.copy(fixtures_dir / "kernel.o", tmp_path / name)
    lines = klpemu("sites", "--summary", str(tmp_path)).out.splitlines()
    sites = len(fentry_sites(Image.open(fixtures_dir / "kernel.o")))
    said = f"{sites} sites ({sites} call __fentry__)"
    assert lines == [
        f"{tmp_path}/deep/two.ko: {said}",
        f"{tmp_path}/one.ko: {said}",
        "",
        f"2 files: {2 * sites} sites ({2 * sites} call __fentry__)",
    ]


def test_long_work_shows_its_progress_apart_from_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klpemu.output.QUIET_SECONDS", -1.0)
    outcome = klpemu("sites", "--summary", "builtin:late_site.o", "builtin:no_site.o")
    assert outcome.err.splitlines() == ["reading: 0 of 2", "reading: 1 of 2"]
    assert "reading" not in outcome.out
    monkeypatch.undo()
    assert klpemu("sites", "--summary", "builtin:late_site.o", "builtin:no_site.o").err == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["sites", "builtin:fix_area.o"],
        ["sites", "builtin:fix_area.o", "--json"],
        ["verify", "builtin:fix_area.o:area_of=nope"],
        ["run", "builtin:refused.toml"],
        ["run", "builtin:refused.toml", "--json"],
    ],
    ids=" ".join,
)
def test_built_in_files_are_shown_by_their_name_and_not_by_where_they_are(
    arguments: list[str], fixtures_dir: Path
) -> None:
    outcome = klpemu(*arguments)
    assert "builtin:" in outcome.out + outcome.err
    assert str(fixtures_dir.parent) not in outcome.out + outcome.err
