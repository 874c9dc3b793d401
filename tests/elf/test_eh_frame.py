"""`.eh_frame` as binutils interprets it, row for row."""

import re
from pathlib import Path

import pytest
from objects import run

from elf.eh_frame import CallFrames, read_eh_frame
from elf.errors import ElfError
from elf.image import Image
from elf.relocation import apply_relocations

BUILD = Path(__file__).parents[2] / "fixtures" / "build"

LOCATION = re.compile(r"^([0-9a-f]{16}) (rsp|rbp)\+(\d+)\s+(.*)$")


def frames_of(path: Path) -> CallFrames:
    """The table of an object whose sections all lie at address 0, which is how readelf shows it."""
    image = Image.open(path)
    section = image.section(".eh_frame")
    assert section is not None
    data = bytearray(image.contents(section))
    values = [symbol.value for symbol in image.symbols]
    for rela in image.relocation_sections(section):
        apply_relocations(image, rela, target=data, target_address=0, symbol_values=values)
    return read_eh_frame(bytes(data), 0)


def test_the_rows_are_those_that_readelf_interprets() -> None:
    """DWARF 5, 6.4.1: the table that the call frame instructions stand for."""
    path = BUILD / "kernel.o"
    expected = interpreted(run("readelf", "--debug-dump=frames-interp", path))
    assert len(expected) > 50
    frames = frames_of(path)
    found = {
        (address, row.base.value, row.offset, row.bp_offset)
        for address, row in zip(frames.addresses, frames.rows, strict=True)
        if row is not None
    }
    assert [row for row in expected if row not in found] == []


def test_no_row_holds_outside_of_the_functions() -> None:
    frames = frames_of(BUILD / "fix_area.o")
    assert frames.row_at(frames.addresses[-1]) is None
    assert frames.row_at(-1) is None


@pytest.mark.parametrize("length", range(1, 60, 3))
def test_a_truncated_table_is_refused(length: int) -> None:
    image = Image.open(BUILD / "fix_area.o")
    section = image.section(".eh_frame")
    assert section is not None
    data = image.contents(section).tobytes()[:length]
    assert int.from_bytes(data[:4].ljust(4, b"\1"), "little") + 4 != length
    with pytest.raises(ElfError):
        read_eh_frame(data, 0)


# A common entry (version 1, "zR", code 1, data -8, column 16, absolute addresses) that says what is so at
# every function's entry: DW_CFA_def_cfa rsp 8, DW_CFA_offset r16 at -8.
CIE = bytes.fromhex("14000000 00000000 01 7a5200 01 78 10 01 00 0c0708 9001 0000")


def frames(program: str) -> CallFrames:
    """A function of 16 bytes at 0x1000 with these call frame instructions."""
    body = (0x1000).to_bytes(8, "little") + (16).to_bytes(8, "little") + b"\0" + bytes.fromhex(program)
    length = (4 + len(body)).to_bytes(4, "little")
    return read_eh_frame(CIE + length + (len(CIE) + 4).to_bytes(4, "little") + body, 0)


def test_a_function_that_changes_nothing_has_the_row_of_its_entry() -> None:
    row = frames("").row_at(0x1000)
    assert row is not None
    assert (row.base.value, row.offset, row.bp_offset) == ("rsp", 8, None)


@pytest.mark.parametrize(
    ("program", "what"),
    [
        ("0f 02 77 08", "the frame is an expression"),
        ("0f 02 77 08 0e 10", "an offset for a frame that is an expression"),
        ("0f 02 77 08 0d 06", "a register for a frame that is an expression"),
        ("0d 0a", "the frame is counted from r10"),
        ("16 06 02 77 08", "rbp is an expression"),
        ("10 10 02 77 08", "the return address is an expression"),
        ("07 10", "there is no return address"),
        ("90 02", "the return address is not where a call puts it"),
    ],
)
def test_what_is_not_understood_has_no_row_from_there_on(program: str, what: str) -> None:
    """DWARF 5, 6.4.2: def_cfa_register and def_cfa_offset need a rule with a register and an offset."""
    found = frames(f"41 {program}")  # one byte further
    assert found.row_at(0x1000) is not None
    assert found.row_at(0x1001) is None, what
    assert found.row_at(0x100F) is None, what


def test_a_remembered_row_is_there_again() -> None:
    found = frames("0a 41 07 10 41 0b")
    assert [found.row_at(0x1000 + at) is not None for at in range(3)] == [True, False, True]


def test_a_return_address_in_another_column_is_refused() -> None:
    data = bytearray(CIE)
    data[14] = 15
    with pytest.raises(ElfError, match="column 15"):
        read_eh_frame(bytes(data), 0)


def test_the_frame_of_a_signal_is_refused() -> None:
    data = bytearray(CIE)
    data[10:11] = b"S"
    with pytest.raises(ElfError, match="augmentation"):
        read_eh_frame(bytes(data), 0)


def interpreted(text: str) -> list[tuple[int, str, int, int | None]]:
    """Address, base, offset and place of rbp of every row in what readelf prints."""
    rows, columns, in_fde = [], list[str](), False
    for line in map(str.strip, text.splitlines()):
        if " CIE " in line or " FDE " in line:
            in_fde = " FDE " in line
        if line.startswith("LOC"):
            columns = line.split()[2:]
        found = LOCATION.match(line)
        if found and in_fde:
            place = dict(zip(columns, found[4].split(), strict=True)).get("rbp", "u")
            bp = int(place[1:]) if place.startswith("c") else None
            rows.append((int(found[1], 16), found[2], int(found[3]), bp))
    return rows
