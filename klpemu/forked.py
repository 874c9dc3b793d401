"""Going on in two ways: a forked process takes one, and says at its end what it has found.

Nothing is copied by hand, so it can happen at any moment, also while services stand at their doors.
"""

import ctypes
import os
import pickle
import signal
import sys
from typing import Any, Final, NoReturn

from elf.errors import KlpemuError

__all__ = ["Forked"]

PR_SET_PDEATHSIG: Final = 1  # include/uapi/linux/prctl.h
PIECE: Final = 1 << 16


class Forked:
    """A process forked from this one; `pid` is its number, `pipe` where its answer comes."""

    def __init__(self) -> None:
        reader, writer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid:
            os.close(writer)
            self.pipe = reader
            return
        os.close(reader)
        self.pipe = writer
        # The one that was asked first tells the others to stop, by what they share; if it dies they die.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    @property
    def is_child(self) -> bool:
        """This is the new process."""
        return self.pid == 0

    def answer(self) -> Any:
        """Wait until the child has answered and is gone.

        If it dies without an answer (somebody killed it, or there was no memory left) this process has none
        either, and ends: so the first one of all is told, which nobody may take for a finding.
        """
        data = bytearray()
        while piece := os.read(self.pipe, PIECE):
            data += piece
        if not data:
            os._exit(1)
        return self.ended(bytes(data))

    def ended(self, data: bytes) -> Any:
        """The answer, when all of it was read; raises KlpemuError if there is none."""
        os.close(self.pipe)
        _, status = os.waitpid(self.pid, 0)
        if not data:
            how = os.waitstatus_to_exitcode(status)
            raise KlpemuError(
                f"a process of the exploration has died (exit status {how})",
                advice="look for what has killed it, or for memory that ran out; --runs N ends earlier",
            )
        return pickle.loads(data)

    def reply(self, answer: Any) -> NoReturn:
        """Answer, and end this child."""
        data = memoryview(pickle.dumps(answer))
        try:
            while data:
                data = data[os.write(self.pipe, data) :]
        finally:
            os._exit(0)
