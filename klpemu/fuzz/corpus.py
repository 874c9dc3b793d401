"""The sequences that are worth keeping, and what was found, as files in one folder.

Each is a scenario of its own, which `klpemu run` performs.  Beside an entry stand the numbers of what it has
reached that none before it had (klpemu/fuzz/coverage.py), so that nobody has to perform it to know.  A file
comes into being under another name and is then renamed: whenever the process is killed, every file is there
whole or not at all, and nothing that was reported is lost.  Findings are brought to the disk before.  Several
processes can use one folder.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from elf.errors import KlpemuError
from klpemu.scenario import Scenario, Step
from klpemu.scenario_file import read_scenario
from klpemu.scenario_text import scenario_text, step_lines

__all__ = ["Corpus", "write_whole"]

ENTRIES: Final = "entries"
FINDINGS: Final = "findings"
PROGRESS: Final = "progress"
REACHED: Final = ".reached"
UNDER_WAY: Final = ".now"
_UNFINISHED: Final = ".part"
_TEST: Final = '''"""{what}

Found by `klpemu fuzz`; the scenario beside this file shows it.
"""

from pathlib import Path

from klpemu.fuzz.replay import replay


def test_{name}() -> None:
    assert replay(Path(__file__).with_name("{scenario}")) == []
'''


class Corpus:
    """One folder of entries and findings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: set[str] = set()
        for each in (ENTRIES, FINDINGS, PROGRESS):
            try:
                (folder / each).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise KlpemuError(
                    f"cannot be made: {error.strerror}",
                    where=str(folder / each),
                    advice="give another folder",
                ) from error

    def add(self, scenario: Scenario, reached: Iterable[int]) -> Path:
        """Keep a sequence, and what it is kept for; the same one twice is one file."""
        name = f"{_digest(scenario)}.toml"
        self._read.add(name)
        path = self.folder / ENTRIES / name
        if not path.exists():
            write_whole(path.with_suffix(REACHED), "".join(f"{each:016x}\n" for each in reached))
            write_whole(path, scenario_text(scenario))
        return path

    def unread(self) -> Iterator[tuple[tuple[Step, ...], tuple[int, ...]]]:
        """The entries that this process has not seen, older ones and those of others: their steps, and what
        they are kept for, empty if nobody knows.

        A file that is no scenario (any more) is passed over: the modules that it names may be gone.
        """
        for path in sorted((self.folder / ENTRIES).glob("*.toml")):
            if path.name in self._read:
                continue
            self._read.add(path.name)
            try:
                yield tuple(read_scenario(path).steps), _numbers(path.with_suffix(REACHED))
            except KlpemuError:
                continue

    def report(self, signature: str, scenario: Scenario, what: str) -> Path | None:
        """Write down a finding: its scenario, and a test that fails because of it.

        None if there is one of this signature already.  The scenario comes last: with it the finding is
        reported.
        """
        path = self.finding(signature)
        if path.exists():
            return None
        test = _TEST.format(
            what=what.replace("\\", "/").replace('"""', "'''"), name=_word(signature), scenario=path.name
        )
        write_whole(path.with_name(f"test_{_word(signature)}.py"), test, to_disk=True)
        write_whole(path, scenario_text(scenario, comment=what.splitlines()), to_disk=True)
        return path

    def finding(self, signature: str) -> Path:
        """The scenario of a finding."""
        return self.folder / FINDINGS / f"{_word(signature)}.toml"

    def findings(self) -> list[Path]:
        """The scenarios of all that was found."""
        return sorted((self.folder / FINDINGS).glob("*.toml"))

    def note_under_way(self, job: str, scenario: Scenario | None) -> None:
        """Write down what a job is about to perform, for whoever finds it dead; not brought to the disk."""
        path = self.folder / PROGRESS / f"{job}{UNDER_WAY}"
        if scenario is None:
            path.unlink(missing_ok=True)
        else:
            write_whole(path, scenario_text(scenario))

    def under_way(self, job: str) -> Scenario | None:
        """What a job was performing when it died; None if nobody knows."""
        try:
            return read_scenario(self.folder / PROGRESS / f"{job}{UNDER_WAY}")
        except KlpemuError:
            return None

    def runs_of(self, job: str) -> int:
        """How many runs a job has behind it: the next start goes on there."""
        try:
            return int((self.folder / PROGRESS / job).read_text())
        except (OSError, ValueError):
            return 0

    def note_runs(self, job: str, runs: int) -> None:
        """Remember how many runs a job has behind it."""
        write_whole(self.folder / PROGRESS / job, f"{runs}\n")


def write_whole(path: Path, text: str, *, to_disk: bool = False) -> None:
    """Write a file so that it is there whole or not at all, whenever the process is killed.

    With `to_disk` also when the machine is; that takes milliseconds.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}{_UNFINISHED}")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if to_disk:
            os.fsync(file.fileno())
    os.replace(part, path)
    if not to_disk:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _numbers(path: Path) -> tuple[int, ...]:
    """Those in a file, none if somebody has put the scenario there by hand."""
    try:
        return tuple(int(line, 16) for line in path.read_text().split())
    except (OSError, ValueError):
        return ()


def _digest(scenario: Scenario) -> str:
    text = "\n".join(line for step in scenario.steps for line in step_lines(step))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _word(signature: str) -> str:
    return "".join(each if each.isalnum() else "_" for each in signature)
