"""The text of an object as the loader leaves it: sites are NOPs, and what nobody may write any more."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from elf.errors import ElfError
from elf.image import Image
from elf.mcount import Site, SiteKind, functions_at
from emu.paging import Access
from emu.placement import Group, Placement
from emu.text_poke import CALL_OPCODE, NOP5, text_gen_insn

__all__ = ["Text", "convert_sites", "refuse_bad_sites", "texts_of"]


@dataclass(frozen=True, slots=True)
class Text:
    """Pages that are not writable, as the file and its relocations give them, before any site was touched."""

    name: str
    address: int
    contents: bytes = field(repr=False)


def refuse_bad_sites(image: Image, sites: Iterable[Site]) -> None:
    """Refuse an object one of whose records is neither the call nor one 5-byte NOP."""
    bad = [site for site in sites if site.kind is SiteKind.OTHER]
    if bad:
        names = functions_at(image, bad[:1])[0]
        where = f"{names[0].name}+{bad[0].address - names[0].value:#x}" if names else f"{bad[0].address:#x}"
        raise ElfError(
            f"no usable fentry site: {bad[0].reason}",
            where=f"{image.path}: {where}",
            advice="the object was not built for ftrace on x86-64",
        )


def convert_sites(placement: Placement, sites: Iterable[Site], fentry: int) -> list[int]:
    """Turn each `call __fentry__` into a NOP in the relocated bytes; returns the sites' addresses."""
    addresses = []
    for site in sites:
        section = placement.image.sections[site.section]
        base = placement.addresses.get(site.section)
        if base is None:
            continue  # a section that is not loaded
        data = placement.contents[site.section]
        found = bytes(data[site.offset : site.offset + 5])
        wanted = (
            text_gen_insn(CALL_OPCODE, base + site.offset, fentry) if site.kind is SiteKind.CALL else NOP5
        )
        if found != wanted:
            raise ElfError(
                f"the fentry site holds {found.hex(' ')}, expected {wanted.hex(' ')}",
                where=placement.image.place(f"{section.name}+{site.offset:#x}"),
            )
        data[site.offset : site.offset + 5] = NOP5
        addresses.append(base + site.offset)
    return addresses


def texts_of(placement: Placement, name: str) -> list[Text]:
    """What nobody may write of a relocated object: text and read-only data, the gaps included.

    Data that is read-only only after init may be anything by then: it is none of this.
    """
    return [
        _text_of(placement, group, name) for group in placement.groups if group.access is not Access.WRITE
    ]


def _text_of(placement: Placement, group: Group, name: str) -> Text:
    data = bytearray(group.size)
    for index, address in placement.addresses.items():
        if group.start <= address < group.start + group.size and index in placement.contents:
            start = address - group.start
            data[start : start + len(placement.contents[index])] = placement.contents[index]
    kind = "text" if group.access is Access.EXECUTE else "rodata"
    return Text(f"{name or 'vmlinux'}:{'init.' if group.init else ''}{kind}", group.start, bytes(data))
