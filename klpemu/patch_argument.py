"""PATCH on the command line: which file, and which functions it replaces.

    FILE                                a livepatch module, which says so itself
    FILE:PAIR[,PAIR]...[,replace]       any object with replacement functions

    PAIR is [OBJECT:]OLD[,SYMPOS]=NEW

OBJECT is a module's name, vmlinux if it is left out, and holds for its own PAIR only; SYMPOS chooses among
several symbols called OLD, counted from 1.  The word `replace` at the end makes it a cumulative patch that
atomically replaces all older ones.  The patch is named as its file, as a module is.
"""

import re
from collections.abc import Iterable
from typing import Final

from elf.errors import KlpemuError
from elf.image import Image
from emu.module import module_name
from klpemu.fixtures import BUILTIN, STOCK, locate
from patches.livepatch import VMLINUX, Func, Patch

__all__ = ["parse_patch", "parse_patches"]

_SYMBOL: Final = r"[A-Za-z_.$][\w.$]*"
_PAIR: Final = re.compile(rf"(?:(\w+):)?({_SYMBOL})(?:,(\d+))?=({_SYMBOL})")
_PAIRS: Final = re.compile(rf"{_PAIR.pattern}(?:,{_PAIR.pattern})*(,replace)?")
_FORM: Final = "write FILE:old=new[,[object:]old[,sympos]=new]...[,replace]"


def parse_patch(argument: str) -> Patch:
    """The patch that `argument` declares; without pairs `objects` is empty.  Raises `KlpemuError`.

    FILE ends at the first colon behind which only pairs follow, so it may have colons in it.
    """
    for colon in re.finditer(":", argument):
        file, rest = argument[: colon.start()], argument[colon.end() :]
        found = _PAIRS.fullmatch(rest)
        if file and found:
            return _patch(argument, file, rest, replace=found[found.re.groups] is not None)
    if "=" in argument or ":" in _bare(argument) or not _bare(argument):
        raise KlpemuError(_complaint(argument), where=f"PATCH '{argument}'", advice=_FORM)
    return _readable(Patch(module_name(_bare(argument)), code=locate(argument)))


def parse_patches(arguments: Iterable[str]) -> dict[str, Patch]:
    """Several patches by name; two of one name are refused, as two modules of one name are."""
    patches: dict[str, Patch] = {}
    for argument in arguments:
        patch = parse_patch(argument)
        if patch.name in patches:
            raise KlpemuError(
                f"a second patch '{patch.name}'",
                where=f"PATCH '{argument}'",
                advice="a patch is named as its file, and names are unique",
            )
        patches[patch.name] = patch
    return patches


def _bare(name: str) -> str:
    """The name of a file without what says whose it is."""
    return name.removeprefix(BUILTIN).removeprefix(STOCK)


def _patch(argument: str, file: str, pairs: str, *, replace: bool) -> Patch:
    objects: dict[str, list[Func]] = {}
    for objname, old, sympos, new in _PAIR.findall(pairs):
        func = Func(old, new, int(sympos or 0))
        funcs = objects.setdefault(objname or VMLINUX, [])
        if any((each.old, each.sympos or 1) == (old, func.sympos or 1) for each in funcs):
            raise KlpemuError(
                f"'{old}' is replaced twice", where=f"PATCH '{argument}'", advice="name it once"
            )
        funcs.append(func)
    name = re.sub(r"[^A-Za-z0-9_]", "_", module_name(_bare(file)))
    return _readable(Patch(name, objects, locate(file), replace))


def _readable(patch: Patch) -> Patch:
    """The patch, if its code can be read: what is wrong with a file is said before anything is done."""
    assert patch.code is not None
    Image.open(patch.code)
    return patch


def _complaint(argument: str) -> str:
    """Which part of a PATCH with pairs is wrong, as closely as that can be said."""
    file, colon, rest = _bare(argument).partition(":")
    if colon and not file:
        return "no file before the colon"
    if not rest:
        return "no pairs behind the colon" if colon else "no colon between the file and its pairs"
    for part in re.sub(r",(\d+)=", r"#\1=", rest).split(","):
        if part != "replace" and not _PAIR.fullmatch(part.replace("#", ",")):
            return f"'{part.replace('#', ',')}' is no pair old=new"
    return "the word replace must come last"
