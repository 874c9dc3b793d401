"""`klpemu fuzz`."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from command_line import klpemu


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
