"""modprobe, insmod, rmmod, lsmod and modinfo, as kmod 30 has them: options, messages, exit statuses."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elf.errors import ElfError, KlpemuError, SymbolError
from emu.errno import KernelErrno
from klpemu.command import Session, read_options
from klpemu.module_tree import ModuleFile, plain_name

__all__ = ["insmod", "lsmod", "modinfo", "modprobe", "rmmod"]

SUCCESS, FAILURE = 0, 1
KMOD_VERSION = "kmod version 30"
# What the kernel returns where klpemu says more than a number.
_ERRNOS = {SymbolError: errno.ENOENT, ElfError: errno.ENOEXEC}


def modprobe(session: Session, arguments: Sequence[str]) -> int:
    """Load a module by name with what it depends on, or with -r remove modules."""
    options = read_options(
        arguments,
        "arwRibfDcnC:d:S:sqvVh",
        {
            "all": "a",
            "remove": "r",
            "dry-run": "n",
            "show": "n",
            "first-time": "first-time",
            "quiet": "q",
            "verbose": "v",
            "show-depends": "D",
            "version": "V",
            "use-blacklist": "b",
            "ignore-install": "i",
            "ignore-remove": "i",
            "syslog": "s",
            "force": "f",
            "set-version=": "S",
            "dirname=": "d",
            "config=": "C",
        },
    )
    if "V" in options:
        session.print(KMOD_VERSION)
        return SUCCESS
    if not options.arguments:
        session.error("missing parameters. See -h.")
        return FAILURE
    if "r" in options:
        statuses = [_remove_named(session, name, dry="n" in options) for name in options.arguments]
        return max(statuses)
    if "a" in options:
        return max([_probe(session, name, [], options.given) for name in options.arguments])
    name, *parameters = options.arguments
    return _probe(session, name, parameters, options.given)


def _probe(session: Session, name: str, parameters: Sequence[str], options: dict[str, str]) -> int:
    module = session.modules.find(name)
    if module is None:
        if "q" not in options:
            release = session.modules.release
            session.fatal(f"Module {name} not found in directory /lib/modules/{release}")
        return FAILURE
    if _is_loaded(session, module.name) and "D" not in options:
        if "first-time" in options:
            session.error(f"could not insert '{module.name}': Module already in kernel")
            return FAILURE
        return SUCCESS
    for each in session.modules.with_dependencies(module):
        if _is_loaded(session, each.name) and "D" not in options:
            continue
        given = " ".join(parameters) if each.name == module.name else ""
        if "D" in options or "v" in options:
            session.print(f"insmod {each.path} {given}")
        if "n" in options or "D" in options:
            continue
        if number := _init_module(session, each, given):
            session.error(f"could not insert '{module.name}': {_probe_strerror(number)}")
            return FAILURE
    return SUCCESS


def insmod(session: Session, arguments: Sequence[str]) -> int:
    """Load the module in a file, with parameters."""
    options = read_options(arguments, "fsvVh", {"force": "f", "syslog": "s", "verbose": "v", "version": "V"})
    if "V" in options:
        session.print(KMOD_VERSION)
        return SUCCESS
    if not options.arguments:
        session.error("missing filename.")
        return FAILURE
    name, *parameters = options.arguments
    path = Path(session.directory) / name
    if not path.is_file():
        reason = errno.EISDIR if path.is_dir() else errno.ENOENT
        session.error(f"could not load module {name}: {os.strerror(reason)}")
        return FAILURE
    if number := _init_module(session, ModuleFile(path), " ".join(parameters)):
        session.error(f"could not insert module {name}: {_insmod_strerror(number)}")
        return FAILURE
    return SUCCESS


def rmmod(session: Session, arguments: Sequence[str]) -> int:
    """Remove modules that nobody uses."""
    options = read_options(arguments, "fsvVwh", {"force": "f", "syslog": "s", "verbose": "v", "version": "V"})
    if "V" in options:
        session.print(KMOD_VERSION)
        return SUCCESS
    if not options.arguments:
        session.error("missing module name.")
        return FAILURE
    status = SUCCESS
    for given in options.arguments:
        name = plain_name(given.rpartition("/")[2].removesuffix(".ko") if "/" in given else given)
        if not _may_be_removed(session, name, session.error):
            status = FAILURE
        elif number := _delete_module(session, name):
            session.error(f"could not remove '{name}': {os.strerror(number)}")
            session.error(f"could not remove module {given}: {os.strerror(number)}")
            status = FAILURE
    return status


def lsmod(session: Session, arguments: Sequence[str]) -> int:
    """The loaded modules, the newest first."""
    if arguments:
        session.err.append("Usage: lsmod\n")
        return FAILURE
    session.print("Module                  Size  Used by")
    loaded = session.user_space.kernel.machine.modules.objects
    for name in reversed([each for each in loaded if each]):
        users = ",".join(_holders(session, name))
        size = loaded[name].placement.size
        session.print(f"{name:<19} {size:8}  {_refcnt(session, name)} {users}")
    return SUCCESS


def modinfo(session: Session, arguments: Sequence[str]) -> int:
    """What modules say of themselves, signatures left out."""
    options = read_options(
        arguments,
        "adlpn0F:k:b:Vh",
        {
            "author": "a",
            "description": "d",
            "license": "l",
            "parameters": "p",
            "filename": "n",
            "null": "0",
            "field=": "F",
            "version": "V",
        },
    )
    if "V" in options:
        session.print(KMOD_VERSION)
        return SUCCESS
    if not options.arguments:
        session.error("missing module or filename.")
        return FAILURE
    short = {"a": "author", "d": "description", "l": "license", "p": "parm", "n": "filename"}
    wanted = next((word for letter, word in short.items() if letter in options), options.given.get("F", ""))
    end = "\0" if "0" in options else "\n"
    status = SUCCESS
    for name in options.arguments:
        path = Path(session.directory) / name
        module = ModuleFile(path) if path.is_file() else session.modules.find(name)
        if module is None:
            session.error(f"Module {name} not found.")
            status = FAILURE
            continue
        for key, value in [("filename", str(module.path)), *module.fields()]:
            if not wanted:
                plain = end == "\0" and key not in ("filename", "parm")
                shown = f"{key}={value}" if plain else f"{key}:{'':{max(0, 15 - len(key))}}{value}"
                session.out.append(f"{shown}{end}")
            elif key == wanted:
                session.out.append(f"{value}{end}")
    return status


def _remove_named(session: Session, given: str, *, dry: bool) -> int:
    """modprobe -r: of a module that is not loaded nothing is said."""
    name = plain_name(given)
    if not _is_loaded(session, name):
        if session.modules.find(name) is not None:
            return SUCCESS
        session.fatal(f"Module {given} not found.")
        return FAILURE
    if _holders(session, name) or _refcnt(session, name):
        session.fatal(f"Module {name} is in use.")
        return FAILURE
    if not dry and (number := _delete_module(session, name)):
        session.fatal(f"Error removing module {name}: {os.strerror(number)}")
        return FAILURE
    return SUCCESS


def _may_be_removed(session: Session, name: str, say: Any) -> bool:
    """check_module_inuse() of rmmod."""
    if not _is_loaded(session, name):
        say(f"Module {name} is not currently loaded")
        return False
    if holders := _holders(session, name):
        say(f"Module {name} is in use by: {' '.join(holders)}")
        return False
    if _refcnt(session, name) > 0:
        say(f"Module {name} is in use")
        return False
    return True


def _is_loaded(session: Session, name: str) -> bool:
    return bool(name) and name in session.user_space.kernel.machine.modules.objects


def _holders(session: Session, name: str) -> list[str]:
    """The modules that use a module."""
    modules = session.user_space.kernel.machine.modules
    return sorted(each for each in modules.objects if each and name in modules.uses(each))


def _refcnt(session: Session, name: str) -> int:
    """What /sys/module/NAME/refcnt shows."""
    path = f"/sys/module/{name}/refcnt"
    kernfs = session.user_space.kernel.machine.kernfs
    if not kernfs.exists(path):
        return 0
    return int(session.user_space.kernel.read(path))


def _init_module(session: Session, module: ModuleFile, parameters: str) -> int:
    """finit_module(2); returns the errno, 0 if the module is loaded."""
    kernel = session.user_space.kernel
    if _is_loaded(session, module.name):
        return errno.EEXIST
    return _errno_of(session, lambda: kernel.modprobe(module.path, parameters))


def _delete_module(session: Session, name: str) -> int:
    """delete_module(2); returns the errno, 0 if the module is gone."""
    return _errno_of(session, lambda: session.user_space.kernel.rmmod(name))


def _errno_of(session: Session, body: Any) -> int:
    try:
        body()
    except KernelErrno as error:
        return error.number
    except KlpemuError as error:
        session.user_space.report(error)
        found = (number for kind, number in _ERRNOS.items() if isinstance(error, kind))
        return next(found, errno.EIO)
    return 0


def _probe_strerror(number: int) -> str:
    if number == errno.EEXIST:
        return "Module already in kernel"
    if number == errno.ENOENT:
        return "Unknown symbol in module, or unknown parameter (see dmesg)"
    return os.strerror(number)


def _insmod_strerror(number: int) -> str:
    return {
        errno.ENOEXEC: "Invalid module format",
        errno.ENOENT: "Unknown symbol in module",
        errno.ESRCH: "Module has wrong symbol version",
        errno.EINVAL: "Invalid parameters",
    }.get(number, os.strerror(number))
