"""From a stock kernel's vmlinuz to a machine that is ready, its sites converted and checked; its selftests.

A start is a process of its own: the interpreter, the imports, the image, its symbols, its text made for the
CPU.  Cold is with an empty cache.  Beside it, on the same image, `vmlinux-to-elf` alone, where that is
installed, and `readelf -s` on what it makes.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.measure import Result, interleave
from klpemu import stock_kernel
from klpemu.selftests import run_selftests, why_not

__all__ = ["run"]

ROUNDS = 3
COLD_GOAL, WARM_GOAL = 10.0, 2.0  # seconds
START = "import sys; from klpemu import Kernel; Kernel.load(sys.argv[1])"


def run() -> Iterator[Result]:
    """Seconds of each, and their ratios."""
    kernel = stock_kernel.find()
    assert kernel is not None
    with tempfile.TemporaryDirectory() as work:
        cache = Path(work) / "cache"
        elf = Path(work) / "vmlinux"

        def cold() -> float:
            shutil.rmtree(cache, ignore_errors=True)
            return _started(kernel.vmlinuz, cache)

        sides = {"cold": cold, "warm": lambda: _started(kernel.vmlinuz, cache)}
        if (tool := shutil.which("vmlinux-to-elf")) and (readelf := shutil.which("readelf")):
            sides["vmlinux-to-elf"] = lambda: _cpu_seconds([tool, str(kernel.vmlinuz), str(elf)])
            sides["readelf -s"] = lambda: _cpu_seconds([readelf, "-sW", str(elf)])
        rounds = interleave(sides, ROUNDS)
        yield Result("image", "cold start", rounds.median("cold"), "s", goal=COLD_GOAL)
        yield Result("image", "warm start", rounds.median("warm"), "s", goal=WARM_GOAL)
        for other in [each for each in sides if each not in ("cold", "warm")]:
            yield Result("image", other, rounds.median(other), "s")
            for start in ("cold", "warm"):
                yield Result("image", f"{start} start / {other}", rounds.ratio(start, other), "times")
    if not why_not():
        runs = run_selftests(kernel.livepatch, kernel.vmlinuz)
        yield Result("image", "selftests passed", sum(each.passed for each in runs), "tests")
        yield Result("image", "six selftest scripts", sum(each.seconds for each in runs), "s")
        yield Result("image", "of which they slept", sum(each.slept for each in runs), "s")


def _started(image: Path, cache: Path) -> float:
    environment = os.environ | {"KLPEMU_CACHE": str(cache)}
    return _cpu_seconds([sys.executable, "-c", START, str(image)], environment)


def _cpu_seconds(command: list[str], environment: dict[str, str] | None = None) -> float:
    """CPU seconds of a process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
