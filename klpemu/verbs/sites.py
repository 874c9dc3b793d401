"""`klpemu sites`: the fentry sites of ELF files, and why some are none."""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from elf.errors import ElfError, KlpemuError
from elf.image import Image
from elf.mcount import Site, SiteKind, fentry_sites, functions_at, patchable_sites
from klpemu.fixtures import locate, shown
from klpemu.output import Output, print_error
from klpemu.report import FINDINGS
from klpemu.verbs.options import output_options

__all__ = ["sites"]

KINDS = {
    SiteKind.CALL: "call __fentry__",
    SiteKind.NOP5: "nop5",
    SiteKind.PADDING: "padding, no site on x86",
    SiteKind.OTHER: "refused",
}


@dataclass(frozen=True, slots=True)
class _FoundSite:
    """A site with its names: `place` is section+offset or an address, `functions` are sym+offset/size."""

    site: Site
    section: str
    place: str
    functions: tuple[str, ...]


@click.command(short_help="Fentry sites of ELF files.")
@click.argument("files", nargs=-1, required=True, type=locate, metavar="FILE...")
@click.option("--summary", is_flag=True, help="One line a file instead of one a site.")
@output_options
def sites(files: tuple[Path, ...], summary: bool, as_json: bool, color: str) -> None:
    """List the fentry sites of ELF files: where they are, in which function, and what their five bytes are.

    FILE is an x86-64 object, module, executable or shared object; in a directory all .ko files are read.
    Addresses are section+offset in objects and modules, virtual addresses otherwise.  What is in
    __patchable_function_entries is listed as padding: an x86 kernel never patches it.

    Exit status: 0, or 1 if a site is refused, 2 if a file cannot be read (the others are listed all the same;
    with --json nothing is printed then).
    """
    output = Output("sites", as_json=as_json, color=color)
    paths, failed = _paths(files)
    totals: Counter[SiteKind] = Counter()
    objects: list[dict[str, Any]] = []
    for path in output.track(paths, "reading"):
        try:
            found = _sites_of(Image.open(path))
        except KlpemuError as error:
            print_error(error)
            failed = True
            continue
        kinds = Counter(each.site.kind for each in found)
        totals += kinds
        output.line((shown(path), "bold"), f": {_count(kinds)}")
        if not summary:
            _print_sites(output, found)
        if as_json:
            objects.append(_file_object(path, found, kinds, summary=summary))
    if len(paths) > 1:
        output.line()
        output.line((f"{len(paths)} files: {_count(totals)}", "bold"))
    if failed:
        sys.exit(2)
    output.finish({"holds": not totals[SiteKind.OTHER], "totals": _totals(totals), "files": objects})
    sys.exit(FINDINGS if totals[SiteKind.OTHER] else 0)


def _paths(files: tuple[Path, ...]) -> tuple[list[Path], bool]:
    """The files to read, and whether a directory had none."""
    paths: list[Path] = []
    failed = False
    for file in files:
        if not file.is_dir():
            paths.append(file)
            continue
        modules = sorted(each for each in file.rglob("*.ko") if each.is_file())
        if not modules:
            print_error(ElfError("no .ko file in this directory", where=str(file), advice="name the files"))
            failed = True
        paths += modules
    return paths, failed


def _sites_of(image: Image) -> list[_FoundSite]:
    found = [*fentry_sites(image), *patchable_sites(image)]
    named = functions_at(image, found)
    return [
        _FoundSite(
            site,
            image.sections[site.section].name,
            f"{image.sections[site.section].name}+{site.offset:#x}"
            if image.is_relocatable
            else f"{site.address:#x}",
            tuple(f"{each.name}+{site.address - each.value:#x}/{each.size:#x}" for each in functions),
        )
        for site, functions in zip(found, named, strict=True)
    ]


def _print_sites(output: Output, found: list[_FoundSite]) -> None:
    places = max((len(each.place) for each in found), default=0)
    names = max((len(", ".join(each.functions)) for each in found), default=0)
    narrow = output.narrow
    for each in found:
        site = each.site
        place, functions = each.place, ", ".join(each.functions) or "(no function)"
        if not narrow:
            place, functions = f"{place:{places}}", f"{functions:{max(names, 13)}}"
        style = {SiteKind.OTHER: "red", SiteKind.PADDING: "dim"}.get(site.kind, "green")
        output.line(
            place, "  ", functions, "  ", f"{site.code.hex(' '):14}  ", (KINDS[site.kind], style), indent=2
        )
        if site.reason:
            output.line(site.reason, indent=6, hang=0)


def _count(kinds: Counter[SiteKind]) -> str:
    """`32 sites: 30 call __fentry__, 2 nop5`, with the padding apart."""
    total = sum(kinds.values()) - kinds[SiteKind.PADDING]
    parts = [
        f"{kinds[kind]:,} {KINDS[kind]}" for kind in SiteKind if kinds[kind] and kind is not SiteKind.PADDING
    ]
    text = f"{total:,} site{'' if total == 1 else 's'}" if total else "no fentry site"
    text += f" ({', '.join(parts)})" if parts else ""
    padding = kinds[SiteKind.PADDING]
    return text + (f", {padding:,} of padding, which x86 kernels do not patch" if padding else "")


def _totals(kinds: Counter[SiteKind]) -> dict[str, int]:
    names = {
        SiteKind.CALL: "call",
        SiteKind.NOP5: "nop5",
        SiteKind.OTHER: "refused",
        SiteKind.PADDING: "padding",
    }
    return {name: kinds[kind] for kind, name in names.items()}


def _file_object(
    path: Path, found: list[_FoundSite], kinds: Counter[SiteKind], *, summary: bool
) -> dict[str, Any]:
    rows = [] if summary else [_site_object(each) for each in found]
    return {"file": shown(path), "totals": _totals(kinds), "sites": rows}


def _site_object(found: _FoundSite) -> dict[str, Any]:
    site = found.site
    return {
        "place": found.place,
        "section": found.section,
        "offset": site.offset,
        "address": f"{site.address:#x}",
        "functions": list(found.functions),
        "bytes": site.code.hex(),
        "kind": "refused" if site.kind is SiteKind.OTHER else site.kind.value,
        "reason": site.reason or None,
    }
