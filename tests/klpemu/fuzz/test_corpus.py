"""The corpus: whole files or none, whenever a process is killed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from elf.errors import KlpemuError
from klpemu.fuzz.corpus import Corpus, write_whole
from klpemu.fuzz.world import world_of
from klpemu.scenario import Action, Scenario, Step
from klpemu.scenario_file import read_scenario

WORLD = world_of(None, None, None, "qemu64", (), (), ())


def scenario(*names: str) -> Scenario:
    return replace(WORLD, steps=tuple(Step(Action.ENABLE, name) for name in names))


def test_an_entry_is_read_by_others_and_not_again_by_who_wrote_it(tmp_path: Path) -> None:
    mine, other = Corpus(tmp_path), Corpus(tmp_path)
    mine.add(scenario("fix_area", "fix_area2"), [7, 1 << 63])
    assert list(mine.unread()) == []
    ((steps, reached),) = other.unread()
    assert [each.name for each in steps] == ["enable fix_area", "enable fix_area2"]
    assert reached == (7, 1 << 63)
    assert list(other.unread()) == []


def test_the_same_sequence_is_one_entry(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    assert corpus.add(scenario("fix_area"), [1]) == corpus.add(scenario("fix_area"), [2])
    assert corpus.add(scenario("fix_area2"), [1]) != corpus.add(scenario("fix_area"), [1])


def test_what_an_entry_of_ones_own_reaches_nobody_knows(tmp_path: Path) -> None:
    Corpus(tmp_path).add(scenario("fix_area"), [1]).with_suffix(".reached").unlink()
    ((_, reached),) = Corpus(tmp_path).unread()
    assert reached == ()


def test_a_file_that_is_no_scenario_is_passed_over(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    (tmp_path / "entries" / "0.toml").write_text("half a fi")
    Corpus(tmp_path).add(scenario("fix_area"), [1])
    assert len(list(corpus.unread())) == 1


def test_a_finding_is_reported_once(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    path = corpus.report("newest_wins", scenario("fix_area"), "klpemu: newest_wins: not so")
    assert path is not None
    assert corpus.report("newest_wins", scenario("fix_area2"), "again") is None
    assert corpus.findings() == [path]
    assert read_scenario(path).steps[0].target == "fix_area"
    assert path.read_text().startswith("# klpemu: newest_wins: not so\n")
    test = path.with_name("test_newest_wins.py").read_text()
    compile(test, "test", "exec")
    assert '"newest_wins.toml"' in test


def test_a_folder_that_cannot_be_made_is_said_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KlpemuError, match="file/entries"):
        Corpus(tmp_path / "file")


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")

    def fails(descriptor: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="full"):
        write_whole(path, "new and longer", to_disk=True)
    assert path.read_text() == "old"


def kill_and_look(folder: Path, times: int, variant: str) -> None:
    """Kill a campaign at different instants: what was there stays, whole, and the next start goes on."""
    known: dict[Path, bytes] = {}
    runs = 0
    command = [
        sys.executable,
        "-m",
        "klpemu",
        "fuzz",
        "--corpus",
        str(folder),
        "--variant",
        variant,
        "--json",
    ]
    for number in range(times):
        process = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = len(known)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if len(list(folder.glob("entries/*.toml"))) > before:  # it works: now at any instant
                time.sleep(0.013 * (number % 7))
                break
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        now = {path: path.read_bytes() for path in folder.rglob("*.toml") if not path.name.startswith(".")}
        assert {path: now.get(path) for path in known} == known
        for path in now.keys() - known.keys():
            assert read_scenario(path).steps
        known = now
        assert Corpus(folder).runs_of("0-0") >= runs
        runs = Corpus(folder).runs_of("0-0")
    assert known


def test_killed_five_times_nothing_is_lost(tmp_path: Path) -> None:
    kill_and_look(tmp_path, 5, "museum:missing-sync")


@pytest.mark.slow
def test_killed_fifty_times_nothing_is_lost(tmp_path: Path) -> None:
    kill_and_look(tmp_path, 50, "museum:missing-sync")
