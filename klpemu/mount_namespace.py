"""Running a command so that it finds a mounted kernel where a machine has its own: in a mount namespace.

There the mount's sys is bound over /sys, and its files in proc and dev over those of the host; the small
commands come first in PATH, and lie over those that the host has.  Needs root, `unshare` and `mount`.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from elf.errors import KlpemuError
from klpemu.control import BIN, COMMANDS

__all__ = ["start", "why_no_namespace"]

FILES: Final = ("/proc/cmdline", "/proc/meminfo", "/proc/sys/kernel/ftrace_enabled", "/dev/kmsg")
# A host without modules has no such file; what is run there would not look for it.
FILES_IF_THERE: Final = ("/proc/modules",)
DIRECTORIES: Final = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")


def why_no_namespace() -> str:
    """Why no command can be run that way, and what to do about it; empty if it can."""
    missing = [each for each in ("unshare", "mount") if shutil.which(each) is None]
    if missing:
        return f"{' and '.join(missing)} not found; install the Debian packages mount and util-linux"
    if os.geteuid() != 0:
        return "only root can mount over /sys; run it as root, or use the mounted files by their paths"
    return ""


def start(
    command: Sequence[str],
    mountpoint: Path,
    *,
    environment: Mapping[str, str] | None = None,
    **popen: Any,
) -> "subprocess.Popen[Any]":
    """Start a command on a kernel that is mounted; the process that is returned becomes the command.

    Raises KlpemuError if there is no such command, or without root.
    """
    if reason := why_no_namespace():
        what, _, advice = reason.partition("; ")
        raise KlpemuError(what, advice=advice)
    given = dict(os.environ if environment is None else environment)
    path = f"{mountpoint}{BIN}:{given.get('PATH', os.defpath)}"
    if shutil.which(command[0], path=path) is None:
        raise KlpemuError("no such command", where=command[0])
    unshare = shutil.which("unshare")
    if unshare is None:
        raise KlpemuError("the host has no unshare(1)", advice="install the package util-linux")
    script = "\n".join([*_binds(mountpoint), 'exec "$@"'])
    # By its whole path: looked for along PATH it would be looked for in the mount, by a child that has the
    # GIL's owner wait in vfork(2), while this process has to answer.
    return subprocess.Popen(
        [unshare, "--mount", "--propagation", "private", "sh", "-ec", script, "sh", *command],
        env=given | {"PATH": path},
        **popen,
    )


def _binds(mountpoint: Path) -> list[str]:
    """Shell commands that mount everything."""
    lines = [_bind(f"{mountpoint}/sys", "/sys")]
    for path in (*FILES, *filter(os.path.exists, FILES_IF_THERE)):
        if not os.path.exists(path):
            raise KlpemuError(
                "the host has no such file to mount the kernel's over",
                where=path,
                advice="run it where the host has that file, or use the mounted files by their paths",
            )
        # Only what the kernel shows: the built-in one may lack a file.
        source = f"{mountpoint}{path}"
        lines.append(f"[ ! -e {_quoted(source)} ] || {_bind(source, path)}")
    over = {
        os.path.realpath(f"{directory}/{name}"): name
        for name in COMMANDS
        for directory in DIRECTORIES
        if os.path.isfile(f"{directory}/{name}")
    }
    lines += [_bind(f"{mountpoint}{BIN}/{name}", path) for path, name in over.items()]
    return lines


def _bind(source: str, target: str) -> str:
    return f"mount --bind {_quoted(source)} {_quoted(target)}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
