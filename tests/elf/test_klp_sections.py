"""Klp relocation sections and livepatch symbols: against readelf, and names good and bad."""

import re
from pathlib import Path

import pytest
from elf_writer import ALLOC, GLOBAL_NOTYPE, SHT_PROGBITS, SHT_RELA, Section, module, rela
from objects import run

from elf.errors import ElfError, RelocationError
from elf.image import Image
from elf.klp_sections import (
    KlpSymbolName,
    klp_relocations,
    klp_sections,
    section_objname,
)
from elf.relocation import R_X86_64_64, R_X86_64_NONE, RULES, relocations, type_name
from elf.symbols import SHN_LIVEPATCH

BUILD = Path(__file__).parents[2] / "fixtures" / "build"
KLP_BUILD, KPATCH_BUILD = BUILD / "klp_lamp.ko", BUILD / "klp_lamp_kpatch.ko"
RELA_LIVEPATCH = 0x00100000

both = pytest.mark.parametrize("path", [KLP_BUILD, KPATCH_BUILD], ids=lambda path: path.stem)


def entries(image: Image) -> dict[str, list[tuple[int, str, str, int]]]:
    """By section, what each klp relocation says: offset, type, symbol, addend."""
    return {
        section.name: [
            (each.offset, type_name(each.type), each.symbol.name, each.addend)
            for each in klp_relocations(image, section)
        ]
        for section in klp_sections(image)
    }


def readelf_entries(path: Path) -> dict[str, list[tuple[int, str, str, int]]]:
    """The same, as `readelf --relocs` prints it."""
    found: dict[str, list[tuple[int, str, str, int]]] = {}
    row = re.compile(r"([0-9a-f]{16}) +[0-9a-f]{16} (R_\S+) +[0-9a-f]{16} (\S+) ([+-]) ([0-9a-f]+)$")
    name = ""
    for line in run("readelf", "-rW", path).splitlines():
        if heading := re.match(r"Relocation section '(.*)' at", line):
            name = heading[1]
        elif (entry := row.match(line)) and name.startswith(".klp.rela."):
            addend = int(entry[5], 16) * (-1 if entry[4] == "-" else 1)
            found.setdefault(name, []).append((int(entry[1], 16), entry[2], entry[3], addend))
    return found


@both
def test_the_relocations_are_those_that_readelf_prints(path: Path) -> None:
    found = entries(Image.open(path))
    assert found == readelf_entries(path)
    assert len(found) == 6


@both
def test_the_sections_are_flagged_as_readelf_shows_it(path: Path) -> None:
    """Documentation/livepatch/module-elf-format.rst, 3.1: SHF_ALLOC, SHF_INFO_LINK, SHF_RELA_LIVEPATCH."""
    image = Image.open(path)
    printed = {
        row[1]: (row[2], int(row[3]), int(row[4]))
        for row in re.finditer(
            r"\] (\.klp\.rela\.\S+) +RELA +\S+ \S+ \S+ 18 +(\S+) +(\d+) +(\d+) +8$",
            run("readelf", "-SW", path),
            re.MULTILINE,
        )
    }
    assert printed == {section.name: ("AIo", section.link, section.info) for section in klp_sections(image)}
    assert {image.sections[section.link].name for section in klp_sections(image)} == {".symtab"}


@both
def test_the_symbols_have_the_index_that_readelf_shows(path: Path) -> None:
    printed = re.findall(r"NOTYPE  GLOBAL DEFAULT OS \[0xff20\] (\S+)$", run("readelf", "-sW", path), re.M)
    image = Image.open(path)
    assert [each.name for each in image.symbols if each.section == SHN_LIVEPATCH] == printed
    assert {str(KlpSymbolName.parse(name)) for name in printed} == {
        "vmlinux:same_name,1",
        "vmlinux:same_name,2",
        "vmlinux:twin,2",
        "vmlinux:div_errors,0",
        "lamp:glow,2",
        "lamp:level,0",
    }


@both
def test_each_section_names_the_section_it_applies_to(path: Path) -> None:
    image = Image.open(path)
    for section in klp_sections(image):
        target = image.sections[section.info].name
        assert section.name == f".klp.rela.{section_objname(section.name)}.{target}"


@both
def test_each_field_lies_in_its_section_and_is_zero_in_the_file(path: Path) -> None:
    """apply_relocate_add() refuses a field that is not zero."""
    image = Image.open(path)
    for section in klp_sections(image):
        contents = image.contents(image.sections[section.info])
        for each in klp_relocations(image, section):
            size = RULES[each.type].size
            assert bytes(contents[each.offset : each.offset + size]) == bytes(size)


def ordinary_entries_of_livepatch_symbols(path: Path) -> list[int]:
    """Types of the ordinary relocations that refer to livepatch symbols."""
    image = Image.open(path)
    return [
        kind
        for section in image.sections
        if section.type == SHT_RELA and not section.is_klp_relocation
        for _, kind, index, _ in relocations(image, section)
        if image.symbols[index].section == SHN_LIVEPATCH
    ]


def test_kpatch_build_leaves_no_ordinary_relocation_of_a_livepatch_symbol() -> None:
    assert ordinary_entries_of_livepatch_symbols(KPATCH_BUILD) == []


