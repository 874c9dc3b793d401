"""Debian's packages, downloaded and unpacked with apt's and dpkg's own tools, nothing installed.

Whatever is made of them is made in a directory of its own below the cache, and renamed into place when it is
whole; `alone` lets one run at a time do so, and removes what a killed one has left.
"""

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from elf.errors import KlpemuError

__all__ = ["Say", "alone", "debian_version_key", "download", "run", "unfinished", "unpack", "update_lists"]

Say = Callable[[str], object]

_PartKey = list[tuple[list[int], int]]
_UNFINISHED: Final = ".fetch-"


@contextmanager
def alone(cache: Path, say: Say) -> Iterator[None]:
    """Hold the lock of `cache`, and remove what a killed run has left there."""
    with open(cache / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another run that is fetching the kernel")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in cache.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


@contextmanager
def unfinished(cache: Path) -> Iterator[Path]:
    """A directory below `cache` for work that is not done; what is still in it at the end is removed."""
    with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=cache) as work:
        yield Path(work)


def update_lists(say: Say) -> bool:
    """Update apt's lists if that is allowed; says whether it was."""
    if os.geteuid() != 0:
        return False
    say("updating apt's lists")
    run("apt-get", "update")
    return True


def download(name: str, version: str, directory: Path, say: Say) -> Path:
    """Download the package into the empty `directory`, which is made; returns the `.deb`."""
    say(f"downloading {name} {version}")
    directory.mkdir(parents=True)
    run("apt-get", "download", "-o", "Acquire::Retries=3", f"{name}={version}", directory=directory)
    debs = list(directory.glob("*.deb"))
    if len(debs) != 1:
        raise KlpemuError(f"apt-get download left {len(debs)} packages instead of one", where=name)
    return debs[0]


def unpack(deb: Path, directory: Path, say: Say) -> None:
    """Put the files of a package below `directory`, as if that were the root."""
    say(f"unpacking {deb.name}")
    run("dpkg-deb", "-x", str(deb), str(directory))


def run(*command: str, directory: Path | None = None) -> str:
    """The output of a command; `KlpemuError` with its last word if it is not there or fails."""
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        raise KlpemuError(
            f"{command[0]} is not installed",
            advice="fetch the kernel on a Debian system and set KLPEMU_CACHE to the cache made there",
        ) from None
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if "error" in line or line.startswith("E:")]
        raise KlpemuError(
            f"{' '.join(command[:2])} failed: {words[0] if words else f'exit status {done.returncode}'}"
        )
    return done.stdout


def debian_version_key(version: str) -> tuple[int, _PartKey, _PartKey]:
    """A sort key that orders package versions as dpkg does (deb-version(7))."""
    epoch, _, rest = version.rpartition(":")
    upstream, revision = rest.rsplit("-", 1) if "-" in rest else (rest, "0")
    return int(epoch or 0), _part_key(upstream), _part_key(revision)


def _part_key(part: str) -> _PartKey:
    return [(_text_key(text), int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", part)]


def _text_key(text: str) -> list[int]:
    # `~` comes before the end of a text, which comes before letters, which come before all else.
    return [-1 if char == "~" else ord(char) + 256 * (not char.isalpha()) for char in text] + [0]
