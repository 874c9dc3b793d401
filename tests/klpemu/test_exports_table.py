"""docs/exports.md says what every export does and leaves out: it is made from their docstrings.

After a change that is meant, this file run with KLPEMU_UPDATE_DOCS=1 writes the table again.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from emu.exports import (
    CANNOT_RUN,
    EXPORTS,
    GUEST_DATA,
    GUEST_EXPORTS,
    SPIN_LOCKS,
    SPIN_UNLOCKS,
    THUNK_REGISTERS,
)
from klpemu import Kernel
from patches.exports import KLP_EXPORTS

DOCUMENT = Path(__file__).parents[2] / "docs" / "exports.md"
HEAD = """\
# What modules can link against

Beside what the image itself defines, and what modules export, the built-in kernel has the functions listed
here.  This file is made from their docstrings (tests/klpemu/test_exports_table.py).

A function that is answered in Python has no code and no stack frame of its own.  It cannot be patched:
enabling such a patch is refused, with a line in the log that begins with `klpemu:`, though a kernel may
accept it.  On a stock image, where a function answered in Python keeps its symbol and its fentry site, the
patch is made, and such a line says that who sleeps in the function cannot be judged.

What the functions below have in common: nothing is modelled of interrupts, lockdep, NUMA and memory pressure.
"""


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def rows(functions: dict[str, Callable[..., Any]]) -> Iterator[str]:
    yield "| function | what it does here, and what it leaves out |"
    yield "|---|---|"
    for name, function in sorted(functions.items(), key=lambda each: each[0].strip("_").lower()):
        yield f"| `{name}` | {cell(function.__doc__ or '')} |"


def by_module(exports: dict[str, Callable[..., Any]]) -> Iterator[str]:
    """A section for each file, with what the file says of itself."""
    for module in sorted({function.__module__ for function in exports.values()}):
        about = (sys.modules[module].__doc__ or "").strip()
        yield f"### {module.replace('.', '/')}.py"
        yield ""
        yield about
        yield ""
        yield from rows({name: each for name, each in exports.items() if each.__module__ == module})
        yield ""


def document() -> str:
    guest = sorted({*GUEST_EXPORTS, *(f"__{name}" for name in GUEST_EXPORTS if name.startswith("mem"))})
    enable = Kernel.load().machine.traps.exports["klp_enable_patch"]
    livepatch = {**KLP_EXPORTS, "klp_enable_patch": enable}
    lines = [
        HEAD,
        "## Run in the guest",
        "",
        "Machine code of ours, in emu/exports.py, without fentry sites, as the kernel's own have none.",
        "",
        f"- memory and strings, thunks: {', '.join(f'`{name}`' for name in guest)}",
        "- locks, which spin and keep the vCPU, but switch no interrupts off: "
        + ", ".join(f"`{name}`" for name in sorted([*SPIN_LOCKS, *SPIN_UNLOCKS])),
        f"- `__x86_indirect_thunk_*`, plain jumps through {', '.join(THUNK_REGISTERS)}",
        f"- variables, all zeroes: {', '.join(f'`{name}`' for name in sorted(GUEST_DATA))}",
        "",
        "## Answered in Python",
        "",
        *by_module(EXPORTS),
        "## Livepatch's own",
        "",
        *rows(livepatch),
        "",
        "## There, but not to be called",
        "",
        "A module that refers to them can be loaded; a call ends with an error that names the caller: "
        + ", ".join(f"`{name}`" for name in sorted(CANNOT_RUN))
        + ".",
        "",
    ]
    return "\n".join(lines)


def test_the_table_is_what_the_docstrings_say() -> None:
    if os.environ.get("KLPEMU_UPDATE_DOCS"):
        DOCUMENT.write_text(document())
    assert DOCUMENT.read_text() == document()


@pytest.mark.parametrize("exports", [EXPORTS, KLP_EXPORTS], ids=["kernel", "livepatch"])
def test_every_export_says_what_it_does(exports: dict[str, Callable[..., Any]]) -> None:
    assert exports
    assert [
        name for name, function in exports.items() if not (function.__doc__ or "").strip().endswith(".")
    ] == []


def test_every_function_that_a_machine_answers_is_in_the_table() -> None:
    text = DOCUMENT.read_text()
    exports = Kernel.load().machine.traps.exports
    assert [name for name in exports if f"| `{name}` |" not in text] == []
