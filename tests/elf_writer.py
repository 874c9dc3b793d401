"""Writes small ELF64 files byte by byte: a test says exactly what is in them and needs no compiler."""

from dataclasses import dataclass
from struct import pack

SHT_NULL, SHT_PROGBITS, SHT_SYMTAB, SHT_STRTAB, SHT_RELA, SHT_NOBITS, SHT_REL, SHT_XINDEX = (
    0,
    1,
    2,
    3,
    4,
    8,
    9,
    18,
)
ALLOC, EXEC = 2, 4
GLOBAL_FUNC, LOCAL_SECTION, GLOBAL_NOTYPE = 0x12, 0x03, 0x10


@dataclass
class Section:
    name: str
    data: bytes = b""
    type: int = SHT_PROGBITS
    flags: int = ALLOC
    address: int = 0
    link: int = 0
    info: int = 0
    alignment: int = 1
    entry_size: int = 0
    size: int | None = None
    offset: int | None = None


def elf_file(*sections: Section, type: int = 1, entry: int = 0) -> bytes:
    """The given sections as numbers 1, 2, ..., then `.shstrtab`, then the section header table."""
    names, name_offsets = bytearray(b"\0"), []
    every = [*sections, Section(".shstrtab", type=SHT_STRTAB, flags=0)]
    for section in every:
        name_offsets.append(len(names))
        names += section.name.encode() + b"\0"
    every[-1].data = bytes(names)
    body, headers = bytearray(64), bytearray()
    count = len(every) + 1
    large = count >= 0xFF00  # gABI: then the numbers stand in section 0
    headers += pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, count if large else 0, count - 1 if large else 0, 0, 0, 0)
    for name_offset, section in zip(name_offsets, every, strict=True):
        headers += pack(
            "<IIQQQQIIQQ",
            name_offset,
            section.type,
            section.flags,
            section.address,
            len(body) if section.offset is None else section.offset,
            len(section.data) if section.size is None else section.size,
            section.link,
            section.info,
            section.alignment,
            section.entry_size,
        )
        body += section.data
    numbers = (0, 0xFFFF) if large else (count, count - 1)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    body[:64] = ident + pack("<HHIQQQIHHHHHH", type, 62, 1, entry, 0, len(body), 0, 64, 0, 0, 64, *numbers)
    return bytes(body + headers)


def symbols(*entries: tuple[str, int, int, int, int]) -> tuple[bytes, bytes]:
    """Contents of `.symtab` and `.strtab` from (name, info, section, value, size), after the null symbol."""
    table, strings = bytearray(24), bytearray(b"\0")
    for name, info, section, value, size in entries:
        table += pack("<IBBHQQ", len(strings) if name else 0, info, 0, section, value, size)
        strings += name.encode() + b"\0" if name else b""
    return bytes(table), bytes(strings)


def rela(*entries: tuple[int, int, int, int]) -> bytes:
    """Contents of a RELA section from (offset, type, symbol index, addend)."""
    return b"".join(
        pack("<QQq", offset, index << 32 | kind, addend) for offset, kind, index, addend in entries
    )


def module(
    text: bytes, text_rela: bytes, entries: tuple[tuple[str, int, int, int, int], ...], *more: Section
) -> bytes:
    """ET_REL: 1 `.text`, 2 `.rela.text`, 3 `.symtab`, 4 `.strtab`, and `more` from 5 on."""
    table, strings = symbols(*entries)
    return elf_file(
        Section(".text", text, flags=ALLOC | EXEC, alignment=16),
        Section(".rela.text", text_rela, SHT_RELA, 0, link=3, info=1, entry_size=24, alignment=8),
        Section(".symtab", table, SHT_SYMTAB, 0, link=4, entry_size=24, alignment=8),
        Section(".strtab", strings, SHT_STRTAB, 0),
        *more,
    )
