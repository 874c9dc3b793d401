"""One tree of files for what the kernel shows to user space: fs/kernfs, fs/sysfs, and the little of fs/proc.

A file has no contents of its own: `show` makes them when it is read, `store` gets what is written.  Both run
inside the service that reads or writes, which holds an active reference of the file meanwhile
(kernfs_get_active()); `remove` waits until nobody holds one.  A file that is merely open holds none: it does
not keep what it shows, and reading it later is ENODEV.

Everybody here is root.  Whether root may do what the mode forbids depends on the file system (`FileSystem`).
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from emu.errno import KernelErrno

__all__ = [
    "DEBUGFS",
    "PROCFS",
    "SYSCTL",
    "SYSFS",
    "TRACEFS",
    "FileSystem",
    "Kernfs",
    "OpenFile",
    "Stat",
]

PAGE_SIZE = 4096

Show = Callable[[], str | bytes]
Store = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class FileSystem:
    """What a file system answers root where a file has no such operation.

    `checks_mode`: the mode counts for root, too, at open (EACCES: KERNFS_ROOT_EXTRA_OPEN_PERM_CHECK of sysfs,
    sysctl_perm()).  `missing` is the errno of a read or a write of a file that cannot be read or written.
    `size` is what stat says of a file.
    """

    name: str
    checks_mode: bool
    missing: int
    size: int = 0


SYSFS = FileSystem("sysfs", True, errno.EIO, PAGE_SIZE)
PROCFS = FileSystem("proc", False, errno.EIO)
SYSCTL = FileSystem("proc", True, errno.EPERM)
DEBUGFS = FileSystem("debugfs", False, errno.EINVAL)
TRACEFS = FileSystem("tracefs", False, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class Stat:
    """What stat says: the permission bits, whether it is a directory, the size in bytes."""

    mode: int
    is_dir: bool
    size: int


@dataclass(eq=False, slots=True)
class _Node:
    """A kernfs_node.  `children` is None for a file; `active` counts the active references."""

    path: str
    mode: int
    filesystem: FileSystem
    children: dict[str, "_Node"] | None = None
    show: Show | None = None
    store: Store | None = None
    active: int = 0
    gone: bool = False

    def subtree(self) -> Iterator["_Node"]:
        """What is below the node, deepest first, and then itself."""
        for child in (self.children or {}).values():
            yield from child.subtree()
        yield self


@dataclass(eq=False, slots=True)
class OpenFile:
    """A file that somebody has opened; `mode` is "r", "w" or "rw"."""

    path: str
    mode: str
    _node: _Node = field(repr=False)
    _at_end: bool = False
    _closed: bool = False

    def read(self) -> str:
        """What the file shows, from where the last read ended: "" for the second one.

        Raises ENODEV when what the file shows is gone, EBADF if it is not open for reading, and whatever its
        `show` raises.
        """
        self._may("r", "reading")
        with _active(self._node):
            if self._at_end:
                return ""
            if self._node.show is None:
                raise self._missing("read")
            shown = self._node.show()
        self._at_end = True
        return shown if isinstance(shown, str) else shown.decode("ascii", "backslashreplace")

    def rewind(self) -> None:
        """Go back to the start (lseek): the next read shows the contents as they are then."""
        self._at_end = False

    def write(self, text: str) -> None:
        """Hand the file `text`; errors are as those of `read`.  Nothing at all is not handed to anybody."""
        self._may("w", "writing")
        with _active(self._node):
            if self._node.store is None:
                raise self._missing("written")
            if text:
                self._node.store(text)

    def close(self) -> None:
        """The file is no longer open."""
        self._closed = True

    def _may(self, letter: str, doing: str) -> None:
        if self._closed or letter not in self.mode:
            raise KernelErrno(errno.EBADF, f"the file is not open for {doing}", where=self.path)

    def _missing(self, done: str) -> KernelErrno:
        return KernelErrno(
            self._node.filesystem.missing,
            f"the file is never {done}",
            where=self.path,
            advice=_rights(self._node),
        )


class Kernfs:
    """The tree of one machine; `wait` lets the running service sleep until a predicate holds."""

    def __init__(self, wait: Callable[[Callable[[], bool], str], None]) -> None:
        self._wait = wait
        self._root = _Node("", 0o755, PROCFS, {})

    def mount(self, path: str, filesystem: FileSystem) -> None:
        """A directory from which on the rules of another file system hold."""
        self.create_dir(path)
        self._lookup(path).filesystem = filesystem

    def create_dir(self, path: str, mode: int = 0o755) -> None:
        """Make a directory in one that is there; raises EEXIST, ENOENT, ENOTDIR."""
        self._add(path, mode).children = {}

    def create_file(
        self, path: str, mode: int, *, show: Show | None = None, store: Store | None = None
    ) -> None:
        """Make a file in a directory that is there; raises EEXIST, ENOENT, ENOTDIR."""
        node = self._add(path, mode)
        node.show, node.store = show, store

    def remove(self, path: str) -> None:
        """Take away a file, or a directory and all below it.

        From now on nobody gets at any of it; this returns when nobody uses it any more (kernfs_drain()).
        Raises ENOENT.
        """
        node = self._lookup(path)
        parent, _, name = path.rpartition("/")
        going = list(node.subtree())
        for each in going:
            each.gone = True
        for each in going:
            if each.active:
                self._wait(partial(_unused, each), f"users of {each.path}")
        siblings = self._lookup(parent).children
        if siblings is not None and siblings.get(name) is node:
            del siblings[name]

    def open(self, path: str, mode: str = "r") -> OpenFile:
        """Open a file; raises ENOENT, ENOTDIR, EISDIR, and EACCES where the mode counts for root."""
        node = self._lookup(path)
        if node.children is not None:
            raise KernelErrno(errno.EISDIR, "is a directory", where=path)
        wanted = (0o444 if "r" in mode else 0, 0o222 if "w" in mode else 0)
        if node.filesystem.checks_mode and any(bits and not node.mode & bits for bits in wanted):
            raise KernelErrno(errno.EACCES, "permission denied", where=path, advice=_rights(node))
        return OpenFile(path, mode, node)

    def read(self, path: str) -> str:
        """Open a file, read all of it, close it."""
        file = self.open(path, "r")
        try:
            return file.read()
        finally:
            file.close()

    def write(self, path: str, text: str) -> None:
        """Open a file, write `text`, close it."""
        file = self.open(path, "w")
        try:
            file.write(text)
        finally:
            file.close()

    def listdir(self, path: str) -> list[str]:
        """The names in a directory, sorted; raises ENOENT, ENOTDIR."""
        children = self._lookup(path).children
        if children is None:
            raise KernelErrno(errno.ENOTDIR, "is not a directory", where=path)
        return sorted(name for name, node in children.items() if not node.gone)

    def exists(self, path: str) -> bool:
        """There is such a file or directory."""
        try:
            self._lookup(path)
        except KernelErrno:
            return False
        return True

    def stat(self, path: str) -> Stat:
        """Rights, kind and size; raises ENOENT, ENOTDIR."""
        node = self._lookup(path)
        is_dir = node.children is not None
        return Stat(node.mode, is_dir, 0 if is_dir else node.filesystem.size)

    def walk(self, path: str) -> Iterator[str]:
        """The paths of all that is below a directory."""
        for node in self._lookup(path).subtree():
            if node.path != path and not node.gone:
                yield node.path

    def directories(self, path: str) -> Iterator[str]:
        """The paths of those of them that are directories."""
        for node in self._lookup(path).subtree():
            if node.children is not None and node.path != path and not node.gone:
                yield node.path

    def _add(self, path: str, mode: int) -> _Node:
        parent_path, _, name = path.rpartition("/")
        parent = self._lookup(parent_path)
        if parent.children is None:
            raise KernelErrno(errno.ENOTDIR, "is not a directory", where=parent_path)
        if name in parent.children:
            raise KernelErrno(errno.EEXIST, f"'{name}' is there already", where=parent_path or "/")
        node = parent.children[name] = _Node(path, mode, parent.filesystem)
        return node

    def _lookup(self, path: str) -> _Node:
        if path and not path.startswith("/"):
            raise KernelErrno(errno.ENOENT, "no such file", where=path, advice="begin the path with a slash")
        node = self._root
        for name in path.split("/")[1:]:
            if node.children is None:
                raise KernelErrno(errno.ENOTDIR, "is not a directory", where=node.path)
            if not name:  # a slash at the end, or two in a row
                continue
            found = node.children.get(name)
            if found is None or found.gone:
                raise KernelErrno(
                    errno.ENOENT, "no such file or directory", where=path, advice=_nearest(node, name)
                )
            node = found
        return node


@contextmanager
def _active(node: _Node) -> Iterator[None]:
    """An active reference: nobody takes the node away meanwhile."""
    if node.gone:
        raise KernelErrno(errno.ENODEV, "what the file showed is gone", where=node.path)
    node.active += 1
    try:
        yield
    finally:
        node.active -= 1


def _unused(node: _Node) -> bool:
    return not node.active


def _rights(node: _Node) -> str:
    return f"its mode is {node.mode:04o}"


def _nearest(node: _Node, name: str) -> str:
    names = sorted(node.children or ())
    place = node.path or "/"
    return (
        f"{place} has {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        if names
        else f"{place} is empty"
    )
