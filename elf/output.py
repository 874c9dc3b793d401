"""Writing ELF64 x86-64 files: their headers and notes as bytes, and files that appear whole or not at all.

Source of the layouts: System V gABI, chapters 4 ("ELF Header", "Section Header") and 5 ("Program Header",
"Note Section"); the parts of a note are padded to 4 bytes, as Linux and binutils have it.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from struct import Struct, pack
from typing import Final

from elf.errors import KlpemuError
from elf.image import EM_X86_64
from elf.section import SECTION_HEADER

__all__ = [
    "ET_CORE",
    "PF_R",
    "PF_W",
    "PF_X",
    "PT_LOAD",
    "PT_NOTE",
    "Segment",
    "file_header",
    "note",
    "write_file",
]

ET_CORE: Final = 4
PT_LOAD: Final = 1
PT_NOTE: Final = 4
PF_X: Final = 1
PF_W: Final = 2
PF_R: Final = 4

FILE_HEADER: Final = Struct("<4sBBB9xHHIQQQIHHHHHH")
PROGRAM_HEADER: Final = Struct("<IIQQQQQQ")
# gABI: e_phnum 0xffff (PN_XNUM) and section numbers from SHN_LORESERVE on mean something else.
MAX_SEGMENTS: Final = 0xFFFE
MAX_SECTIONS: Final = 0xFEFF


@dataclass(frozen=True, slots=True)
class Segment:
    """One program header: `size` bytes at file offset `offset`, of the same size in memory.

    `virtual` and `physical` are guest addresses; both are 0 for notes.
    """

    type: int
    flags: int
    offset: int
    size: int
    virtual: int = 0
    physical: int = 0
    alignment: int = 4

    def header(self) -> bytes:
        """The `Elf64_Phdr`."""
        return PROGRAM_HEADER.pack(
            self.type,
            self.flags,
            self.offset,
            self.virtual,
            self.physical,
            self.size,
            self.size if self.type == PT_LOAD else 0,
            self.alignment,
        )


def file_header(
    type: int,
    segments: Sequence[Segment],
    *,
    entry: int = 0,
    section_table: int = 0,
    sections: int = 0,
    names: int = 0,
) -> bytes:
    """The ELF header with the program headers right behind it.

    `entry` is a virtual address, `section_table` the file offset of `sections` section headers, `names` the
    index of their string table.
    """
    for count, limit, what in (
        (len(segments), MAX_SEGMENTS, "segments"),
        (sections, MAX_SECTIONS, "sections"),
    ):
        if count > limit:
            raise KlpemuError(f"{count} {what}, one file holds {limit}", advice="load fewer modules")
    header = FILE_HEADER.pack(
        b"\x7fELF",
        2,  # ELFCLASS64
        1,  # ELFDATA2LSB
        1,  # EV_CURRENT
        type,
        EM_X86_64,
        1,  # EV_CURRENT
        entry,
        FILE_HEADER.size,
        section_table,
        0,  # x86-64 has no processor flags
        FILE_HEADER.size,
        PROGRAM_HEADER.size,
        len(segments),
        SECTION_HEADER.size,
        sections,
        names,
    )
    return header + b"".join(segment.header() for segment in segments)


def note(name: str, type: int, descriptor: bytes) -> bytes:
    """One `Elf64_Nhdr` with its name and descriptor."""
    owner = name.encode() + b"\0"
    return b"".join(
        (
            pack("<III", len(owner), len(descriptor), type),
            owner.ljust(-(-len(owner) // 4) * 4, b"\0"),
            descriptor.ljust(-(-len(descriptor) // 4) * 4, b"\0"),
        )
    )


def write_file(path: str | os.PathLike[str], size: int, pieces: Iterable[tuple[int, bytes]]) -> None:
    """Write a file of `size` bytes from pieces, each with its file offset; what no piece covers is zero.

    Until everything is written, `path` is what it was before.
    """
    where = os.fspath(path)
    unfinished = ""
    try:
        target = os.path.realpath(where)
        if os.path.exists(target) and not os.path.isfile(target):
            raise KlpemuError("not a regular file", where=where, advice="give the path of a file to write")
        unfinished = f"{target}.{os.getpid()}.unfinished"
        with suppress(FileNotFoundError):
            os.unlink(unfinished)
        with open(unfinished, "xb") as file:
            for offset, data in pieces:
                file.seek(offset)
                file.write(data)
            file.truncate(size)
        os.replace(unfinished, target)
    except (OSError, ValueError) as error:
        raise KlpemuError(
            f"cannot be written: {getattr(error, 'strerror', None) or error}",
            where=repr(where) if isinstance(error, ValueError) else where,
            advice="give a path in a directory that exists, can be written to and has room",
        ) from error
    finally:
        with suppress(OSError):
            os.unlink(unfinished)
