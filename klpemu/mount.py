"""The files of a booted kernel, mounted through FUSE.

Kernel and file system live in one thread: what its tasks do is suspended and resumed there, and one request
is done when the next begins.  Needs mfusepy, libfuse and /dev/fuse.
"""

import ctypes
import errno
import os
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from elf.errors import KlpemuError
from klpemu.user_space import File, UserSpace

__all__ = ["Mount", "why_no_fuse"]

FSTYPE: Final = "fuse.klpemu"
MNT_DETACH: Final = 2
PATIENCE: Final = 5.0  # seconds, for the file system's thread to end
INSTALL: Final = "pip install 'klpemu[boot]', and the Debian package fuse3"


def why_no_fuse() -> str:
    """Why nothing can be mounted, and what to do about it; empty if it can."""
    try:
        import mfusepy  # noqa: F401
    except ImportError:
        return f"mfusepy is not installed; {INSTALL}"
    except OSError as error:
        return f"libfuse cannot be loaded ({error}); {INSTALL}"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return (
            f"/dev/fuse cannot be opened ({error.strerror}); load the module fuse, "
            "or give the container that device and CAP_SYS_ADMIN"
        )
    return ""


class Mount:
    """A mounted kernel: `boot` makes what is mounted, in the thread that will run it.

    `mountpoint` is an empty directory; raises KlpemuError if it is not, or without FUSE.  Leaving the context
    unmounts.
    """

    def __init__(self, boot: Callable[[], UserSpace], mountpoint: str | os.PathLike[str]) -> None:
        self.mountpoint = Path(mountpoint).absolute()
        self._boot = boot
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._cancelled = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="klpemu boot", daemon=True)

    def __enter__(self) -> "Mount":
        if reason := why_no_fuse():
            what, _, advice = reason.partition("; ")
            raise KlpemuError(what, advice=advice)
        _check_mountpoint(self.mountpoint)
        self._thread.start()
        try:
            self._ready.wait()
            if self._error is not None:
                raise self._error
        except BaseException:
            self.unmount()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unmount()

    def wait(self) -> None:
        """Return when somebody has unmounted it."""
        self._ended.wait()

    def unmount(self) -> None:
        """Unmount, also if files are still open; their users get ENOTCONN."""
        self._cancelled = True
        if self._ready.is_set() and not self._ended.is_set():
            _detach(self.mountpoint)
        # A request that is just being made may need a while, and whoever has a file open keeps the mount.
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        try:
            user_space = self._boot()
            import mfusepy

            if self._cancelled:
                return
            # Nothing is remembered by the host's kernel: what is there changes without its doing.
            mfusepy.FUSE(
                _operations(user_space, self._ready.set),
                str(self.mountpoint),
                foreground=True,
                nothreads=True,
                direct_io=True,
                fsname="klpemu",
                subtype="klpemu",
                attr_timeout=0,
                entry_timeout=0,
                negative_timeout=0,
            )
        except RuntimeError as error:  # the exit status of fuse_main(); it has said why
            self._error = KlpemuError(f"FUSE ended with status {error}", where=str(self.mountpoint))
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()
            self._ready.set()


def _operations(user_space: UserSpace, ready: Callable[[], None]) -> Any:
    """What libfuse calls, as an object with its operations' names; they raise OSError."""
    booted = time.time_ns()
    files: dict[int, File] = {}

    class Operations:
        use_ns = True

        def init(self, _path: str) -> None:
            ready()

        def getattr(self, path: str, _handle: int | None = None) -> dict[str, int]:
            found = user_space.stat(path)
            kind, links = (stat.S_IFDIR, 2) if found.is_dir else (stat.S_IFREG, 1)
            return {
                "st_mode": kind | found.mode,
                "st_nlink": links,
                "st_size": found.size,
                "st_uid": os.getuid(),
                "st_gid": os.getgid(),
                "st_atime": booted,
                "st_mtime": booted,
                "st_ctime": booted,
            }

        def readdir(self, path: str, _handle: int) -> list[tuple[str, dict[str, int], int]]:
            names = [(".", True), ("..", True), *user_space.listdir(path)]
            return [
                (name, {"st_mode": stat.S_IFDIR if is_dir else stat.S_IFREG}, 0) for name, is_dir in names
            ]

        def open(self, path: str, flags: int) -> int:
            handle = max(files, default=0) + 1
            files[handle] = user_space.open(path, flags)
            return handle

        def read(self, _path: str, size: int, offset: int, handle: int) -> bytes:
            return user_space.read(files[handle], size, offset)

        def write(self, _path: str, data: bytes, _offset: int, handle: int) -> int:
            return user_space.write(files[handle], data)

        def release(self, _path: str, handle: int) -> int:
            user_space.close(files.pop(handle))
            return 0

        def truncate(self, _path: str, _length: int, _handle: int | None = None) -> int:
            return 0  # `echo >` asks for it; no file here has contents of its own

        def utimens(self, _path: str, _times: tuple[int, int] | None = None) -> int:
            return 0

        # Neither sysfs nor procfs lets anybody make a file: vfs_create() is EACCES then, the others EPERM.
        def create(self, path: str, _mode: int, _info: object = None) -> int:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)

        def _never(self, *_: object) -> int:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        mkdir = mknod = unlink = rmdir = rename = link = symlink = chmod = chown = _never

    return Operations()


def _check_mountpoint(path: Path) -> None:
    """Only an empty directory will do.  A mount that nobody serves any more is taken away."""
    try:
        names = os.listdir(path)
    except OSError as error:
        if error.errno == errno.ENOTCONN and _mounted(path) == FSTYPE:
            _detach(path)
            names = os.listdir(path)
        elif error.errno == errno.ENOENT:
            raise KlpemuError("no such directory", where=str(path), advice="make it first") from None
        else:
            raise
    if _mounted(path) == FSTYPE:
        raise KlpemuError("a kernel is mounted there already", where=str(path), advice="name another one")
    if names:
        raise KlpemuError("the directory is not empty", where=str(path), advice="name an empty one")


def _mounted(path: Path) -> str:
    """The type of the file system that is mounted on a directory, "" if none is."""
    found = ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split(" ")
        if point.encode().decode("unicode_escape") == str(path):
            found = kind
    return found


def _detach(path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), MNT_DETACH) and (program := shutil.which("fusermount3")):
        subprocess.run([program, "-u", "-z", "-q", str(path)], check=False)
