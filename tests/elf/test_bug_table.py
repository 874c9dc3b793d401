"""The table of WARN and BUG: what each entry says, in a linked image and in guest memory."""

from struct import pack

import pytest
from elf_writer import Section, elf_file

from elf.bug_table import BUG_ENTRY_BYTES, BugEntry, bug_table, read_bug_table
from elf.errors import ElfError
from elf.image import Image
from elf.kernel_symbols import KernelSymbols

TABLE = 0xFFFF_FFFF_82C4_8980
UD2 = 0xFFFF_FFFF_8107_95B0
FILE = 0xFFFF_FFFF_8216_0000


def entry(index: int, ud2: int, file: int, line: int, flags: int) -> bytes:
    at = TABLE + index * BUG_ENTRY_BYTES
    return pack("<iiHH", ud2 - at, file - at - 4, line, flags)


DATA = (
    entry(0, UD2, FILE, 485, 0)
    + entry(1, UD2 + 8, FILE + 16, 1242, 0x903)
    + entry(2, UD2 + 8, FILE, 1, 0x90B)
    + entry(3, 0xFFFF_FFFF_C000_0000, FILE, 65535, 0x909)
)


def test_an_entry_says_which_ud2_stands_for_which_line_of_which_file() -> None:
    first, second, third, fourth = read_bug_table(DATA, TABLE)
    assert first == BugEntry(UD2, FILE, 485, 0, TABLE + 10)
    assert second == BugEntry(UD2 + 8, FILE + 16, 1242, 0x903, TABLE + 22)
    assert (third.line, fourth.line, fourth.address) == (1, 65535, 0xFFFF_FFFF_C000_0000)


def test_the_flags_tell_warnings_from_bugs() -> None:
    first, second, third, _ = read_bug_table(DATA, TABLE)
    assert (first.is_warning, first.is_once, first.says_cut_here, first.taint) == (False, False, True, 0)
    assert (second.is_warning, second.is_once, second.says_cut_here, second.taint) == (True, True, True, 9)
    assert not third.says_cut_here


@pytest.mark.parametrize("by_section", [True, False])
def test_a_linked_image_has_its_table_by_section_or_by_symbols(by_section: bool) -> None:
    name = "__bug_table" if by_section else ".data"
    image = Image.parse(elf_file(Section(name, DATA + bytes(0 if by_section else 9), address=TABLE), type=2))
    bounds = [("__start___bug_table", "D", TABLE), ("__stop___bug_table", "D", TABLE + len(DATA))]
    found = bug_table(image, KernelSymbols.sorted(bounds))
    assert [entry.line for entry in found.values()] == [485, 1242, 65535]
    assert found[UD2 + 8].file == FILE + 16


def test_an_image_without_the_table_has_no_entries() -> None:
    assert bug_table(Image.parse(elf_file(type=2))) == {}


def test_a_table_of_another_form_is_refused() -> None:
    with pytest.raises(ElfError, match="__bug_table has 13 bytes; each entry takes 12"):
        list(read_bug_table(bytes(13), TABLE))
