"""The kernel's own symbol table, kallsyms, found in an image without the help of symbols.

Source of the form: scripts/kallsyms.c and kernel/kallsyms.c of 6.1.  All parts stand in `.rodata`, each at
the next multiple of 8, in this order:

    kallsyms_offsets        one int a symbol
    kallsyms_relative_base  the address that they count from
    kallsyms_num_syms       an int
    kallsyms_names          for each symbol a length (ULEB128, at most two bytes) and as many tokens of a byte
    kallsyms_markers        where in the names every 256th symbol begins, an int each
    kallsyms_seqs_of_names  the symbols by name, three bytes each; not in every 6.1.y
    kallsyms_token_table    256 strings, each ended by NUL
    kallsyms_token_index    where in the token table each string begins, a short each

6.4 moved the offsets, the base and the seqs behind the token index; kernels without
CONFIG_KALLSYMS_BASE_RELATIVE have 8-byte addresses in place of offsets and base.  Both are read as well.
What is found has to agree with itself in every part, or it is not the table.
"""

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Final

from elf.errors import ElfError
from elf.image import Image, Section
from elf.kernel_symbols import KernelSymbols, elf_symbols

__all__ = ["kallsyms", "kernel_symbols"]

_TOKENS: Final = 256
_INDEX_BYTES: Final = 2 * _TOKENS
_INT: Final = Struct("<I")
_LONG: Final = Struct("<Q")
_MARKED: Final = 256  # symbols a marker
# Every kernel has symbols with each digit, so that a digit is never left for a longer token.
_DIGITS: Final = b"".join(b"%d\0" % digit for digit in range(10))
_FIRST_DIGIT: Final = ord("0")
# kallsyms_num_syms below 2^24 and its padding up to kallsyms_names, before a first length and token.
_COUNT: Final = re.compile(rb"(?s)(?!\0\0\0)(?=...\0\0\0\0\0[^\0])")
_TYPES: Final = frozenset(b"AaBbCDdGgIiNnpRrSsTtUuVvWw?-")
# Steps from name to name, over all places tried: more than real images take, fewer than would hang.
_STEPS_PER_BYTE: Final = 4
_KERNEL_HALF: Final = 1 << 63
_ADDRESSES: Final = 1 << 64
_ADVICE: Final = "give an image with CONFIG_KALLSYMS=y, the vmlinux that is not stripped, or a System.map"


def kernel_symbols(image: Image) -> KernelSymbols:
    """The symbols of the linked kernel `image`: its ELF symbol table, or else its kallsyms.

    Raises `ElfError` if it has neither.
    """
    return elf_symbols(image) if image.symbols else kallsyms(image)


