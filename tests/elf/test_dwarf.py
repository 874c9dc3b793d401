"""DWARF written byte by byte: what no compiler writes, and must neither hang nor fool the reader."""

from struct import pack
from zlib import compress

import pytest
from elf_writer import Section, elf_file

from elf.errors import ElfError
from elf.image import Image
from elf.layout import Integer, Member, struct_layouts

UNIT, STRUCT, ANONYMOUS, MEMBER, UNNAMED, INT, TYPEDEF, FLAGS = range(1, 9)
END = b"\0"
FIRST = 12  # the offset of the first entry behind the header (11 bytes) and the entry of the unit

# Abbreviation code: DW_TAG, has children, (DW_AT, DW_FORM)...; forms: data1 0x0b, string 0x08, ref4 0x13.
ABBREVIATIONS: dict[int, tuple[int, int, tuple[int, ...]]] = {
    UNIT: (0x11, 1, ()),
    STRUCT: (0x13, 1, (0x03, 0x08, 0x0B, 0x0B, 0x01, 0x13)),
    ANONYMOUS: (0x13, 1, (0x0B, 0x0B)),
    MEMBER: (0x0D, 0, (0x03, 0x08, 0x49, 0x13, 0x38, 0x0B)),
    UNNAMED: (0x0D, 0, (0x49, 0x13, 0x38, 0x0B)),
    INT: (0x24, 0, (0x0B, 0x0B, 0x3E, 0x0B)),
    TYPEDEF: (0x16, 0, (0x03, 0x08, 0x49, 0x13)),
    FLAGS: (0x24, 0, (0x3F, 0x19) * 60),  # DW_AT_external, DW_FORM_flag_present: takes no byte
}
ABBREV = (
    b"".join(
        bytes([code, tag, children, *specifications, 0, 0])
        for code, (tag, children, specifications) in ABBREVIATIONS.items()
    )
    + END
)
AN_INT = bytes([INT, 4, 5])  # a signed int of four bytes


def struct(name: str, size: int, *members: bytes, sibling: int = 0) -> bytes:
    return (
        bytes([STRUCT]) + name.encode() + END + bytes([size]) + pack("<I", sibling) + b"".join(members) + END
    )


def member(name: str, type_offset: int, offset: int) -> bytes:
    return bytes([MEMBER]) + name.encode() + END + pack("<IB", type_offset, offset)


def unnamed(type_offset: int) -> bytes:
    return bytes([UNNAMED]) + pack("<IB", type_offset, 0)


def typedef(name: str, type_offset: int) -> bytes:
    return bytes([TYPEDEF]) + name.encode() + END + pack("<I", type_offset)


def image_of(*entries: bytes) -> Image:
    body = pack("<HIB", 4, 0, 8) + bytes([UNIT]) + b"".join(entries) + END
    info = pack("<I", len(body)) + body
    return Image.parse(
        elf_file(Section(".debug_info", info, flags=0), Section(".debug_abbrev", ABBREV, flags=0))
    )


def test_a_struct_is_read() -> None:
    layouts = struct_layouts(image_of(AN_INT, struct("s", 8, member("a", FIRST, 0), member("b", FIRST, 4))))
    assert layouts["s"].members == {
        "a": Member("a", 0, Integer(4, signed=True)),
        "b": Member("b", 4, Integer(4, signed=True)),
    }


@pytest.mark.parametrize("sibling", [0, FIRST, FIRST + 3, 2**32 - 1])
def test_where_a_sibling_attribute_points_does_not_matter(sibling: int) -> None:
    """DWARF 5, 2.3: DW_AT_sibling is a shortcut only; a reader that trusts it can go in circles."""
    layouts = struct_layouts(image_of(AN_INT, struct("s", 4, sibling=sibling), struct("t", 4)))
    assert list(layouts) == ["s", "t"]


@pytest.mark.parametrize("distance", [0, 7])
def test_a_typedef_of_itself_is_refused(distance: int) -> None:
    pair = typedef("t", FIRST + distance) + typedef("u", FIRST)
    with pytest.raises(ElfError, match="refers to itself"):
        struct_layouts(image_of(pair))


def test_a_struct_that_holds_itself_is_refused() -> None:
    itself = bytes([ANONYMOUS, 8]) + unnamed(FIRST) + END
    with pytest.raises(ElfError, match="a struct contains itself"):
        struct_layouts(image_of(itself, struct("s", 8, unnamed(FIRST))))


def test_structs_that_double_at_every_level_are_refused() -> None:
    """Forty levels of two empty anonymous members each would be visited a million million times."""
    entries, last = bytes([ANONYMOUS, 8]) + END, FIRST
    for _ in range(40):
        following = FIRST + len(entries)
        entries += bytes([ANONYMOUS, 8]) + unnamed(last) * 2 + END
        last = following
    with pytest.raises(ElfError, match="a struct contains itself"):
        struct_layouts(image_of(entries, struct("s", 8, unnamed(last))))


def test_a_member_outside_its_struct_is_refused() -> None:
    with pytest.raises(ElfError, match="'s' has 4 bytes and 'a' at 5"):
        struct_layouts(image_of(AN_INT, struct("s", 4, member("a", FIRST, 5))))


def test_two_members_of_one_name_are_refused() -> None:
    with pytest.raises(ElfError, match="'s' has two members 'a'"):
        struct_layouts(image_of(AN_INT, struct("s", 8, member("a", FIRST, 0), member("a", FIRST, 4))))


def test_a_type_that_is_no_entry_is_refused() -> None:
    with pytest.raises(ElfError, match="refers to no entry"):
        struct_layouts(image_of(AN_INT, struct("s", 4, member("a", FIRST + 1, 0))))


def test_entries_that_cost_far_more_than_their_bytes_are_refused() -> None:
    with pytest.raises(ElfError, match=r"more attributes than \.debug_info can hold"):
        struct_layouts(image_of(bytes([FLAGS]) * 100))


def test_a_unit_longer_than_its_section_is_refused() -> None:
    info = pack("<IHIB", 0x1000, 4, 0, 8) + bytes([UNIT]) + END
    image = Image.parse(elf_file(Section(".debug_info", info), Section(".debug_abbrev", ABBREV)))
    with pytest.raises(ElfError, match="unit at 0x0 ends at 0x1004 of 0xd"):
        struct_layouts(image)


COMPRESSED = compress(bytes(1000))


@pytest.mark.parametrize(
    ("header", "stream", "message"),
    [
        ((1, 0, 1 << 60, 1), COMPRESSED, "0x1000000000000000 bytes from"),
        ((1, 0, 1001, 1), COMPRESSED, "0x3e8 bytes after decompression, 0x3e9 announced"),
        ((1, 0, 999, 1), b"garbage", "cannot be decompressed"),
        ((9, 0, 1000, 1), COMPRESSED, "compression type 9"),
    ],
)
def test_a_compressed_section_must_be_what_it_announces(
    header: tuple[int, int, int, int], stream: bytes, message: str
) -> None:
    """gABI, "Section Compression": Elf64_Chdr gives type and size; nothing more is allocated than that."""
    data = pack("<IIQQ", *header) + stream
    image = Image.parse(elf_file(Section(".debug_info", data, flags=0x800), Section(".debug_abbrev", ABBREV)))
    with pytest.raises(ElfError, match=message):
        struct_layouts(image)
