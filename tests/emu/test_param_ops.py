"""Numbers and booleans as lib/kstrtox.c reads them."""

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.param_ops import NUMBERS, kstrtobool, kstrtoint

KINDS = sorted({(size, signed) for size, signed, _ in NUMBERS.values()})


@pytest.mark.parametrize(("size", "signed"), KINDS)
@given(number=st.integers(-(1 << 65), 1 << 65), form=st.sampled_from(["{}", "{:#x}", "+{}", "{}\n", "{:#X}"]))
def test_a_number_is_read_if_it_fits(size: int, signed: bool, number: int, form: str) -> None:
    text = form.format(number)
    low, high = (-(1 << 8 * size - 1), 1 << 8 * size - 1) if signed else (0, 1 << 8 * size)
    if "+-" in text or (number < 0 and not signed):
        with pytest.raises(ValueError, match="no number"):
            kstrtoint(text, size, signed=signed)
    elif low <= number < high:
        assert kstrtoint(text, size, signed=signed) == number
    else:
        with pytest.raises(OverflowError):
            kstrtoint(text, size, signed=signed)


@given(st.text("0123456789abxX-+\n ", max_size=6))
def test_what_strtoull_does_not_read_whole_is_no_number(text: str) -> None:
    """C's strtoull() with base 0 is more liberal in front (blanks, signs) and in what may follow."""
    libc = ctypes.CDLL(None)
    libc.strtoull.restype = ctypes.c_ulonglong
    end = ctypes.c_char_p()
    buffer = ctypes.create_string_buffer(text.encode())
    value = libc.strtoull(buffer, ctypes.byref(end), 0)
    rest = end.value or b""
    whole = rest in (b"", b"\n") and len(rest) < len(text) and text[0] not in " \n-" and text[:2] != "+-"
    try:
        found = kstrtoint(text, 8, signed=False)
    except (ValueError, OverflowError):
        assert not whole
    else:
        assert whole
        assert found == value


def test_an_octal_number_begins_with_zero() -> None:
    assert kstrtoint("010", 4, signed=True) == 8
    with pytest.raises(ValueError, match="no number"):
        kstrtoint("08", 4, signed=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("y", True), ("Yes", True), ("1", True), ("on", True), ("ON", True), ("t", True),
        ("n", False), ("No\n", False), ("0", False), ("off", False), ("oF", False), ("F", False),
    ],
)  # fmt: skip
def test_the_first_letters_of_a_boolean_count(text: str, value: bool) -> None:
    assert kstrtobool(text) is value


@pytest.mark.parametrize("text", ["", "2", "x", "o", "o1", " y"])
def test_anything_else_is_no_boolean(text: str) -> None:
    with pytest.raises(ValueError, match="no boolean"):
        kstrtobool(text)
