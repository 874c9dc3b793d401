"""How the tests of the command line call it: in this process, or as a program of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from klpemu.cli import main

ROOT = Path(__file__).resolve().parents[2]
FIX_AREA = "builtin:fix_area.o:area_of=fixed_area_of"


@dataclass(frozen=True)
class Outcome:
    """Exit status, standard output and standard error."""

    status: int
    out: str
    err: str

    @property
    def object(self) -> dict[str, Any]:
        """Standard output as the JSON object it must be."""
        parsed = json.loads(self.out)
        assert isinstance(parsed, dict)
        return parsed


def klpemu(*arguments: str, **environment: str) -> Outcome:
    """Run in this process; not on a terminal."""
    result = CliRunner().invoke(main, arguments, env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def process(arguments: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
    """Start `klpemu` as a program, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "klpemu", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        **options,
    )


def environment(**more: str) -> dict[str, str]:
    """The environment in which `python -m klpemu` is this tree's, whatever is installed."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}
