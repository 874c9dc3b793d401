"""Programs that tests ask about files klpemu wrote."""

import shutil
import subprocess
from pathlib import Path

import pytest


def run(program: str, *arguments: object) -> str:
    """What a program prints on standard output; it must succeed and have nothing to complain about."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, errors="replace")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def gdb(*commands: str, vmlinux: Path | None = None, core: Path | None = None) -> list[str]:
    """What gdb answers to each command, with these files open."""
    files = [*(("-c", core) if core else ()), *((vmlinux,) if vmlinux else ())]
    arguments = [argument for command in commands for argument in ("-ex", r'printf "\n@@"', "-ex", command)]
    answers = run("gdb", "-nx", "-batch", "-iex", "set width 0", *arguments, *files).split("@@")[1:]
    return [answer.strip() for answer in answers]
