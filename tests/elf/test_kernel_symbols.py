"""Lookups in a kernel's symbols, and where else than in kallsyms they come from."""

from pathlib import Path

import pytest
from elf_writer import Section, elf_file
from objects import compiled, run

from elf.errors import ElfError, SymbolError
from elf.image import Image
from elf.kernel_symbols import KernelSymbol, KernelSymbols, elf_symbols, kernel_table, read_system_map

BASE = 0xFFFF_FFFF_8100_0000
SYMBOLS = KernelSymbols.sorted(
    [
        ("twice", "t", BASE + 0x40),
        ("_text", "T", BASE),
        ("startup_64", "T", BASE),
        ("alone", "t", BASE + 0x10),
        ("twice", "t", BASE + 0x20),
    ]
)


def test_symbols_are_in_the_order_of_their_addresses() -> None:
    assert SYMBOLS.names == ["_text", "startup_64", "alone", "twice", "twice"]
    assert len(SYMBOLS) == 5
    assert SYMBOLS[2] == KernelSymbol("alone", "t", BASE + 0x10)


def test_a_name_that_is_there_twice_has_two_addresses_and_the_first_counts() -> None:
    assert SYMBOLS.addresses_of("twice") == [BASE + 0x20, BASE + 0x40]
    assert SYMBOLS.address_of("twice") == BASE + 0x20
    assert SYMBOLS.addresses_of("alone") == [SYMBOLS.address_of("alone")] == [BASE + 0x10]


def test_a_name_that_is_not_there_has_no_address() -> None:
    assert "nothing" not in SYMBOLS
    assert "alone" in SYMBOLS
    assert SYMBOLS.addresses_of("nothing") == []
    with pytest.raises(SymbolError, match="symbol 'nothing' not found in the kernel's symbol table"):
        SYMBOLS.address_of("nothing")


def test_an_address_belongs_to_the_first_symbol_at_or_below_it() -> None:
    assert SYMBOLS.at(BASE - 1) is None
    assert SYMBOLS.at(BASE + 0xF) == KernelSymbol("_text", "T", BASE)
    assert SYMBOLS.at(BASE + 0x10) == KernelSymbol("alone", "t", BASE + 0x10)
    assert SYMBOLS.at(2**64 - 1) == KernelSymbol("twice", "t", BASE + 0x40)


def test_a_symbol_ends_where_another_address_begins() -> None:
    assert SYMBOLS.end_of(BASE) == BASE + 0x10
    assert SYMBOLS.end_of(BASE + 0x11) == BASE + 0x20
    assert SYMBOLS.end_of(BASE + 0x40) == BASE + 0x40


def test_a_system_map_is_read_in_order_of_addresses(tmp_path: Path) -> None:
    (tmp_path / "System.map").write_text(
        "0000000000000000 A fixed_percpu_data\nffffffff81000010 t b\nffffffff81000000 T _text\n"
    )
    found = read_system_map(tmp_path / "System.map")
    assert list(found) == [("fixed_percpu_data", "A", 0), ("_text", "T", BASE), ("b", "t", BASE + 0x10)]


def test_modules_in_a_copy_of_proc_kallsyms_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "kallsyms").write_text("ffffffff81000000 T _text\nffffffffc0000000 t init\t[lamp]\n")
    assert list(read_system_map(tmp_path / "kallsyms")) == [("_text", "T", BASE)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ffffffff81000000 T _text\nffffffffffff B The real one is elsewhere\n", "map:2: no symbol: 'fff"),
        ("0000000000000000 T _text\n", "1 symbols, none of which has an address; copy /proc/kallsyms"),
        ("", "0 symbols, none of which has an address"),
    ],
)  # fmt: skip
def test_what_is_no_system_map_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "System.map").write_text(text)
    with pytest.raises(ElfError, match=message):
        read_system_map(tmp_path / "System.map")


def test_the_symbols_of_an_elf_file_are_those_that_nm_shows(tmp_path: Path) -> None:
    source = """
        int data = 1, zero; static int own = 2, none; const int fixed = 3;
        static int local(void) { return own + none; } int global(void) { return local() + data + zero; }
        __attribute__((weak)) int weak(void) { return 4; } __attribute__((weak)) int weak_data = 5;
        asm("__fentry__: ret");
        int _start(void) { return global() + weak() + weak_data + fixed; } asm(".globl a\\na = 77");
    """
    linked = tmp_path / "linked"
    run("ld", "-Ttext=0xffffffff81000000", "-o", linked, compiled(tmp_path, source, "-fno-builtin", "-O0"))
    shown = [line.split() for line in run("nm", linked).splitlines()]
    found = {(f"{address:016x}", type_, name) for name, type_, address in elf_symbols(Image.open(linked))}
    assert found == {tuple(line) for line in shown}


def test_an_image_without_symbols_is_refused() -> None:
    with pytest.raises(ElfError, match="no symbol table; give the vmlinux that is not stripped"):
        elf_symbols(Image.parse(elf_file(type=2)))


def test_a_table_is_found_by_its_section_or_by_its_bounds() -> None:
    data = Section(".data", b"0123456789", address=BASE)
    section = Section("table", b"abc", address=BASE + 0x100)
    bounds = ("start", "stop")
    symbols = KernelSymbols.sorted([("start", "D", BASE + 2), ("stop", "D", BASE + 5)])
    by_section, by_symbols = (Image.parse(elf_file(*both, type=2)) for both in ((data, section), (data,)))
    assert kernel_table(by_section, symbols, "table", bounds) == (b"abc", BASE + 0x100)
    assert kernel_table(by_symbols, symbols, "table", bounds) == (b"234", BASE + 2)
    assert kernel_table(by_symbols, None, "table", bounds) is None
    assert kernel_table(by_symbols, SYMBOLS, "table", bounds) is None


@pytest.mark.parametrize(("start", "stop"), [(5, 2), (8, 11), (0x1000, 0x1001)])
def test_bounds_outside_of_a_section_are_refused(start: int, stop: int) -> None:
    image = Image.parse(elf_file(Section(".data", b"0123456789", address=BASE), type=2))
    symbols = KernelSymbols.sorted([("start", "D", BASE + start), ("stop", "D", BASE + stop)])
    with pytest.raises(ElfError, match="is in no section"):
        kernel_table(image, symbols, "table", ("start", "stop"))
