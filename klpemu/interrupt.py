"""Ctrl-C while the guest runs.

Python handles a signal between two of its own instructions, and a guest call is one long call into Unicorn.
With a big instruction budget an endless guest would have to be waited for.  So a second thread watches for
the signal, and ends the process if the first one has not done so after a moment.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

__all__ = ["INTERRUPTED", "say_interrupted", "signals", "watch_for_ctrl_c"]

INTERRUPTED: Final = 130  # as a shell reports SIGINT
PATIENCE: Final = 1.0  # seconds


def say_interrupted() -> None:
    """The one line after Ctrl-C."""
    sys.stderr.write("klpemu: interrupted\n")
    sys.stderr.flush()


def watch_for_ctrl_c() -> None:
    """Make Ctrl-C end the process within `PATIENCE` from now on; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    # The C signal handler writes the signal's number here at once.
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    threading.Thread(target=_end_when_written, args=(readable,), daemon=True).start()


def _end_when_written(readable: int) -> None:
    while number := os.read(readable, 1):
        if number[0] == signal.SIGINT:
            threading.Event().wait(PATIENCE)
            say_interrupted()
            os._exit(INTERRUPTED)


@contextmanager
def signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have `handler` called for Ctrl-C, SIGTERM and SIGHUP, and nothing else done about them.

    Does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watched = signal.set_wakeup_fd(-1)
    before = {
        number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        signal.set_wakeup_fd(watched)
