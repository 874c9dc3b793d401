"""The transcripts in the documentation are what the program prints.

A block marked `console` holds commands behind `$ ` and what they print; a block marked `toml NAME` is a file
that they find.  After a change that is meant, this file run with KLPEMU_UPDATE_DOCS=1 writes the new output
into the documentation.
"""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, environment

from klpemu import Func, Kernel, Patch

DOCUMENTS = ("README.md", "docs/cli.md")
BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"^```toml (\S+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def printed(block: str, directory: Path) -> str:
    """The block with what its commands print now."""
    commands = re.findall(r"^\$ (.*)$", block, re.MULTILINE)
    return "".join(f"$ {command}\n{output(command, directory)}" for command in commands)


def output(command: str, directory: Path) -> str:
    """What a shell command prints, errors included, with `klpemu` being this tree's."""
    programs = directory / "programs"
    programs.mkdir(exist_ok=True)
    program = programs / "klpemu"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m klpemu "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=directory,
        env=environment(PATH=f"{programs}:{os.environ['PATH']}"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout


@pytest.mark.parametrize("document", DOCUMENTS)
def test_transcripts_are_what_is_printed(document: str, tmp_path: Path) -> None:
    text = (ROOT / document).read_text()
    for name, contents in FILE.findall(text):
        (tmp_path / name).write_text(contents)
    blocks = BLOCK.findall(text)
    assert blocks
    now = [printed(block, tmp_path) for block in blocks]
    if os.environ.get("KLPEMU_UPDATE_DOCS"):
        renewed = iter(now)
        (ROOT / document).write_text(BLOCK.sub(lambda _: next(renewed), text))
        return
    assert now == blocks


def test_every_verb_has_a_section() -> None:
    text = (ROOT / "docs/cli.md").read_text()
    for verb in ("demo", "sites", "verify", "trace", "run", "info"):
        assert f"\n## klpemu {verb}\n" in text


def test_the_python_of_the_readme_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = re.search(r"^From Python:\n\n((?:    .*\n)+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert found is not None
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(textwrap.dedent(found[1]), names)
    assert "klp_ftrace_handler" in capsys.readouterr().out
    assert names["kernel"].call("area_of", 3, 4) == 7


def test_the_tasks_of_the_readme_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = (ROOT / "README.md").read_text()
    found = re.search(r"^when it is safe, .*\n\n((?:    .*\n)+)", text, re.MULTILINE)
    assert found is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"Func": Func, "Kernel": Kernel, "Patch": Patch}
    exec(textwrap.dedent(found[1]), names)
    assert "is sleeping on function nap" in capsys.readouterr().out
    assert names["kernel"].in_transition == ""
    assert (tmp_path / "vmcore").stat().st_size > 100_000
