"""The kernel's formats: as those of the C library where they agree, as lib/vsprintf.c says where not."""

import ctypes
import struct
from itertools import chain, repeat

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from machines import boot

from emu.gfp_flags import gfp_flags
from emu.machine import Machine
from emu.vsprintf import vsprintf

LIBC = ctypes.CDLL(None)
SHARED = boot()
TEXT = SHARED.slab.kzalloc(64, "text")
SHARED.space.write(TEXT, b"flower\0")
NUMBER = {"": 4, "hh": 1, "h": 2, "l": 8, "ll": 8, "z": 8}
WORD = (1 << 64) - 1


def formatted(fmt: str, *arguments: int) -> str:
    return vsprintf(SHARED, fmt, chain((each & WORD for each in arguments), repeat(0)))


def in_c(fmt: str, *arguments: object) -> str:
    buffer = ctypes.create_string_buffer(4096)
    LIBC.snprintf(buffer, ctypes.c_size_t(len(buffer)), fmt.encode(), *arguments)
    return buffer.value.decode()


def in_memory(data: bytes) -> int:
    address = SHARED.slab.kzalloc(max(len(data), 8), "test data")
    SHARED.space.write(address, data)
    return address


@settings(max_examples=400)
@given(
    flags=st.text("-+ #0", max_size=3),
    width=st.one_of(st.just(""), st.integers(1, 24).map(str)),
    precision=st.one_of(st.just(""), st.integers(0, 12).map(".{}".format)),
    size=st.sampled_from(sorted(NUMBER)),
    kind=st.sampled_from("diuxXo"),
    value=st.integers(-(1 << 63), (1 << 64) - 1),
)
@example(flags="#", width="", precision="", size="", kind="o", value=0)
def test_integers_are_printed_as_in_c(
    flags: str, width: str, precision: str, size: str, kind: str, value: int
) -> None:
    if precision:
        flags = flags.replace("0", "")  # the kernel pads with zeroes all the same
        if precision == ".0" and not value & ((1 << 8 * NUMBER[size]) - 1):
            precision = ".1"  # C prints nothing, the kernel 0
    if kind == "o":
        flags = flags.replace("#", "")  # C counts the 0 as a digit
    if kind in "xX" and not value & ((1 << 8 * NUMBER[size]) - 1):
        flags = flags.replace("#", "")  # C prints no 0x before 0
    if kind in "uxXo":
        flags = flags.replace("+", "").replace(" ", "")  # undefined in C
    fmt = f"<%{flags}{width}{precision}{size}{kind}>"
    assert formatted(fmt, value) == in_c(fmt, ctypes.c_uint64(value & WORD))


@settings(max_examples=100)
@given(
    text=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
    flag=st.sampled_from(["", "-"]),
    width=st.integers(0, 24),
    precision=st.one_of(st.none(), st.integers(0, 24)),
)
def test_strings_are_printed_as_in_c(text: str, flag: str, width: int, precision: int | None) -> None:
    SHARED.space.write(TEXT, text.encode() + b"\0")
    fmt = f"[%{flag}{width or ''}{'' if precision is None else f'.{precision}'}s]"
    assert formatted(fmt, TEXT) == in_c(fmt, text.encode())


def test_where_numbers_are_unlike_those_of_c() -> None:
    assert formatted("%08.3d", 7) == "00000007"
    assert formatted("%#x %#o %#o", 0, 0, 8) == "0x0 0 010"
    assert formatted("%.0d", 0) == "0"


def test_width_and_precision_come_as_arguments() -> None:
    assert formatted("%*d|%-*d|%*d|%.*x", 4, 7, 4, 7, -4, 7, 4, 7) == "   7|7   |7   |0007"


def test_a_string_without_an_end_is_read_as_far_as_the_precision_says() -> None:
    top = SHARED.init_task.stack_top  # nothing is mapped above it
    SHARED.space.write(top - 4, b"edge")
    assert formatted("%.4s", top - 4) == "edge"


@pytest.mark.parametrize(
    ("fmt", "argument", "expected"),
    [
        ("%s", 0, "(null)"),
        ("%s", 0x10, "(efault)"),
        ("%s", -14, "(efault)"),
        ("%.3s", 0, "(nu"),
        ("%c", ord("k"), "k"),
        ("100%%", 0, "100%"),
        ("%px", 0xFFFF_8880_0000_1000, "ffff888000001000"),
        ("%px", 0x10, "0000000000000010"),
        ("%p", 0, "0000000000000000"),
        ("%p", -2, "fffffffffffffffe"),
        ("%pe", -12, "-ENOMEM"),
        ("%pS", 0x1234, "0x1234"),
        ("%pGg", 0, "(null)"),
        ("%q then nothing", 0, ""),
    ],
)
def test_special_values_and_forms(fmt: str, argument: int, expected: str) -> None:
    assert formatted(fmt, argument) == expected


