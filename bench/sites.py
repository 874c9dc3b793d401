"""What `klpemu sites` does, for every module of the stock kernel, beside `readelf -rW` on the same files."""

import resource
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.measure import Result, interleave
from bench.stock import shuffled_modules
from elf.image import Image
from elf.mcount import fentry_sites, functions_at

__all__ = ["run"]

ROUNDS = 3
FILES_AT_ONCE = 500


def run() -> Iterator[Result]:
    """Seconds of both, and their ratio."""
    modules = shuffled_modules()
    found = _sites(modules)
    yield Result("sites", "files", len(modules), "files")
    yield Result("sites", "fentry sites, each with its function", found, "sites")
    if shutil.which("readelf") is None:
        return
    rounds = interleave({"sites": lambda: _seconds(modules), "readelf": lambda: _readelf(modules)}, ROUNDS)
    yield Result("sites", "all files", rounds.median("sites"), "s")
    yield Result("sites", "readelf -rW", rounds.median("readelf"), "s")
    yield Result("sites", "sites / readelf -rW", rounds.ratio("sites", "readelf"), "times")


def _sites(modules: Sequence[Path]) -> int:
    count = 0
    for path in modules:
        image = Image.open(str(path))
        sites = fentry_sites(image)
        count += len(sites)
        functions_at(image, sites)
    return count


def _seconds(modules: Sequence[Path]) -> float:
    start = time.process_time()
    _sites(modules)
    return time.process_time() - start


def _readelf(modules: Sequence[Path]) -> float:
    """CPU seconds of the child processes."""
    start = _children()
    for at in range(0, len(modules), FILES_AT_ONCE):
        command = ["readelf", "-rW", *map(str, modules[at : at + FILES_AT_ONCE])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return _children() - start


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
