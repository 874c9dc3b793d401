"""What livepatch exports to modules: include/linux/livepatch.h.

The functions are in the files that the kernel has them in; each enters itself here with `klp_export`, and a
machine with livepatch in it answers calls of them (`connect`).
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from emu.machine import Machine
from emu.traps import ARGUMENTS
from patches.klp import Klp

__all__ = ["KLP_EXPORTS", "connect", "klp_export"]

# By name: gets the livepatch core and the caller's registers, returns RAX.
KLP_EXPORTS: dict[str, Callable[[Klp, dict[str, int]], int | None]] = {}


def klp_export(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """Enter a function; it gets the core and as many integer arguments as it names after that."""
    count = function.__code__.co_argcount - 1

    @wraps(function)
    def answer(klp: Klp, registers: dict[str, int]) -> int | None:
        return function(klp, *(registers[name] for name in ARGUMENTS[:count]))

    KLP_EXPORTS[function.__name__] = answer
    return function


def connect(klp: Klp) -> None:
    """Let guest code of the machine call what is exported."""

    def answer(export: Callable[[Klp, dict[str, int]], int | None], _: Machine, registers: Any) -> int | None:
        return export(klp, registers)

    for name, export in KLP_EXPORTS.items():
        klp.machine.traps.exports[name] = partial(answer, export)
