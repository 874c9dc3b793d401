"""Headers and sections: against readelf, and the refusal of whatever contradicts itself."""

import re
import struct
from pathlib import Path

import pytest
from elf_writer import ALLOC, SHT_NOBITS, SHT_REL, SHT_RELA, SHT_STRTAB, SHT_SYMTAB, Section, elf_file, module
from objects import each_built, run

from elf.errors import ElfError
from elf.image import ET_REL, Image

SMALL = elf_file(Section(".text", b"\xc3"))
ROW = re.compile(
    r"\[\s*(\d+)\] (.*?)\s+(\w+)\s+([0-9a-f]{16}) ([0-9a-f]+) ([0-9a-f]+) ([0-9a-f]+)"
    r"\s+([A-Zop]*)\s+(\d+)\s+(\d+)\s+(\d+)$"
)


def patched(data: bytes, offset: int, form: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, offset, value)
    return bytes(changed)


@each_built
def test_sections_are_those_that_readelf_lists(path: Path) -> None:
    image = Image.open(path)
    rows = [
        match.groups() for line in run("readelf", "-SW", path).splitlines() if (match := ROW.search(line))
    ]
    assert [
        (s.index, s.name, s.address, s.offset, s.size, s.entry_size, s.link, s.info, s.alignment)
        for s in image.sections[1:]
    ] == [
        (
            int(i),
            name,
            int(address, 16),
            int(offset, 16),
            int(size, 16),
            int(entry, 16),
            int(link),
            int(info),
            int(align),
        )
        for i, name, _type, address, offset, size, entry, _flags, link, info, align in rows
        if int(i)
    ]
    flags = {int(row[0]): row[7] for row in rows}
    for section in image.sections[1:]:
        assert ("A" in flags[section.index]) == section.is_alloc
        assert ("X" in flags[section.index]) == section.is_exec
        assert ("W" in flags[section.index]) == section.is_write


def test_contents_are_the_bytes_of_the_file() -> None:
    image = Image.parse(elf_file(Section(".text", b"\x90\xc3"), Section(".data", b"abc")))
    data = image.section(".data")
    assert image.type == ET_REL
    assert data is not None
    assert bytes(image.contents(data)) == b"abc"
    assert image.contents(data).readonly


def test_the_size_of_a_nobits_section_is_only_a_number() -> None:
    image = Image.parse(elf_file(Section(".bss", type=SHT_NOBITS, size=1 << 60)))
    assert image.sections[1].size == 1 << 60
    assert len(image.contents(image.sections[1])) == 0


def test_the_first_of_several_sections_of_one_name_is_found() -> None:
    image = Image.parse(elf_file(Section(".text", b"a"), Section(".text", b"b")))
    assert image.section(".text") == image.sections[1]
    assert image.section(".data") is None
    assert [section.index for section in image.sections_named(".text")] == [1, 2]


def test_a_section_that_does_not_exist_is_refused_with_its_user() -> None:
    with pytest.raises(ElfError, match=r"who asks: section 3 does not exist, there are 3"):
        Image.parse(SMALL).section_by_index(3, "who asks")


def test_more_sections_than_e_shnum_can_say_are_read() -> None:
    """gABI "ELF Header": e_shnum 0 and e_shstrndx SHN_XINDEX refer to sh_size and sh_link of section 0."""
    image = Image.parse(elf_file(*[Section(".text", b"") for _ in range(0xFF20)]))
    assert len(image.sections) == 0xFF20 + 2
    assert image.sections[-1].name == ".shstrtab"


def test_modinfo_keeps_all_values_of_a_key_in_order() -> None:
    text = b"license=GPL\0\0depends=a,b\0alias=x=1\0alias=y\0no equals sign\0livepatch=Y"
    image = Image.parse(elf_file(Section(".modinfo", text)))
    assert image.modinfo == {
        "license": ["GPL"],
        "depends": ["a,b"],
        "alias": ["x=1", "y"],
        "livepatch": ["Y"],
    }
    assert Image.parse(SMALL).modinfo == {}


def test_relocation_sections_are_found_by_their_target() -> None:
    image = Image.parse(module(b"\xc3", b"", ()))
    assert [s.name for s in image.relocation_sections(image.sections[1])] == [".rela.text"]
    assert image.relocation_sections(image.sections[3]) == []