def test_a_plain_pointer_is_hashed_to_32_bits_and_always_to_the_same() -> None:
    first, again, other = (formatted("%p", address) for address in (TEXT, TEXT, TEXT + 8))
    assert first == again != other
    assert len(first) == 16
    assert first.startswith("00000000")
    assert f"{TEXT:x}"[-8:] not in first


def test_letters_behind_a_pointer_belong_to_it() -> None:
    assert formatted("%pZZ9, %d", TEXT, 5) == f"{formatted('%p', TEXT)}, 5"


def test_symbols_are_named_as_kallsyms_has_them() -> None:
    entry = SHARED.symbol("area_of")
    size = SHARED.kallsyms.at(entry).size  # type: ignore[union-attr]
    assert formatted("%pS %ps", entry + 5, entry + 5) == f"area_of+0x5/{size:#x} area_of"
    # A return address may be the first byte behind the function that called.
    assert formatted("%pB", entry + size) == f"area_of+{size:#x}/{size:#x}"


def test_what_a_pointer_points_to_is_printed() -> None:
    mac = in_memory(bytes.fromhex("0001a2b3c4d5"))
    assert (
        formatted("%pM %pMF %pm %pMR", *[mac] * 4)
        == "00:01:a2:b3:c4:d5 00-01-a2-b3-c4-d5 0001a2b3c4d5 d5:c4:b3:a2:01:00"
    )
    assert formatted("%pI4 %pi4", *[in_memory(bytes([10, 0, 2, 15]))] * 2) == "10.0.2.15 010.000.002.015"
    assert formatted("%*ph %*phC", 3, mac, 3, mac) == "00 01 a2 00:01:a2"
    bits = in_memory((0b1011_1001 | 1 << 63).to_bytes(8, "little"))
    assert formatted("%*pbl", 64, bits) == "0,3-5,7,63"
    assert formatted("%*pb", 64, bits) == "80000000,000000b9"
    assert formatted("%*pb", 8, bits) == "b9"


def test_allocation_flags_have_names() -> None:
    assert formatted("%pGg", in_memory(struct.pack("<I", 0xCC0))) == "GFP_KERNEL"
    assert gfp_flags(0xCC0 | 0x100) == "GFP_KERNEL|__GFP_ZERO"
    assert gfp_flags(0xA20) == "GFP_ATOMIC"
    assert gfp_flags(1 << 30) == "0x40000000"


def test_a_va_format_is_printed_in_its_place() -> None:
    saved = in_memory(struct.pack("<6Q", 0, 0, 0, 0, 11, 22))
    overflow = in_memory(struct.pack("<Q", 33))
    arguments = in_memory(struct.pack("<IIQQ", 32, 48, overflow, saved))
    va_format = in_memory(struct.pack("<QQ", in_memory(b"%d %d %d\0"), arguments))
    assert formatted("<%pV>", va_format) == "<11 22 33>"


def test_guest_code_hands_arguments_over_in_registers_and_on_the_stack() -> None:
    machine: Machine = boot()
    fmt, buffer = (machine.slab.kzalloc(64, "buffer") for _ in range(2))
    machine.space.write(fmt, b"%d %d %d %d %d %d\0")
    assert machine.call(machine.symbol("snprintf"), buffer, 64, fmt, 1, 2, 3, 4, 5, 6) == 11
    assert machine.space.read(buffer, 12) == b"1 2 3 4 5 6\0"
    assert machine.call(machine.symbol("snprintf"), buffer, 4, fmt, 1, 2, 3, 4, 5, 6) == 11
    assert machine.space.read(buffer, 4) == b"1 2\0"
    assert machine.call(machine.symbol("scnprintf"), buffer, 4, fmt, 1, 2, 3, 4, 5, 6) == 3
    assert machine.call(machine.symbol("scnprintf"), buffer, 0, fmt, 1, 2, 3, 4, 5, 6) == 0
    made = machine.call(machine.symbol("kasprintf"), 0xCC0, fmt, 1, 2, 3, 4, 5, 6)
    assert machine.space.read(made, 12) == b"1 2 3 4 5 6\0"
