"""Real ELF files to test on: those the fixtures are built to, and small ones compiled in the test itself."""

import shutil
import subprocess
from pathlib import Path

import pytest

BUILT = sorted((Path(__file__).parents[1] / "fixtures" / "build").glob("*.o"))
BUILT_IDS = [path.name for path in BUILT]

KERNEL_FLAGS = (
    *("-O1", "-g", "-pg", "-mfentry", "-mrecord-mcount", "-fno-pic", "-mcmodel=kernel", "-mno-red-zone"),
    *("-fcf-protection=none", "-fno-asynchronous-unwind-tables"),
)


def tool(name: str) -> str:
    """The path of a program, or a skipped test."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(program: str, *arguments: object) -> str:
    """What a program prints on standard output; it must succeed."""
    command = [tool(program), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout


def compiled(folder: Path, source: str, *flags: str) -> Path:
    """`source` as an object, compiled as kernel code is."""
    (folder / "source.c").write_text(source)
    run("gcc", *KERNEL_FLAGS, *flags, "-c", folder / "source.c", "-o", folder / "source.o")
    return folder / "source.o"


each_built = pytest.mark.parametrize("path", BUILT, ids=BUILT_IDS)
