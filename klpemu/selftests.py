"""The kernel's own livepatch selftests, as the kernel's source has them, on an emulated kernel.

`python -m klpemu.selftests` (`make selftests`) runs the six scripts one after the other on one booted kernel,
as a machine would, with the test modules that `make real` has built.  What they print is shown as it comes,
then how many tests passed, how long it took, and how much of that the scripts have slept themselves.

The kernel is the stock image; `python -m klpemu.selftests IMAGE` takes another one, and `builtin:kernel.o` is
the built-in one.

Exit status 0: all of them passed; 1: not so; 2: they cannot be run here.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from elf.errors import KlpemuError
from klpemu import stock_kernel as stock
from klpemu.booted import booted
from klpemu.fixtures import locate
from klpemu.livepatch_modules import LivepatchModules
from klpemu.mount import why_no_fuse
from klpemu.mount_namespace import start, why_no_namespace

__all__ = ["SCRIPTS", "SelftestRun", "main", "run_selftests", "why_not"]

SCRIPTS: Final = (
    "test-livepatch.sh",
    "test-callbacks.sh",
    "test-shadow-vars.sh",
    "test-state.sh",
    "test-ftrace.sh",
    "test-sysfs.sh",
)
_STARTED: Final = re.compile(r"^start_test ", re.M)
_PASSED: Final = re.compile(r"^TEST: .* \.\.\. ok$")


@dataclass(frozen=True, slots=True)
class SelftestRun:
    """What became of one script: how many tests it has and how many passed, its exit status, seconds.

    `slept` are those of the seconds that the script has spent in `sleep`, `complaints` what has failed in the
    emulator meanwhile.
    """

    script: str
    tests: int
    passed: int
    status: int
    seconds: float
    slept: float
    complaints: Sequence[str]

    @property
    def holds(self) -> bool:
        """All its tests passed, and nothing has failed meanwhile that they do not look at."""
        return self.status == 0 and self.passed == self.tests and not self.complaints


def why_not() -> str:
    """Why they cannot be run here, and what to do about it; empty if they can."""
    reason = stock.why_not() or why_no_fuse() or why_no_namespace()
    kernel = stock.find()
    return reason or ("" if kernel is None else kernel.livepatch.why_not)


def run_selftests(
    modules: LivepatchModules,
    kernel: Path | None = None,
    *,
    scripts: Sequence[str] = SCRIPTS,
    say: Callable[[str], object] = lambda _: None,
) -> list[SelftestRun]:
    """Run scripts on one kernel, the built-in one by default; `say` gets each line that they print."""
    complaints: list[str] = []
    runs: list[SelftestRun] = []
    with (
        tempfile.TemporaryDirectory(prefix="klpemu-") as mountpoint,
        tempfile.TemporaryDirectory(prefix="klpemu-") as beside,
        booted(mountpoint, kernel, modules=[modules.directory / "lib"], complain=complaints.append) as mount,
    ):
        sleeps = _Sleeps(Path(beside))
        for script in scripts:
            run = _run(script, modules.selftests, mount.mountpoint, sleeps, say)
            runs.append(replace(run, complaints=tuple(complaints)))
            for line in complaints:
                say(line)
            complaints.clear()
    return runs


class _Sleeps:
    """A `sleep` that notes how long it was asked to sleep."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._noted = directory / "noted"
        command = directory / "sleep"
        command.write_text(f'#!/bin/sh\necho "$1" >>{self._noted}\nexec {shutil.which("sleep")} "$@"\n')
        command.chmod(0o755)

    def seconds(self) -> float:
        """The sum so far."""
        return sum(map(float, self._noted.read_text().split())) if self._noted.exists() else 0.0


def _run(
    script: str, directory: Path, mountpoint: Path, sleeps: _Sleeps, say: Callable[[str], object]
) -> SelftestRun:
    tests = len(_STARTED.findall((directory / script).read_text()))
    environment = os.environ | {"PATH": f"{sleeps.directory}:{os.environ.get('PATH', os.defpath)}"}
    began = time.monotonic()
    slept = sleeps.seconds()
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = start(["bash", f"./{script}"], mountpoint, environment=environment, cwd=directory, **output)
    passed = 0
    try:
        for line in process.stdout or ():
            passed += bool(_PASSED.match(line))
            say(line.rstrip("\n"))
        status = process.wait()
    finally:
        process.kill()
    took = time.monotonic() - began
    return SelftestRun(script, tests, passed, status, took, sleeps.seconds() - slept, ())


def main(arguments: Sequence[str] = ()) -> int:
    """Run them all, on the stock image or the one that is named; returns the exit status."""
    if reason := why_not():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    kernel = stock.find()
    assert kernel is not None

    def say(line: str) -> None:
        print(line, flush=True)

    began = time.monotonic()
    try:
        image = locate(arguments[0]) if arguments else kernel.vmlinuz
        runs = run_selftests(kernel.livepatch, image, say=say)
    except KlpemuError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.monotonic() - began
    for run in runs:
        passed = f"{run.passed:2} of {run.tests:2}"
        print(f"{run.script:<20} {passed}  {run.seconds:6.1f} s, {run.slept:.1f} s asleep")
    passed = f"{sum(run.passed for run in runs)} of {sum(run.tests for run in runs)} tests passed"
    print(f"{passed} in {seconds:.1f} s, of which the scripts slept {sum(run.slept for run in runs):.1f} s")
    return 0 if all(run.holds for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