def kallsyms(image: Image) -> KernelSymbols:
    """The symbols in the kallsyms tables of `image`, in table order; addresses as linked.

    With CONFIG_KALLSYMS_ABSOLUTE_PERCPU those of per-CPU variables are offsets in the per-CPU area.
    Raises `ElfError` if there is no such table, or none that agrees with itself.
    """
    # .rodata is where it is; other names are tried for the sake of odd linker scripts.
    sections = sorted(
        (section for section in image.sections if section.is_alloc and not section.is_exec),
        key=lambda section: section.name != ".rodata",
    )
    tried = 0
    for section in sections:
        data = image.contents(section).tobytes()
        for tokens in _token_tables(data, section):
            tried += 1
            for table in _tables(data, section, tokens):
                return table
    if tried:
        what = "kallsyms has a token table, but no names, markers and addresses that agree with it"
    else:
        what = "no kallsyms token table"
    raise ElfError(what, where=image.path, advice=_ADVICE)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A token table from `start` to `end` of its section, its index at `index`."""

    start: int
    end: int
    index: int
    strings: list[str]


def _aligned(section: Section, offset: int) -> int:
    """The next place in the section whose address is a multiple of 8."""
    return offset + -(section.address + offset) % 8


def _token_tables(data: bytes, section: Section) -> Iterator[_Tokens]:
    """Token tables followed by the index that belongs to them."""
    at = data.find(_DIGITS)
    while at >= 0:
        end = at
        for _ in range(_TOKENS - _FIRST_DIGIT):
            end = data.find(b"\0", end) + 1
            if not end:
                return
        index = _aligned(section, end)
        if index + _INDEX_BYTES > len(data):
            return
        places = array("H", data[index : index + _INDEX_BYTES])
        start = at - places[_FIRST_DIGIT]
        if start >= 0 and not places[0]:
            strings = data[start : end - 1].split(b"\0")
            if len(strings) == _TOKENS and all(
                places[token + 1] == places[token] + len(strings[token]) + 1 for token in range(_TOKENS - 1)
            ):
                yield _Tokens(start, end, index, [text.decode("latin-1") for text in strings])
        at = data.find(_DIGITS, at + 1)


def _tables(data: bytes, section: Section, tokens: _Tokens) -> Iterator[KernelSymbols]:
    """What names, markers and addresses say that stand around `tokens` and fit each other."""
    starts_with_type = [bool(text) and ord(text[0]) in _TYPES for text in tokens.strings]
    budget = _STEPS_PER_BYTE * len(data)
    for found in _COUNT.finditer(data, 0, tokens.start):
        at = found.start()
        if (section.address + at) % 8 or not data[at + 8] & 0x7F or at + 9 >= tokens.start:
            continue
        first = data[at + 9] if data[at + 8] < 0x80 else data[at + 10]
        (count,) = _INT.unpack_from(data, at)
        if not starts_with_type[first] or 2 * count > tokens.start - at:
            continue
        pieces, markers = _names(data, at + 8, count, tokens.start)
        budget -= len(pieces)
        if budget < 0:
            return
        if len(pieces) < count:
            continue
        end = _end_of_markers(data, section, at + 8, pieces, markers)
        # What comes next is the token table, or the seqs and then that.
        if end is None or tokens.start not in (end, _aligned(section, end + 3 * count)):
            continue
        for addresses in _addresses(data, section, at, count, tokens):
            joined = tokens.strings.__getitem__
            texts = ["".join(map(joined, data[start:end])) for start, end in pieces]
            yield KernelSymbols(
                [text[1:] for text in texts], "".join([text[:1] for text in texts]), addresses
            )


def _names(data: bytes, start: int, count: int, limit: int) -> tuple[list[tuple[int, int]], int]:
    """Where the tokens of each name begin and end, and the end of all; fewer if they run into `limit`."""
    pieces: list[tuple[int, int]] = []
    at = start
    while len(pieces) < count and at + 1 < limit:
        length = data[at]
        at += 1
        if length & 0x80:
            length = length & 0x7F | data[at] << 7
            at += 1
        if not length or at + length > limit:
            break
        pieces.append((at, at + length))
        at += length
    return pieces, at


def _end_of_markers(
    data: bytes, section: Section, start: int, pieces: list[tuple[int, int]], end: int
) -> int | None:
    """Where the markers of the names from `start` to `end` end, aligned; None if they differ."""
    # A length of two bytes stands before names of more than 127 tokens.
    expected = array(
        "I", [begin - (1 if stop - begin < 0x80 else 2) - start for begin, stop in pieces[::_MARKED]]
    ).tobytes()
    at = _aligned(section, end)
    return _aligned(section, at + len(expected)) if data.startswith(expected, at) else None


def _addresses(data: bytes, section: Section, at: int, count: int, tokens: _Tokens) -> Iterator["array[int]"]:
    """The addresses that can belong to the `count` symbols whose kallsyms_num_syms is at `at`."""
    behind = _aligned(section, tokens.index + _INDEX_BYTES)
    base_behind = _aligned(section, behind + 4 * count)
    base_before = at - 8
    for offsets, base in ((base_before - _padded(4 * count), base_before), (behind, base_behind)):
        if offsets >= 0 and base + 8 <= len(data):
            (relative_base,) = _LONG.unpack_from(data, base)
            yield from _relative(data[offsets : offsets + 4 * count], relative_base)
    for start in (at - 8 * count, behind):
        if start >= 0 and start + 8 * count <= len(data):
            addresses = array("Q", data[start : start + 8 * count])
            if addresses[-1] >= _KERNEL_HALF and _is_ascending(addresses.tolist()):
                yield addresses


def _padded(size: int) -> int:
    return size + -size % 8


def _relative(offsets: bytes, base: int) -> Iterator["array[int]"]:
    """What kallsyms_sym_address() makes of offsets, with CONFIG_KALLSYMS_ABSOLUTE_PERCPU and without."""
    if base < _KERNEL_HALF:
        return
    last = base - 1
    absolute_percpu = [offset if offset >= 0 else last - offset for offset in array("i", offsets)]
    for addresses in (absolute_percpu, [base + offset for offset in array("I", offsets)]):
        if _KERNEL_HALF <= addresses[-1] < _ADDRESSES and _is_ascending(addresses):
            yield array("Q", addresses)


def _is_ascending(addresses: list[int]) -> bool:
    return addresses == sorted(addresses)
