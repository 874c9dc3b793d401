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
