"""The commands of a recording, carried out on an emulated kernel."""

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elf.errors import KlpemuError
from emu.errno import KernelErrno
from klpemu import kmod
from klpemu.command import Session, UsageError
from klpemu.kernel import Kernel
from klpemu.module_tree import ModuleFile, ModuleTree
from klpemu.recording import Command
from klpemu.snapshot import LIVEPATCH
from klpemu.system_commands import sysctl
from klpemu.user_space import UserSpace

__all__ = ["ReplayCommands", "Result", "parse"]

_PATCH_STATE: Final = re.compile(r"/proc/(\d+)/patch_state")


@dataclass(frozen=True, slots=True)
class Result:
    """The exit status of a command, and the lines it printed."""

    rc: int = 0
    out: tuple[str, ...] = ()


def parse(command: Command, place: str) -> list[str]:
    """The words of a command; raises KlpemuError if it is none that can be replayed."""
    try:
        words = shlex.split(command.cmd)
    except ValueError as error:
        raise KlpemuError(f"'{command.cmd}': {error}", where=place) from None
    form = _FORMS.get(words[0] if words else "")
    if form is None:
        raise KlpemuError(
            f"'{command.cmd}' cannot be replayed", where=place, advice=f"there are {', '.join(_FORMS)}"
        )
    if not re.fullmatch(form, " ".join(words)):
        raise KlpemuError(f"'{command.cmd}' cannot be replayed: not of the form {form}", where=place)
    return words


_FORMS: Final = {
    "insmod": r"insmod \S+( \S+=.*)*",
    "modprobe": r"modprobe( -\w)* \S+( \S+=.*)*",
    "rmmod": r"rmmod \S+",
    "echo": r"echo( -n)? .*>>? ?/\S+",
    "cat": r"cat /\S+",
    "head": r"head -(n ?)?\d+ /\S+",
    "ls": r"ls /\S+",
    "sysctl": r"sysctl .+",
    "sleep": r"sleep \d+(\.\d+)?",
    "transition-complete": r"transition-complete \S+",
    "gone": r"gone \S+",
    "task": r"task \S+( .*)?",
}


class ReplayCommands:
    """Carries commands out; `wait(condition)` lets virtual time go by, and says whether it came to hold.

    `task` is not among them: it looks at a task (klpemu/replay.py).
    """

    def __init__(
        self, kernel: Kernel, modules: ModuleTree, wait: Callable[[Callable[[], bool]], bool]
    ) -> None:
        self._kernel = kernel
        self._modules = modules
        self._user_space = UserSpace(kernel)
        self._wait = wait

    def run(self, words: Sequence[str]) -> Result:
        """Carry out a command that `parse` has let through."""
        name, arguments = words[0].replace("-", "_"), list(words[1:])
        perform: Callable[[list[str]], Result] = getattr(self, f"_{name}")
        return perform(arguments)

    def module(self, name: str) -> ModuleFile:
        """The file of a module that a recording names; raises KlpemuError if it is nowhere."""
        found = self._modules.find(Path(name).name.removesuffix(".ko"))
        if found is None:
            raise KlpemuError(
                f"there is no module '{name}'", advice="--modules DIR says where to look for modules"
            )
        return found

    def _insmod(self, arguments: list[str]) -> Result:
        path = str(self.module(arguments[0]).path)
        result = self._kmod(kmod.insmod, [path, *arguments[1:]], "insmod")
        return Result(result.rc, tuple(line.replace(path, arguments[0]) for line in result.out))

    def _modprobe(self, arguments: list[str]) -> Result:
        return self._kmod(kmod.modprobe, arguments, "modprobe")

    def _rmmod(self, arguments: list[str]) -> Result:
        return self._kmod(kmod.rmmod, arguments, "rmmod")

    def _sysctl(self, arguments: list[str]) -> Result:
        return self._kmod(sysctl, arguments, "sysctl")

    def _kmod(
        self, command: Callable[[Session, Sequence[str]], int], arguments: list[str], name: str
    ) -> Result:
        session = Session(name, self._user_space, self._modules)
        try:
            rc = command(session, arguments)
        except UsageError as error:
            return Result(1, (f"{name}: {error}",))
        return Result(rc, tuple("".join([*session.out, *session.err]).splitlines()))

    def _echo(self, arguments: list[str]) -> Result:
        text, path = re.fullmatch(r"(.*?)\s*>>?\s*(/\S+)", " ".join(arguments)).groups()  # type: ignore[union-attr]  # parse() has matched it
        end = "" if text.startswith("-n ") else "\n"
        return self._guarded(lambda: self._kernel.write(path, text.removeprefix("-n ") + end))

    def _cat(self, arguments: list[str]) -> Result:
        return self._guarded(lambda: self._read(arguments[0]))

    def _head(self, arguments: list[str]) -> Result:
        count = int("".join(arguments[:-1]).lstrip("-n "))
        return self._guarded(lambda: self._read(arguments[-1])[:count])

    def _ls(self, arguments: list[str]) -> Result:
        return self._guarded(lambda: sorted(self._kernel.machine.kernfs.listdir(arguments[0].rstrip("/"))))

    def _sleep(self, arguments: list[str]) -> Result:
        self._kernel.tasks.run(int(float(arguments[0]) * 1000))
        return Result()

    def _transition_complete(self, arguments: list[str]) -> Result:
        path = f"{LIVEPATCH}/{arguments[0]}/transition"
        files = self._kernel.machine.kernfs
        return Result(int(not self._wait(lambda: not files.exists(path) or self._kernel.read(path) == "0\n")))

    def _gone(self, arguments: list[str]) -> Result:
        path = f"{LIVEPATCH}/{arguments[0]}"
        return Result(int(not self._wait(lambda: not self._kernel.machine.kernfs.exists(path))))

    def _read(self, path: str) -> list[str]:
        if found := _PATCH_STATE.fullmatch(path):
            for task in self._kernel.klp.tasks():
                if task.pid == int(found[1]):
                    return [str(task.patch_state)]
        return self._kernel.read(path).splitlines()

    def _guarded(self, body: Callable[[], Sequence[str] | None]) -> Result:
        """What the kernel refuses is an exit status, and what the errno means."""
        try:
            return Result(0, tuple(body() or ()))
        except KernelErrno as error:
            return Result(1, (os.strerror(error.number),))
