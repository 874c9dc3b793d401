"""What programs can do with a booted kernel: open, read and write files.

Every request first lets virtual time go by, until the kernel has nothing left to do, but at most 100
milliseconds; otherwise time stands still.  The walk along a path is one request with what is then done with
the file.
"""

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Protocol

from elf.errors import KlpemuError
from emu.errno import KernelErrno
from emu.kernfs import OpenFile, Stat
from klpemu.kernel import Kernel
from klpemu.kmsg import KMSG, Kmsg

__all__ = ["File", "Opener", "UserSpace"]

PAUSE: Final = 100  # virtual milliseconds
_MODES: Final = {os.O_RDONLY: "r", os.O_WRONLY: "w", os.O_RDWR: "rw"}


class File(Protocol):
    """An open file."""

    def read(self, size: int, offset: int) -> bytes:
        """At most `size` bytes from `offset` on; b"" at the end."""
        ...

    def write(self, data: bytes) -> int:
        """Hand the file `data`; returns how much of it was taken."""
        ...

    def close(self) -> None:
        """The file is no longer open."""
        ...


Opener = Callable[[int], File]  # gets the flags of open(2)


class UserSpace:
    """The files of one booted kernel: its own, /dev/kmsg, and `more`, which are opened by a function.

    What goes wrong in the kernel and has no errno is EIO for the program; `complain` gets the line, and the
    log has it, too.
    """

    def __init__(
        self,
        kernel: Kernel,
        more: Mapping[str, tuple[Stat, Opener]] | None = None,
        complain: Callable[[str], None] | None = None,
    ) -> None:
        self.kernel = kernel
        self._machine = kernel.machine
        self._kernfs = kernel.machine.kernfs
        self._complain = complain or _to_stderr
        self._files: dict[str, tuple[Stat, Opener]] = {KMSG: (Stat(0o644, False, 0), self._kmsg)}
        self._files |= more or {}
        self._directories: dict[str, set[str]] = {}
        for path in self._files:
            while path:
                path, _, name = path.rpartition("/")
                self._directories.setdefault(path, set()).add(name)
        self._last = ""
        self._opened = False

    def stat(self, path: str) -> Stat:
        """Rights, kind and size; raises OSError."""
        with self._request(path):
            if path in self._files:
                return self._files[path][0]
            if path in self._directories or path == "/":
                return Stat(0o755, True, 0)
            return self._kernfs.stat(path)

    def listdir(self, path: str) -> list[tuple[str, bool]]:
        """The names in a directory, and which are directories; raises OSError."""
        with self._request(path):
            plain = path.rstrip("/")
            names = {
                name: f"{plain}/{name}" in self._directories for name in self._directories.get(plain, ())
            }
            if plain not in self._directories or not plain:
                for name in self._kernfs.listdir(plain):
                    names.setdefault(name, self._kernfs.stat(f"{plain}/{name}").is_dir)
            return sorted(names.items())

    def open(self, path: str, flags: int) -> File:
        """Open a file with the flags of open(2); raises OSError."""
        with self._request(path, opens=True):
            mode = _MODES[flags & os.O_ACCMODE]
            if path in self._files:
                rights, opened = self._files[path]
                if "w" in mode and not rights.mode & stat.S_IWUSR:
                    raise KernelErrno(errno.EACCES, "permission denied", where=path)
                return opened(flags)
            if path in self._directories:
                raise KernelErrno(errno.EISDIR, "is a directory", where=path)
            return _KernelFile(self, self._serve(f"open {path}", lambda: self._kernfs.open(path, mode)))

    def read(self, file: File, size: int, offset: int) -> bytes:
        """Read from an open file; raises OSError."""
        with self._answer():
            return file.read(size, offset)

    def write(self, file: File, data: bytes) -> int:
        """Write to an open file; raises OSError."""
        with self._answer():
            return file.write(data)

    def close(self, file: File) -> None:
        """Close an open file."""
        with self._answer():
            file.close()

    def _kmsg(self, flags: int) -> Kmsg:
        return Kmsg(self._machine.log, nonblocking=bool(flags & os.O_NONBLOCK))

    def _serve(self, name: str, body: Callable[[], Any]) -> Any:
        """A system call."""
        return self.kernel.system_call(name, body)

    @contextmanager
    def _request(self, path: str, *, opens: bool = False) -> Iterator[None]:
        """A request begins, unless `path` goes on from where the last one has looked; it opens one file."""
        with self._answer():
            parent = path.rpartition("/")[0]
            if (opens and self._opened) or (path != self._last and (not parent or parent != self._last)):
                self.let_time_pass()
                self._opened = False
            self._last = path
            self._opened = self._opened or opens
            yield

    def let_time_pass(self) -> None:
        """100 virtual milliseconds, or less if there is nothing left to do."""
        machine = self._machine

        def idle() -> bool:
            return machine.timers.next_expiry is None and not machine.sched.candidates()

        try:
            self.kernel.tasks.run(PAUSE, idle)
        except KlpemuError as error:  # somebody else's work: this request can go on
            self.report(error)

    def report(self, error: KlpemuError) -> None:
        """Say what went wrong in the kernel, in the log and to whoever runs it."""
        self._machine.log.pr_err(f"klpemu: {error}")
        self._complain(f"klpemu: {error}")

    @contextmanager
    def _answer(self) -> Iterator[None]:
        """Errors as a program sees them."""
        try:
            yield
        except KernelErrno as error:
            raise OSError(error.number, os.strerror(error.number)) from error
        except KlpemuError as error:
            self.report(error)
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error


class _KernelFile:
    """An open file of the kernel's.  A read from the start shows it anew (lseek to 0)."""

    def __init__(self, user_space: UserSpace, file: OpenFile) -> None:
        self._serve = user_space._serve
        self._file = file
        self._shown: bytes | None = None

    def read(self, size: int, offset: int) -> bytes:
        if self._shown is None or not offset:
            self._file.rewind()
            shown: str = self._serve(f"read {self._file.path}", self._file.read)
            self._shown = shown.encode("utf-8", "surrogateescape")
        return self._shown[offset : offset + size]

    def write(self, data: bytes) -> int:
        text = data.decode("utf-8", "surrogateescape")
        self._serve(f"write {self._file.path}", lambda: self._file.write(text))
        return len(data)

    def close(self) -> None:
        self._file.close()


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
