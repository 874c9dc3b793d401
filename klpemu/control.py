"""How a command that is a process of the host gets to the kernel: one file, and a shell script for each name.

The script needs no interpreter but /bin/sh.  It opens the control file, which is a transaction: it writes its
name, its directory and its arguments, each with a NUL behind it.  It reads back a line `STATUS BYTES`, so
many bytes for standard error, and the rest for standard output.
"""

import shlex
from collections.abc import Callable
from typing import Final

from emu.kernfs import Stat
from klpemu.command import Command, Session, UsageError
from klpemu.kmod import insmod, lsmod, modinfo, modprobe, rmmod
from klpemu.module_tree import ModuleTree
from klpemu.system_commands import dmesg, sysctl, uname
from klpemu.user_space import Opener, UserSpace

__all__ = ["BIN", "COMMANDS", "CONTROL", "control_files"]

CONTROL: Final = "/klpemu/control"
BIN: Final = "/klpemu/bin"
COMMANDS: Final[dict[str, Command]] = {
    each.__name__: each for each in (modprobe, rmmod, insmod, modinfo, lsmod, dmesg, sysctl, uname)
}

_SCRIPT: Final = """\
#!/bin/sh
exec 3<>{control} || exit 1
printf '%s\\0' "${{0##*/}}" "$PWD" "$@" >&3
read -r status length <&3 || exit 1
[ "$length" = 0 ] || head -c "$length" <&3 >&2
cat <&3
exit "$status"
"""


def control_files(
    mountpoint: str, user_space: Callable[[], UserSpace], modules: Callable[[], ModuleTree]
) -> dict[str, tuple[Stat, Opener]]:
    """The control file and the scripts, as `UserSpace` takes them; they find the control file below
    `mountpoint`.
    """
    script = _SCRIPT.format(control=shlex.quote(f"{mountpoint}{CONTROL}")).encode()
    scripts = {
        f"{BIN}/{name}": (Stat(0o555, False, len(script)), lambda _: _Constant(script)) for name in COMMANDS
    }
    return {
        CONTROL: (Stat(0o600, False, 0), lambda _: _Transaction(user_space(), modules())),
        **scripts,
    }


class _Transaction:
    """One open control file: what is written until something is read is a command."""

    def __init__(self, user_space: UserSpace, modules: ModuleTree) -> None:
        self._user_space = user_space
        self._modules = modules
        self._asked = b""
        self._answer: bytes | None = None

    def read(self, size: int, _offset: int) -> bytes:
        if self._answer is None:
            self._answer = self._perform()
        part, self._answer = self._answer[:size], self._answer[size:]
        return part

    def write(self, data: bytes) -> int:
        self._asked += data
        return len(data)

    def close(self) -> None:
        pass

    def _perform(self) -> bytes:
        words = [each.decode("utf-8", "surrogateescape") for each in self._asked.split(b"\0")[:-1]]
        if len(words) < 2 or words[0] not in COMMANDS:
            return _answered(127, [], ["klpemu: no such command\n"])
        name, directory, *arguments = words
        session = Session(name, self._user_space, self._modules, directory)
        try:
            status = COMMANDS[name](session, arguments)
        except UsageError as error:
            return _answered(1, [], [f"{name}: {error}\n"])
        return _answered(status, session.out, session.err)


def _answered(status: int, out: list[str], err: list[str]) -> bytes:
    printed = "".join(err).encode("utf-8", "surrogateescape")
    shown = "".join(out).encode("utf-8", "surrogateescape")
    return f"{status} {len(printed)}\n".encode() + printed + shown


class _Constant:
    """An open file that never changes."""

    def __init__(self, contents: bytes) -> None:
        self._contents = contents

    def read(self, size: int, offset: int) -> bytes:
        return self._contents[offset : offset + size]

    def write(self, data: bytes) -> int:
        return len(data)

    def close(self) -> None:
        pass
