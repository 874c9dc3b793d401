"""Symbol tables: against readelf; section indices that need SHN_XINDEX; the choice that livepatch makes."""

import re
import struct
from pathlib import Path

import pytest
from elf_writer import GLOBAL_FUNC, SHT_STRTAB, SHT_SYMTAB, SHT_XINDEX, Section, elf_file, module, symbols
from objects import each_built, run

from elf.errors import ElfError, SymbolError
from elf.image import Image
from elf.symbols import SHN_ABS, SHN_COMMON, SHN_LIVEPATCH, select

ROW = re.compile(r"^\s*\d+: ([0-9a-f]{16})\s+(\w+) (\w+)\s+(\w+)\s+\w+\s+(.*?) ?$")
TYPES = {0: "NOTYPE", 1: "OBJECT", 2: "FUNC", 3: "SECTION", 4: "FILE"}
BINDINGS = {0: "LOCAL", 1: "GLOBAL", 2: "WEAK"}
PLACES = {0: "UND", SHN_ABS: "ABS", SHN_COMMON: "COM", SHN_LIVEPATCH: "OS [0xff20]"}


@each_built
def test_symbols_are_those_that_readelf_lists(path: Path) -> None:
    image = Image.open(path)
    rows = [match.groups() for line in run("readelf", "-sW", path).splitlines() if (match := ROW.match(line))]
    assert len(rows) == len(image.symbols)
    for symbol, (value, size, type_, binding, rest) in zip(image.symbols, rows, strict=True):
        assert (symbol.value, symbol.size) == (int(value, 16), int(size, 0))
        assert (TYPES[symbol.type], BINDINGS[symbol.binding]) == (type_, binding)
        # readelf prints a section symbol with the section's name.
        name = image.sections[symbol.section].name if type_ == "SECTION" and not symbol.name else symbol.name
        assert f"{PLACES.get(symbol.section, symbol.section)} {name}".strip() == rest.strip()


def test_reserved_section_indices_are_kept() -> None:
    entries = [("a", 0x10, SHN_ABS, 1, 0), ("c", 0x11, SHN_COMMON, 8, 4), ("k", 0x10, SHN_LIVEPATCH, 0, 0)]
    image = Image.parse(module(b"", b"", (*entries, ("f", GLOBAL_FUNC, 1, 0, 1), ("u", 0x10, 0, 0, 0))))
    assert [s.section for s in image.symbols] == [0, SHN_ABS, SHN_COMMON, SHN_LIVEPATCH, 1, 0]
    assert [s.is_defined for s in image.symbols] == [False, True, True, True, True, False]
    assert [s.is_in_section for s in image.symbols] == [False, False, False, False, True, False]
    assert [s.is_function for s in image.symbols] == [False, False, False, False, True, False]


def many_sections(index: int, *, with_table: bool = True) -> bytes:
    table, strings = symbols(("f", GLOBAL_FUNC, 0xFFFF, 0, 0))
    indices = struct.pack("<II", 0, index)
    fill = [Section(".text") for _ in range(0x10010)] if index >= 0xFF00 else []
    return elf_file(
        Section(".symtab", table, SHT_SYMTAB, 0, link=2, entry_size=24),
        Section(".strtab", strings, SHT_STRTAB, 0),
        *([Section(".symtab_shndx", indices, SHT_XINDEX, 0, link=1, entry_size=4)] if with_table else []),
        *fill,
    )


@pytest.mark.parametrize("index", [2, 0x10001])
def test_a_section_index_that_does_not_fit_comes_from_symtab_shndx(index: int) -> None:
    """gABI "Symbol Table": st_shndx SHN_XINDEX refers to the SHT_SYMTAB_SHNDX section."""
    assert Image.parse(many_sections(index)).symbols[1].section == index


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (many_sections(9), "section 9, but there are 5"),
        (many_sections(0xFFF1), "section 65521 has the number of a reserved index"),
        (many_sections(2, with_table=False), "SHN_XINDEX without an SHT_SYMTAB_SHNDX section"),
        (module(b"", b"", (("f", GLOBAL_FUNC, 77, 0, 0),)), "section 77, but there are 6"),
    ],
)
def test_a_symbol_in_a_section_that_does_not_exist_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ElfError, match=rf"symbol 1 of '.symtab': {message}"):
        _ = Image.parse(data).symbols


def test_a_table_of_section_indices_has_one_for_each_symbol() -> None:
    data = bytearray(many_sections(2))
    header = struct.unpack_from("<Q", data, 40)[0] + 3 * 64
    struct.pack_into("<Q", data, header + 32, 4)
    with pytest.raises(ElfError, match=r"1 indices do not match '\.symtab'"):
        Image.parse(bytes(data))


def test_a_symbol_name_outside_the_string_table_is_refused() -> None:
    data = bytearray(module(b"", b"", (("f", GLOBAL_FUNC, 1, 0, 0),)))
    struct.pack_into("<I", data, Image.parse(bytes(data)).sections[3].offset + 24, 0x1000)
    with pytest.raises(ElfError, match=r"symbol 1 of '.symtab': name at 0x1000 does not end"):
        _ = Image.parse(bytes(data)).symbols


def test_a_unique_name_needs_no_position() -> None:
    assert select("f", [0x10], 0, "m") == 0x10


def test_a_position_counts_from_one_in_the_order_given() -> None:
    assert [select("f", [0x30, 0x10, 0x20], position, "m") for position in (1, 2, 3)] == [0x30, 0x10, 0x20]


@pytest.mark.parametrize(
    ("addresses", "sympos", "objname", "message"),
    [
        ([], 0, "m", "symbol 'f' not found in symbol table"),
        ([], 3, "m", "symbol 'f' not found in symbol table"),
        ([0], 0, "m", "symbol 'f' not found in symbol table"),
        ([1, 2], 0, "m", "unresolvable ambiguity for symbol 'f' in object 'm'"),
        ([1, 2], 0, "vmlinux", "unresolvable ambiguity for symbol 'f' in object '(null)'"),
        ([1, 2], 3, "m", "symbol position 3 for symbol 'f' in object 'm' not found"),
        ([1], 2, None, "symbol position 2 for symbol 'f' in object 'vmlinux' not found"),
    ],
)
def test_a_choice_that_fails_has_the_kernels_message(
    addresses: list[int], sympos: int, objname: str | None, message: str
) -> None:
    """kernel/livepatch/core.c, klp_find_object_symbol(): vmlinux is a NULL objname, once printed."""
    with pytest.raises(SymbolError) as caught:
        select("f", addresses, sympos, objname)
    assert caught.value.what == message
