"""String functions that are answered in Python, against the C library's."""

import ctypes
import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import boot

LIBC = ctypes.CDLL(None)
SHARED = boot()
ONE, OTHER, OUT = (SHARED.slab.kzalloc(64, "string") for _ in range(3))

strings = st.binary(max_size=12).map(lambda data: data.replace(b"\0", b"a").replace(b"b", b"\x80"))


def called(name: str, *arguments: int) -> int:
    result = SHARED.call(SHARED.symbol(name), *arguments)
    return result - (1 << 64) if result >> 63 else result


def sign(value: int) -> int:
    return (value > 0) - (value < 0)


@settings(max_examples=100)
@given(one=strings, other=strings, count=st.integers(0, 16))
def test_comparing_is_as_in_c(one: bytes, other: bytes, count: int) -> None:
    SHARED.space.write(ONE, one + b"\0")
    SHARED.space.write(OTHER, other + b"\0")
    assert called("strcmp", ONE, OTHER) == sign(LIBC.strcmp(one, other))
    assert called("strncmp", ONE, OTHER, count) == sign(LIBC.strncmp(one, other, ctypes.c_size_t(count)))
    assert called("strnlen", ONE, count) == min(len(one), count)


@settings(max_examples=60)
@given(text=strings, part=strings, byte=st.integers(0, 255))
def test_searching_is_as_in_c(text: bytes, part: bytes, byte: int) -> None:
    SHARED.space.write(ONE, text + b"\0")
    SHARED.space.write(OTHER, part + b"\0")
    for name, where in (("strchr", (text + b"\0").find(byte)), ("strrchr", (text + b"\0").rfind(byte))):
        assert called(name, ONE, byte) & (1 << 64) - 1 == (ONE + where if where >= 0 else 0)
    at = text.find(part)
    assert called("strstr", ONE, OTHER) & (1 << 64) - 1 == (ONE + at if at >= 0 else 0)


@settings(max_examples=60)
@given(text=strings, count=st.integers(0, 16))
def test_copies_that_are_limited(text: bytes, count: int) -> None:
    SHARED.space.write(ONE, text + b"\0")
    fits = text[: count - 1] + b"\0" if count else b""
    for name, result in (
        ("strscpy", len(text) if len(text) < count else -errno.E2BIG),
        ("strlcpy", len(text)),
        ("strncpy", None),
    ):
        SHARED.space.write(OUT, b"\xee" * 32)
        answer = called(name, OUT, ONE, count)
        stored = text[:count].ljust(count, b"\0") if result is None else fits
        assert SHARED.space.read(OUT, 32) == stored + b"\xee" * (32 - len(stored))
        assert result is None or answer == result


@pytest.mark.parametrize(
    ("text", "base", "name", "expected"),
    [
        ("12\n", 0, "kstrtoint", 12),
        ("-0x1f", 0, "kstrtoint", -31),
        ("017", 0, "kstrtoint", 15),
        ("017", 10, "kstrtoint", 17),
        ("ff", 16, "kstrtouint", 255),
        ("0xff", 16, "kstrtoull", 255),
        ("-1", 0, "kstrtouint", errno.EINVAL),
        ("0xff", 10, "kstrtoint", errno.EINVAL),
        ("12 ", 0, "kstrtoint", errno.EINVAL),
        ("", 0, "kstrtoint", errno.EINVAL),
        ("0x", 0, "kstrtoint", errno.EINVAL),
        ("2147483648", 0, "kstrtoint", errno.ERANGE),
        ("18446744073709551615", 0, "kstrtoull", (1 << 64) - 1),
        ("18446744073709551616", 0, "kstrtoull", errno.ERANGE),
    ],
)
def test_numbers_are_read_as_kstrtox_does(text: str, base: int, name: str, expected: int) -> None:
    SHARED.space.write(ONE, text.encode() + b"\0")
    SHARED.space.write(OUT, bytes(8))
    result = called(name, ONE, base, OUT)
    if expected in (errno.EINVAL, errno.ERANGE):
        assert result == -expected
        return
    size = 4 if name.endswith("int") else 8
    assert result == 0
    assert int.from_bytes(SHARED.space.read(OUT, size), "little", signed=expected < 0) == expected


def test_a_duplicate_is_in_the_slab() -> None:
    SHARED.space.write(ONE, b"flower\0")
    copy = called("kstrdup", ONE, 0xCC0) & (1 << 64) - 1
    assert SHARED.space.read(copy, 7) == b"flower\0"
    assert copy in SHARED.slab.live
    assert called("kstrdup", 0, 0xCC0) == 0
