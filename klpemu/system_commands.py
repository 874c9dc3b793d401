"""dmesg (util-linux), sysctl (procps) and uname (coreutils), as far as they concern the kernel."""

import errno
import os
from collections.abc import Sequence
from typing import Final

from emu.errno import KernelErrno
from emu.memory import read_string
from emu.vmcore import OSRELEASE
from klpemu.command import Options, Session, UsageError, read_options
from klpemu.kernel import Kernel

__all__ = ["dmesg", "release_of", "sysctl", "uname"]

SUCCESS, FAILURE = 0, 1
PROC_SYS: Final = "/proc/sys"


def dmesg(session: Session, arguments: Sequence[str]) -> int:
    """The kernel's log, a line with its virtual time each."""
    options = read_options(arguments, "tr", {"notime": "t", "raw": "r"})
    if options.arguments:
        raise UsageError("bad usage\nTry 'dmesg --help' for more information.")
    log = session.user_space.kernel.machine.log
    for line, stamp in zip(log.lines, log.stamps, strict=True):
        seconds, rest = divmod(stamp.nanoseconds // 1000, 1_000_000)
        priority = f"<{stamp.priority}>" if "r" in options else ""
        time = "" if "t" in options else f"[{seconds:5}.{rest:06}] "
        session.print(f"{priority}{time}{line}")
    return SUCCESS


def sysctl(session: Session, arguments: Sequence[str]) -> int:
    """Show or set what is in /proc/sys."""
    options = read_options(
        arguments,
        "aAXbeNnqwodx",
        {
            "all": "a",
            "binary": "b",
            "ignore": "e",
            "names": "N",
            "values": "n",
            "quiet": "q",
            "write": "w",
        },
    )
    settings = options.arguments
    if {"a", "A", "X"} & options.given.keys():
        kernfs = session.user_space.kernel.machine.kernfs
        files = [path for path in kernfs.walk(PROC_SYS) if not kernfs.stat(path).is_dir]
        settings = sorted(path.removeprefix(f"{PROC_SYS}/").replace("/", ".") for path in files)
    elif not settings:
        raise UsageError("no variables specified\nTry `sysctl --help' for more information.")
    return max([_sysctl(session, each, options) for each in settings], default=SUCCESS)


def _sysctl(session: Session, setting: str, options: Options) -> int:
    key, equals, value = setting.partition("=")
    key, value = key.strip(), value.strip()
    if "w" in options and not equals:
        session.err.append("sysctl: command line(0): invalid syntax, continuing...\n")
        return FAILURE
    # Whichever of the two comes first separates; the other one is part of a name.
    dotted = "." in key and ("/" not in key or key.index(".") < key.index("/"))
    path = f"{PROC_SYS}/{key.translate(str.maketrans('./', '/.')) if dotted else key}"
    name = path.removeprefix(f"{PROC_SYS}/").translate(str.maketrans("./", "/."))
    kernel = session.user_space.kernel
    if not kernel.machine.kernfs.exists(path):
        if "e" in options:
            return SUCCESS
        session.err.append(f"sysctl: cannot stat {path}: {os.strerror(errno.ENOENT)}\n")
        return FAILURE
    try:
        if equals:
            kernel.write(path, f"{value}\n")
        else:
            value = kernel.read(path).removesuffix("\n")
    except KernelErrno as error:
        doing = "setting" if equals else "reading"
        session.err.append(f'sysctl: {doing} key "{name}": {os.strerror(error.number)}\n')
        return FAILURE
    if not (equals and "q" in options):
        session.out.append(_shown(name, value, options))
    return SUCCESS


def _shown(name: str, value: str, options: Options) -> str:
    if "b" in options:
        return value
    if "N" in options:
        return f"{name}\n"
    return f"{value}\n" if "n" in options else f"{name} = {value}\n"


def uname(session: Session, arguments: Sequence[str]) -> int:
    """Which kernel this is."""
    long = {
        "all": "a",
        "kernel-name": "s",
        "nodename": "n",
        "kernel-release": "r",
        "kernel-version": "v",
        "machine": "m",
        "processor": "p",
        "hardware-platform": "i",
        "operating-system": "o",
    }
    options = read_options(arguments, "asnrvmpio", long)
    if options.arguments:
        raise UsageError(f"extra operand '{options.arguments[0]}'\nTry 'uname --help' for more information.")
    banner = _banner(session.user_space.kernel)
    machine = os.uname().machine
    words = {
        "s": "Linux",
        "n": os.uname().nodename,
        "r": release_of(session.user_space.kernel),
        "v": banner[at:].strip() if (at := banner.find("#")) >= 0 else "#1 SMP PREEMPT",
        "m": machine,
        "o": "GNU/Linux",
    }
    if "a" in options:
        shown = list(words)
    elif options.given:
        words |= {"p": "unknown", "i": "unknown"}
        shown = [letter for letter in "snrvmpio" if letter in options]
    else:
        shown = ["s"]
    session.print(" ".join(words[letter] for letter in shown))
    return SUCCESS


def release_of(kernel: Kernel) -> str:
    """The release of a kernel, from its `linux_banner`; the built-in one has none."""
    words = _banner(kernel).split()
    return words[2] if len(words) > 2 else OSRELEASE


def _banner(kernel: Kernel) -> str:
    address = kernel.machine.vmlinux.symbols.get("linux_banner")
    return read_string(kernel.machine.space, address) if address else ""
