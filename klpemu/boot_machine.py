"""Booting a machine with a kernel: the built-in one, another relocatable object, or a linked image.

A linked image (what is installed as /boot/vmlinuz-RELEASE, or an ELF vmlinux) redirects calls with its own
compiled code, unless ours is asked for.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Final

from elf.errors import KlpemuError
from elf.image import ET_REL, Image
from emu.cpu_features import cpu_named
from emu.machine import Machine
from emu.start_kernel import LinkedImage
from klpemu.fixtures import BUILTIN_KERNEL, fixture, locate
from klpemu.kernel_image import open_kernel_image
from patches import exports
from patches.handler import append_klp_ftrace_handler

__all__ = ["DEFAULT_CPU", "HANDLERS", "OWN", "boot_machine"]

# Whose ftrace_caller, list function and klp_ftrace_handler a redirected call runs through.
DEFAULT_CPU: Final = "qemu64"
KERNEL, OWN = HANDLERS = ("kernel", "own")


def boot_machine(
    path: str | PathLike[str] | None = None,
    *,
    cpus: int = 1,
    handler: str | None = None,
    cpu: str = DEFAULT_CPU,
    command_line: str = "",
    system_map: str | PathLike[str] | None = None,
) -> Machine:
    """Boot the kernel in a file, by default the built-in one.  `handler` is one of HANDLERS.

    `cpu` names a kind of CPU (emu/cpu_features.py), `command_line` has kernel options about mitigations:
    the two decide what becomes of text when it is loaded.  `system_map` has the symbols of a linked image, in
    place of its own.

    Raises KlpemuError if the file is no kernel, or has no handler of its own where that is asked for.
    """
    if handler is not None and handler not in HANDLERS:
        raise KlpemuError(f"no handler is called '{handler}'", advice=f"there are {', '.join(HANDLERS)}")
    kind = cpu_named(cpu)
    file = fixture(BUILTIN_KERNEL) if path is None else locate(fspath(path))
    if _is_relocatable(file):
        if system_map is not None:
            raise KlpemuError(
                "a relocatable kernel has its own symbols", where=str(file), advice="leave the System.map out"
            )
        if handler == KERNEL:
            raise KlpemuError(
                "a relocatable kernel has no compiled klp_ftrace_handler",
                where=str(file),
                advice="leave the handler out, or give a linked image (vmlinuz)",
            )
        return Machine(
            Image.open(file),
            entry_code=(append_klp_ftrace_handler,),
            stubs=_stubs(),
            cpus=cpus,
            cpu=kind,
            command_line=command_line,
        )
    with _without_collector():
        found = open_kernel_image(file, system_map=system_map)
        linked = LinkedImage(found.image, found.symbols, found.layouts)
        entry = (append_klp_ftrace_handler,) if handler == OWN else ()
        return Machine(
            linked, entry_code=entry, stubs=_stubs(), cpus=cpus, cpu=kind, command_line=command_line
        )


@contextmanager
def _without_collector() -> Iterator[None]:
    """A kernel's tables are hundreds of thousands of objects and no garbage: looking for some takes time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _stubs() -> tuple[str, ...]:
    """What livepatch answers: complete only when all files have entered their functions."""
    return ("klp_enable_patch", *exports.KLP_EXPORTS)


def _is_relocatable(file: Path) -> bool:
    """An ELF file of type ET_REL, or one that cannot be read, which reading it will tell."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(18)
    except OSError:
        return True
    return head[:4] == b"\x7fELF" and int.from_bytes(head[16:18], "little") == ET_REL
