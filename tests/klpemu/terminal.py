"""A terminal of so many columns for the tests, and what can be read on it in the end."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from functools import partial

import pytest
from command_line import environment

# What klpemu sends: colours, up a line, clear the line, text.
TOKEN = re.compile(r"\x1b\[[\d;?]*[A-Za-z]|\n|\r|[^\x1b\n\r]+")


class Terminal:
    """`klpemu` on a terminal of its own; `text` is all that was printed, escape sequences included."""

    def __init__(self, *arguments: str, columns: int, **more: str) -> None:
        try:
            self._master, slave = pty.openpty()
        except OSError as error:
            pytest.skip(f"this machine gives no terminal: {error}")
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        variables = environment(TERM="xterm-256color", **more)
        for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
            if name not in more:
                variables.pop(name, None)
        self.child = subprocess.Popen(
            [sys.executable, "-m", "klpemu", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=variables,
            # A shell starts what runs in the background with SIGINT ignored.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
        )
        os.close(slave)
        self._data = b""

    @property
    def text(self) -> str:
        """What was printed so far."""
        return self._data.decode(errors="ignore").replace("\r\n", "\n")

    def read(self, until: str = "") -> None:
        """Read until the text has been printed, or to the end."""
        while not until or until not in self.text:
            try:
                block = os.read(self._master, 1 << 16)
            except OSError:  # EIO: the other side is closed
                break
            if not block:
                break
            self._data += block

    def finish(self) -> int:
        """Read to the end; returns the exit status."""
        self.read()
        os.close(self._master)
        return self.child.wait()


def on_a_terminal(*arguments: str, columns: int, **more: str) -> str:
    """What `klpemu` prints on a terminal of so many columns, escape sequences included."""
    terminal = Terminal(*arguments, columns=columns, **more)
    assert terminal.finish() == 0
    return terminal.text


def screen(text: str) -> list[str]:
    """The lines that can be read when all of it has been printed, as if the terminal had no last line."""
    lines, row = [""], 0
    for token in TOKEN.findall(text):
        if token == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif token == "\x1b[2K":
            lines[row] = ""
        elif token.startswith("\x1b[") and token.endswith("A"):
            row -= int(token[2:-1] or 1)
        elif token[0] not in "\x1b\r":
            lines[row] += token
    return [line.rstrip() for line in lines]
