"""What `klpemu info` prints: a livepatch module as lines of text, and as the JSON object."""

from typing import Any

from elf.relocation import type_name
from klpemu.fixtures import shown
from klpemu.info import FuncInfo, ObjectInfo, PatchInfo
from klpemu.info_code import CodeLine, Reference
from klpemu.output import Output
from patches.livepatch import VMLINUX

__all__ = ["info_object", "print_info"]

MODINFO = ("license", "author", "description", "version", "depends", "vermagic")
CODE_COLUMN = 30  # ten bytes of machine code
TEXT_COLUMN = 44


def print_info(output: Output, info: PatchInfo, *, code: bool) -> None:
    """All of a livepatch module; `code`: with the instructions of its functions."""
    output.line((shown(info.path), "bold"))
    output.fact("name", info.name)
    for key in MODINFO:
        for value in info.modinfo.get(key, []):
            # The kernel's vermagic ends in a space.
            output.fact(key, *([value.strip()] if value else [("nothing", "dim")]))
    for name, kind, description in info.parameters:
        output.fact("parameter", f"{name} ({kind})" if kind else name, f"  {description}")
    if info.declared:
        output.fact("replace", "yes: every older patch" if info.replace else "no")
        states = ", ".join(f"{id} (version {version})" for id, version in info.states)
        output.fact("states", *([states] if states else [("none", "dim")]))
    for name in info.missing:
        output.fact("missing", (f"{name}: this kernel does not export it", "yellow"))
    for problem in info.problems:
        output.fact("problem", (problem, "yellow"))
    for obj in info.objects:
        _print_object(output, obj)
    _print_references(output, info)
    if code:
        for obj in info.objects:
            for func in obj.functions:
                _print_code(output, obj, func)


def _print_object(output: Output, obj: ObjectInfo) -> None:
    output.heading(f"Object {obj.name}")
    if not obj.loaded:
        output.line(("not loaded: it is patched when it comes", "yellow"), indent=2)
    names = ", ".join(f"{name}: {place}" for name, place in obj.callbacks.items())
    output.fact("callbacks", *([names] if names else [("none", "dim")]))
    for func in obj.functions:
        name = f"{func.old},{func.sympos}" if func.sympos else func.old
        output.line(name, (" -> ", "dim"), func.new, indent=2)
        if func.problem:
            output.line((func.problem, "yellow"), indent=6, hang=0)
        elif func.place:
            output.line((f"replaces {func.place}, fentry site at {func.site}", "dim"), indent=6, hang=0)


def _print_references(output: Output, info: PatchInfo) -> None:
    if not info.references:
        output.line()
        output.line("no klp relocations")
    for section, references in info.references.items():
        objname = references[0].objname if references else ""
        when = "when the patch is loaded" if objname == VMLINUX else f"when {objname} is there"
        output.heading(section)
        plural = "" if len(references) == 1 else "s"
        output.line((f"{len(references)} klp relocation{plural}, written {when}", "dim"), indent=2)
        for each in references:
            kind, symbol = type_name(each.relocation.type), each.symbol
            addend = f"{each.relocation.addend:+#x}" if each.relocation.addend else ""
            output.line(f"{each.place}  {kind}  {symbol}{addend}  ", _resolved(each), indent=2, hang=4)


def _resolved(each: Reference) -> str | tuple[str, str]:
    if each.problem:
        return (f"not resolved: {each.problem}", "yellow")
    return (f"= {each.address:#x} {each.resolved}", "green")


def _print_code(output: Output, obj: ObjectInfo, func: FuncInfo) -> None:
    output.heading(func.new)
    output.line((f"instead of {func.old} of {obj.name}", "dim"), indent=2)
    for each in func.code:
        bytes_ = "" if output.narrow else f"{each.instruction.code.hex(' '):<{CODE_COLUMN}} "
        text = f"{each.text:<{TEXT_COLUMN}}" if each.comment else each.text
        comment = f"# {each.comment}" if each.comment else ""
        output.line(bytes_, text, (comment, "green"), label=f"+{each.offset:<#7x}", indent=2)


def info_object(info: PatchInfo) -> dict[str, Any]:
    """All of a livepatch module; what it does not have is an empty list, or null."""
    return {
        "holds": info.holds,
        "file": shown(info.path),
        "name": info.name,
        "modinfo": info.modinfo,
        "parameters": [
            {"name": name, "type": kind or None, "description": description or None}
            for name, kind, description in info.parameters
        ],
        "declared": info.declared,
        "replace": info.replace if info.declared else None,
        "states": [{"id": id, "version": version} for id, version in info.states],
        "missing": list(info.missing),
        "problems": list(info.problems),
        "objects": [_object_object(each) for each in info.objects],
        "klp_relocations": [
            _reference_object(section, each) for section, some in info.references.items() for each in some
        ],
    }


def _object_object(obj: ObjectInfo) -> dict[str, Any]:
    return {
        "name": obj.name,
        "loaded": obj.loaded,
        "callbacks": obj.callbacks,
        "functions": [
            {
                "function": func.old,
                "sympos": func.sympos,
                "place": func.place or None,
                "site": func.site or None,
                "problem": func.problem or None,
                "replacement": func.new,
                "address": f"{func.new_address:#x}",
                "instructions": [_line_object(each) for each in func.code],
            }
            for func in obj.functions
        ],
    }


def _line_object(line: CodeLine) -> dict[str, Any]:
    return {
        "offset": line.offset,
        "bytes": line.instruction.code.hex(),
        "text": line.text,
        "comment": line.comment or None,
    }


def _reference_object(section: str, each: Reference) -> dict[str, Any]:
    return {
        "section": section,
        "object": each.objname,
        "place": each.place,
        "type": type_name(each.relocation.type),
        "symbol": each.symbol,
        "addend": each.relocation.addend,
        "address": f"{each.address:#x}" if each.address else None,
        "resolved": each.resolved or None,
        "problem": each.problem or None,
        "is_due": each.is_due,
    }
