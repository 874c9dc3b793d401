"""Text under construction."""

import pytest

from emu.memory import MemoryFault, Snapshot
from emu.text_image import TextImage

AT = 0x10000


def test_bytes_are_read_and_written_where_they_lie() -> None:
    first, second = bytearray(16), bytearray(range(16))
    text = TextImage([(AT + 0x100, second), (AT, first)])
    text.write(AT + 14, b"\x01\x02")
    assert first[14:] == b"\x01\x02"
    assert text.read(AT + 0x104, 2) == b"\x04\x05"
    assert text.read_some(AT + 0x10E, 8) == b"\x0e\x0f"


@pytest.mark.parametrize(("address", "size"), [(AT - 1, 2), (AT + 15, 2), (AT + 0x50, 1), (0, 1)])
def test_what_is_in_no_section_is_not_there(address: int, size: int) -> None:
    text = TextImage([(AT, bytearray(16)), (AT + 0x100, bytearray(16))])
    assert not text.holds(address, size)
    with pytest.raises(MemoryFault):
        text.read(address, size)
    with pytest.raises(MemoryFault):
        text.write(address, bytes(size))


def test_what_lies_behind_can_be_read_and_not_written() -> None:
    text = TextImage([(AT, bytearray(16))], Snapshot({0x20: bytes([7]) * 4096}))
    assert text.read(0x20010, 2) == b"\x07\x07"
    with pytest.raises(MemoryFault, match="a write of text"):
        text.write(0x20010, b"\0")
