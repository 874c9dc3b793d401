"""A kernel that is booted for user space: mounted, with its modules to be found by name."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from klpemu.control import control_files
from klpemu.kernel import Kernel
from klpemu.module_tree import ModuleTree
from klpemu.mount import Mount
from klpemu.system_commands import release_of
from klpemu.user_space import UserSpace

__all__ = ["booted"]


def booted(
    mountpoint: str | os.PathLike[str],
    kernel: str | os.PathLike[str] | None = None,
    *,
    modules: Sequence[Path] = (),
    complain: Callable[[str], None] | None = None,
    **options: Any,
) -> Mount:
    """Boot a kernel image (the built-in one by default) and mount it, once the context is entered.

    `modules` are the directories in which modprobe looks.  Its debug lines are off, as after a real boot.
    `complain` gets what fails in the emulator and has no errno, standard error if it is left out.
    `options` are those of `Kernel.load`.
    """
    mount_at = str(Path(mountpoint).absolute())

    def boot() -> UserSpace:
        running = Kernel.load(kernel, **options)
        running.machine.log.dynamic_debug.boot()
        tree = ModuleTree(modules, release_of(running))
        files = control_files(mount_at, lambda: user_space, lambda: tree)
        user_space = UserSpace(running, files, complain)
        return user_space

    return Mount(boot, mountpoint)