def test_klp_build_leaves_relocations_that_do_nothing() -> None:
    count = sum(map(len, entries(Image.open(KLP_BUILD)).values()))
    assert ordinary_entries_of_livepatch_symbols(KLP_BUILD) == [R_X86_64_NONE] * count


def test_both_tools_give_the_same_klp_relocations() -> None:
    assert entries(Image.open(KLP_BUILD)) == entries(Image.open(KPATCH_BUILD))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (".klp.sym.vmlinux.printk,0", ("vmlinux", "printk", 0)),
        (".klp.sym.btrfs.can_modify_feature.isra.3,0", ("btrfs", "can_modify_feature.isra.3", 0)),
        (".klp.sym.ext4.x,12", ("ext4", "x", 12)),
        (".klp.sym.a.b,18446744073709551615", ("a", "b", 2**64 - 1)),
        (".klp.sym.a.b, 2", ("a", "b", 2)),  # %lu skips white space
        (".klp.sym.a.b,2nd", ("a", "b", 2)),  # and what follows a number is not read
        (f".klp.sym.{'o' * 55}.s,0", ("o" * 55, "s", 0)),
        (f".klp.sym.o.{'s' * 511},0", ("o", "s" * 511, 0)),
    ],
)
def test_a_symbol_s_name_has_an_object_a_name_and_a_position(name: str, parts: tuple[str, str, int]) -> None:
    """module-elf-format.rst, 4.2."""
    parsed = KlpSymbolName.parse(name)
    assert (parsed.objname, parsed.name, parsed.sympos) == parts


@pytest.mark.parametrize(
    "name",
    [
        "",
        "printk",
        ".klp.sym.",
        ".klp.sym..printk,0",
        ".klp.sym.vmlinux",
        ".klp.sym.vmlinux.,0",
        ".klp.sym.vmlinux.printk",
        ".klp.sym.vmlinux.printk,",
        ".klp.sym.vmlinux.printk,-1",
        ".klp.sym.vmlinux.printk,x0",
        ".klp.sym.vmlinux.a,b,0",
        "x.klp.sym.vmlinux.printk,0",
        ".klp.rela.vmlinux.printk,0",
        f".klp.sym.{'o' * 56}.s,0",
        f".klp.sym.o.{'s' * 512},0",
    ],
)
def test_a_malformed_symbol_name_is_refused_with_the_kernel_s_message(name: str) -> None:
    with pytest.raises(ElfError) as raised:
        KlpSymbolName.parse(name)
    assert raised.value.what == f"symbol {name} has an incorrectly formatted name"


@pytest.mark.parametrize(
    ("name", "objname"),
    [
        (".klp.rela.ext4.text.ext4_attr_store", "ext4"),
        (".klp.rela.vmlinux..text.cmdline_proc_show", "vmlinux"),
        (".klp.rela.vmlinux", "vmlinux"),
        (f".klp.rela.{'o' * 60}.text", "o" * 55),  # the kernel reads no further, and compares that
    ],
)
def test_a_section_s_name_has_an_object(name: str, objname: str) -> None:
    """module-elf-format.rst, 3.1."""
    assert section_objname(name) == objname


@pytest.mark.parametrize("name", ["", ".klp.rela.", ".klp.rela..text", ".rela.text", ".klp.sym.vmlinux.x,0"])
def test_a_malformed_section_name_is_refused_with_the_kernel_s_message(name: str) -> None:
    with pytest.raises(ElfError) as raised:
        section_objname(name)
    assert raised.value.what == f"section {name} has an incorrectly formatted name"


def with_klp_section(type: int, contents: bytes, symbol_section: int = SHN_LIVEPATCH) -> Image:
    """A module with `.klp.rela.vmlinux..text` as section 5, and one livepatch symbol, number 1."""
    return Image.parse(
        module(
            bytes(16),
            b"",
            ((".klp.sym.vmlinux.printk,0", GLOBAL_NOTYPE, symbol_section, 0, 0),),
            Section(
                ".klp.rela.vmlinux..text",
                contents,
                type,
                ALLOC | RELA_LIVEPATCH,
                link=3,
                info=1,
                entry_size=24,
                alignment=8,
            ),
        ),
        "x.ko",
    )


def test_the_flag_on_a_section_that_holds_no_relocations_is_refused() -> None:
    with pytest.raises(ElfError, match="SHF_RELA_LIVEPATCH on a section of type 1"):
        list(klp_sections(with_klp_section(SHT_PROGBITS, b"no relocations")))


def test_a_symbol_that_does_not_exist_is_refused() -> None:
    image = with_klp_section(SHT_RELA, rela((8, R_X86_64_64, 2, 0)))
    with pytest.raises(RelocationError, match=r"R_X86_64_64 at 0x8: symbol 2 does not exist, there are 2"):
        list(klp_relocations(image, next(klp_sections(image))))


def test_a_symbol_without_shn_livepatch_is_no_livepatch_symbol() -> None:
    image = with_klp_section(SHT_RELA, rela((8, R_X86_64_64, 1, 0)), symbol_section=1)
    (found,) = klp_relocations(image, next(klp_sections(image)))
    with pytest.raises(ElfError) as raised:
        found.name  # noqa: B018
    assert raised.value.what == "symbol .klp.sym.vmlinux.printk,0 is not marked as a livepatch symbol"