def test_a_file_without_section_headers_has_no_sections() -> None:
    image = Image.parse(SMALL[:40] + bytes(8) + SMALL[48:60] + bytes(4))
    assert image.sections == ()
    assert image.symbols == ()


HEADER_FAULTS = {
    "no ELF magic": (0, "<B", 0x7E),
    r"EI_CLASS is 1; expected ELFCLASS64": (4, "<B", 1),
    r"EI_DATA is 2": (5, "<B", 2),
    r"EI_VERSION is 0": (6, "<B", 0),
    r"e_version is 2": (20, "<I", 2),
    r"e_machine is 183; expected EM_X86_64 \(62\)": (18, "<H", 183),
    r"e_type is 4": (16, "<H", 4),
    r"e_shentsize is 63": (58, "<H", 63),
    r"section headers at 0xffffffffffffffff": (40, "<Q", 2**64 - 1),
    r"4 section headers at": (60, "<H", 4),
    r"e_shstrndx 1 is no string table": (62, "<H", 1),
    r"e_shstrndx 9 is no string table": (62, "<H", 9),
}


@pytest.mark.parametrize("message", HEADER_FAULTS)
def test_a_header_that_is_wrong_is_refused_with_what_was_expected(message: str) -> None:
    with pytest.raises(ElfError, match=message) as caught:
        Image.parse(patched(SMALL, *HEADER_FAULTS[message]), "some.ko")
    assert str(caught.value).startswith("some.ko: ELF header: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", range(len(SMALL)))
def test_a_file_cut_off_anywhere_is_refused(length: int) -> None:
    with pytest.raises(ElfError):
        Image.parse(SMALL[:length])


SECTION_FAULTS = {
    r"0x20 bytes at file offset 0x[0-9a-f]+; the file ends at": Section("x", b"", size=0x20, offset=1 << 40),
    r"alignment 0x3 is no power of two": Section("x", alignment=3),
    r"sh_link 7 is no section of type 3": Section("x", type=SHT_SYMTAB, link=7, entry_size=24),
    r"0x18 bytes in entries of 16; expected entries of 24": Section("x", bytes(24), SHT_RELA, entry_size=16),
    r"0x19 bytes in entries of 24": Section("x", bytes(25), SHT_SYMTAB, link=2, entry_size=24),
    r"sh_info 2 is beyond the last symbol": Section(
        "x", bytes(24), SHT_SYMTAB, link=2, info=2, entry_size=24
    ),
    r"sh_info 9, but there are 3 sections": Section("x", bytes(24), SHT_RELA, info=9, entry_size=24),
    r"sh_link 2 is no section of type 2": Section("x", bytes(24), SHT_RELA, link=2, info=1, entry_size=24),
    r"REL relocations; x86-64 has RELA only": Section("x", b"", SHT_REL, ALLOC, info=1),
}


@pytest.mark.parametrize("message", SECTION_FAULTS)
def test_a_section_that_contradicts_the_file_is_refused_by_name(message: str) -> None:
    with pytest.raises(ElfError, match=r"section 1 'x': " + message):
        Image.parse(elf_file(SECTION_FAULTS[message]))


def test_a_section_may_end_where_the_file_ends_but_not_later() -> None:
    size = len(elf_file(Section("x")))
    assert Image.parse(elf_file(Section("x", size=size - 64, offset=64))).sections[1].size == size - 64
    with pytest.raises(ElfError, match="the file ends at"):
        Image.parse(elf_file(Section("x", size=size - 63, offset=64)))


def test_a_name_without_an_end_is_refused() -> None:
    """gABI "String Table": every string, the last one too, ends with a NUL."""
    names_end = SMALL.index(b".shstrtab\0") + 9
    with pytest.raises(ElfError, match=r"section 2: name at 0x7 does not end"):
        Image.parse(SMALL[:names_end] + b"x" + SMALL[names_end + 1 :])


def test_a_second_symbol_table_is_refused() -> None:
    table = [Section(".symtab", bytes(24), SHT_SYMTAB, link=3, entry_size=24) for _ in range(2)]
    with pytest.raises(ElfError, match=r"sections \[1, 2\] are symbol tables"):
        Image.parse(elf_file(*table, Section(".strtab", b"\0", SHT_STRTAB)))


@pytest.mark.parametrize("name", ["missing.ko", "folder", "/dev/zero", "nul\0inside"])
def test_a_path_that_cannot_be_read_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ElfError) as caught:
        Image.open(str(tmp_path / name))
    assert "\n" not in str(caught.value)
