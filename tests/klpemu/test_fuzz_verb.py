"""`klpemu fuzz`."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import klpemu

from klpemu.fixtures import fixture

ENABLE = """
[[patch]]
name = "fix_area"
code = "builtin:fix_area.o"
objects.vmlinux = [{ old = "area_of", new = "fixed_area_of" }]
[[step]]
enable = "fix_area"
"""


def test_nothing_is_found_where_nothing_is_wrong(tmp_path: Path) -> None:
    outcome = klpemu("fuzz", "--corpus", str(tmp_path), "--runs", "3", "--json")
    assert outcome.status == 0
    assert outcome.object["runs"] == 3
    assert outcome.object["findings"] == []
    assert outcome.object["covered"] > outcome.object["states"] > 0
    assert len(list((tmp_path / "entries").glob("*.toml"))) == outcome.object["entries"]


def test_what_is_found_is_written_and_klpemu_run_shows_it(tmp_path: Path) -> None:
    outcome = klpemu("fuzz", "--corpus", str(tmp_path), "--runs", "4", "--variant", "museum:missing-sync")
    assert outcome.status == 1
    (path,) = (tmp_path / "findings").glob("*.toml")
    assert f"klpemu run {path}" in outcome.out
    again = klpemu("run", str(path))
    assert again.status == 1
    assert "every_fetch_is_an_instruction" in again.out
    more = klpemu("fuzz", "--corpus", str(tmp_path), "--runs", "2", "--variant", "museum:missing-sync")
    assert more.status == 0
    assert "1 found before: every_fetch_is_an_instruction" in more.out


def test_files_that_were_named_from_here_are_found_from_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reproducer and the entries lie in other folders than the module and the patch."""
    monkeypatch.chdir(tmp_path)
    for name in ("lamp.ko", "klp_lamp.ko"):
        shutil.copy(fixture(name), tmp_path)
    ours = ("--module", "lamp.ko", "--patch", "klp_lamp.ko", "--seed", "3")
    outcome = klpemu("fuzz", "--corpus", "corpus", *ours, "--runs", "40", "--variant", "museum:plain-store")
    assert outcome.status == 1
    (path,) = Path("corpus/findings").glob("*.toml")
    again = klpemu("run", str(path))
    assert again.status == 1
    assert f" {path.stem}: " in again.out
    covered = klpemu("fuzz", "--corpus", "other", *ours, "--runs", "20", "--json").object["covered"]
    more = klpemu("fuzz", "--corpus", "other", *ours, "--runs", "1", "--json").object
    assert more["covered"] >= covered, "the entries were read"


def test_a_kernel_that_cannot_be_read_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no kernel")
    outcome = klpemu("fuzz", "--corpus", str(tmp_path / "c"), "--kernel", str(tmp_path / "text"))
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.startswith(f"klpemu: {tmp_path / 'text'}: ")


def test_a_corpus_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "progress" / "0-0.now").mkdir(parents=True)
    outcome = klpemu("fuzz", "--corpus", str(tmp_path), "--runs", "3")
    assert outcome.status == 2
    assert "0-0.now: Is a directory; make room, or give another folder" in outcome.err


def test_an_entry_of_ones_own_that_shows_a_bug_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "entries").mkdir()
    (tmp_path / "entries" / "mine.toml").write_text('[[step]]\ncall = "measure(3, 4)"\n' + ENABLE)
    outcome = klpemu("fuzz", "--corpus", str(tmp_path), "--runs", "1", "--variant", "museum:missing-sync")
    assert outcome.status == 1
    assert "found by run 1, shown in 1 step\n" in outcome.out


def test_a_corpus_of_another_world_is_no_harm(tmp_path: Path) -> None:
    assert klpemu("fuzz", "--corpus", str(tmp_path), "--runs", "20").status == 0
    outcome = klpemu("fuzz", "--corpus", str(tmp_path), "--module", str(fixture("lamp.ko")), "--runs", "20")
    assert outcome.status == 0, outcome.err


def test_two_campaigns_of_one_seed_do_not_disturb_each_other(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "klpemu", "fuzz", "--corpus", str(tmp_path), "--runs", "30"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for each in both:
        _, err = each.communicate(timeout=300)
        assert each.returncode == 0, err


def test_ctrl_c_while_a_process_begins_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "progress").mkdir()
    (tmp_path / "progress" / "0-0.now").write_text('[[step]]\ncall = "measure(3, 4)"\n')
    command = [sys.executable, "-m", "klpemu", "fuzz", "--corpus", str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "findings").is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # somewhere in the beginning of the process that searches
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not list((tmp_path / "findings").glob("*.toml"))


def test_a_world_and_a_module_do_not_go_together(tmp_path: Path) -> None:
    arguments = ("--world", "builtin:fuzz.toml", "--module", "builtin:lamp.ko")
    outcome = klpemu("fuzz", "--corpus", str(tmp_path), *arguments)
    assert outcome.status == 2
    assert "a world says itself which kernel, modules and patches there are" in outcome.err


def test_a_time_without_unit_is_bad_usage(tmp_path: Path) -> None:
    outcome = klpemu("fuzz", "--corpus", str(tmp_path), "--time", "10")
    assert outcome.status == 2
    assert "write it like '90 s', '10 min' or '2 h'" in outcome.err


def test_ctrl_c_ends_with_a_summary(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "klpemu", "fuzz", "--corpus", str(tmp_path), "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("entries/*.toml")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "nothing was found" in out
    assert "Traceback" not in err
