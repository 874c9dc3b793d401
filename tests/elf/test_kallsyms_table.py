"""The kernel's own symbol table: what scripts/kallsyms.c writes is found without symbols, and read back."""

from collections.abc import Sequence
from contextlib import suppress

import pytest
from elf_writer import EXEC, GLOBAL_FUNC, SHT_STRTAB, SHT_SYMTAB, Section, elf_file, symbols
from hypothesis import given
from hypothesis import strategies as st
from kernel_image_writer import RODATA, TEXT, Row, kallsyms

from elf.errors import ElfError
from elf.image import Image
from elf.kallsyms_table import kallsyms as kallsyms_of
from elf.kallsyms_table import kernel_symbols

ROWS: list[Row] = [
    ("fixed_percpu_data", "A", 0),
    ("current_task", "A", 0x1FB80),
    ("_text", "T", TEXT),
    ("_stext", "T", TEXT),
    *((f"do_work_{number}", "tT"[number % 2], TEXT + 0x10 + 16 * number) for number in range(700)),
    ("a_very_long_name_" + "x7" * 200, "d", RODATA),
    ("linux_banner", "D", RODATA + 0x20),
    ("_end", "B", 0xFFFF_FFFF_8443_0000),
]
NOISE = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00 no tokens" + bytes(range(256)) * 40
FORMS = {
    "6.1": {},
    "6.1 before the seqs": {"with_seqs": False},
    "6.4 and later": {"offsets_last": True},
    "addresses of 8 bytes": {"absolute": True},
    "addresses of 8 bytes, last": {"absolute": True, "offsets_last": True},
}


def image_of(rodata: bytes, name: str = ".rodata", address: int = RODATA) -> Image:
    text = Section(".text", b"\x90" * 64, address=TEXT, flags=6)
    return Image.parse(elf_file(text, Section(name, rodata, address=address), type=2))


@pytest.mark.parametrize("form", FORMS)
def test_all_symbols_are_read_back_in_table_order(form: str) -> None:
    image = image_of(kallsyms(ROWS, before=NOISE, **FORMS[form]) + b"more")
    assert list(kallsyms_of(image)) == ROWS


def test_without_absolute_percpu_offsets_count_from_the_base() -> None:
    rows = ROWS[2:]
    assert list(kallsyms_of(image_of(kallsyms(rows, percpu=False)))) == rows


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 513])
def test_any_number_of_symbols_is_found(count: int) -> None:
    rows: list[Row] = [(f"f{number}", "t", TEXT + number) for number in range(count)]
    assert list(kallsyms_of(image_of(kallsyms(rows, before=NOISE)))) == rows


def test_a_marker_may_point_to_a_name_that_is_long() -> None:
    rows: list[Row] = [(f"f{number}", "t", TEXT + number) for number in range(256)]
    rows.append(("x7" * 200, "t", TEXT + 256))
    assert list(kallsyms_of(image_of(kallsyms(rows)))) == rows


def test_names_that_nothing_leads_on_to_the_token_table_are_not_taken() -> None:
    """One symbol that agrees with itself, offset, base, count, name and marker, far from the tokens."""
    decoy = kallsyms([("", "t", TEXT)], with_seqs=False)[:40]
    assert decoy[16:26] == b"\1\0\0\0\0\0\0\0\1t"
    assert list(kallsyms_of(image_of(kallsyms(ROWS, before=decoy)))) == ROWS


@pytest.mark.parametrize("shift", range(0, 8, 4))
def test_alignment_is_that_of_addresses(shift: int) -> None:
    image = image_of(bytes(8 - shift) + kallsyms(ROWS), address=RODATA + shift)
    assert list(kallsyms_of(image)) == ROWS


def test_another_section_than_rodata_is_searched_too() -> None:
    assert list(kallsyms_of(image_of(kallsyms(ROWS), name=".data.kallsyms"))) == ROWS


name = st.text("abcdefghijklmnop_.0123456789", min_size=1, max_size=40)
row = st.tuples(name, st.sampled_from("tTdDbBrRwVA"), st.integers(TEXT, TEXT + 0x3FFF_FFFF))


@given(st.lists(row, min_size=1, max_size=40), st.booleans(), st.booleans())
def test_whatever_the_symbols_are_they_are_read_back(
    rows: Sequence[Row], with_seqs: bool, offsets_last: bool
) -> None:
    rows = sorted(rows, key=lambda row: row[2])
    image = image_of(kallsyms(rows, with_seqs=with_seqs, offsets_last=offsets_last))
    assert list(kallsyms_of(image)) == rows


@pytest.mark.parametrize("rodata", [b"", NOISE, b"\0" * 4096, b"\1\0\0\0\0\0\0\0" * 500], ids=range(4))
def test_an_image_without_kallsyms_is_refused_with_what_to_give(rodata: bytes) -> None:
    with pytest.raises(ElfError, match=r"no kallsyms token table; give an image with CONFIG_KALLSYMS=y"):
        kallsyms_of(image_of(rodata))


def test_tables_that_do_not_agree_are_refused() -> None:
    table = bytearray(kallsyms(ROWS))
    markers = table.index(bytes(4) + _second_marker(bytes(table)))
    table[markers + 4] ^= 1
    with pytest.raises(ElfError, match="has a token table, but no names, markers and addresses that agree"):
        kallsyms_of(image_of(bytes(table)))


def _second_marker(table: bytes) -> bytes:
    """The marker of symbol 256, as its bytes: where its name begins in the names."""
    start = table.index(len(ROWS).to_bytes(4, "little") + bytes(4)) + 8
    at = start
    for _ in range(256):
        at += 1 + table[at]
    return (at - start).to_bytes(4, "little")


@given(st.data())
def test_a_damaged_table_is_read_or_refused(data: st.DataObject) -> None:
    table = bytearray(kallsyms(ROWS))
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(table) - 1))
        table[at] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, table[at] ^ 1]))
    end = data.draw(st.none() | st.integers(0, len(table)))
    with suppress(ElfError):
        found = kallsyms_of(image_of(bytes(table[:end])))
        assert len(found.names) == len(found.types) == len(found.addresses)
        assert list(found.addresses) == sorted(found.addresses)


def test_an_elf_symbol_table_is_preferred() -> None:
    table, strings = symbols(("known", GLOBAL_FUNC, 1, TEXT, 4))
    image = Image.parse(
        elf_file(
            Section(".text", bytes(64), address=TEXT, flags=2 | EXEC),
            Section(".rodata", kallsyms(ROWS), address=RODATA),
            Section(".symtab", table, SHT_SYMTAB, 0, link=4, info=1, entry_size=24),
            Section(".strtab", strings, SHT_STRTAB, 0),
            type=2,
        )
    )
    assert list(kernel_symbols(image)) == [("known", "T", TEXT)]
    assert list(kernel_symbols(image_of(kallsyms(ROWS)))) == ROWS
