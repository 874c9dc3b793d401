"""BTF, the type information that a kernel carries in its own memory: the types by number and by name.

Types are only indexed when they are read; what one says is decoded when somebody asks for it.
elf/btf_layout.py makes layouts of structs from them.
Source of the form: include/uapi/linux/btf.h and Documentation/bpf/btf.rst of 6.1.
"""

import enum
from array import array
from collections.abc import Iterator
from functools import cached_property
from struct import Struct
from typing import Final, NamedTuple

from elf.errors import ElfError
from elf.image import Image
from elf.kernel_symbols import KernelSymbols, kernel_table
from elf.symbols import string_at

__all__ = ["Btf", "BtfMember", "Kind", "read_btf"]

_MAGIC: Final = 0xEB9F
_VERSION: Final = 1
_HEADER: Final = Struct("<HBBIIIII")
_ADVICE: Final = "give an image with CONFIG_DEBUG_INFO_BTF=y, or a vmlinux with DWARF"


class Kind(enum.IntEnum):
    """BTF_KIND_*: what a type is."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


# Words of 4 bytes behind struct btf_type: so many in any case, and so many for each of `vlen` entries.
_WORDS: Final = {Kind.INT: 1, Kind.ARRAY: 3, Kind.VAR: 1, Kind.DECL_TAG: 1}
_WORDS_AN_ENTRY: Final = {
    Kind.STRUCT: 3,
    Kind.UNION: 3,
    Kind.ENUM: 2,
    Kind.FUNC_PROTO: 2,
    Kind.DATASEC: 3,
    Kind.ENUM64: 3,
}
_FIXED: Final = tuple(3 + _WORDS.get(kind, 0) for kind in Kind)
_PER_ENTRY: Final = tuple(_WORDS_AN_ENTRY.get(kind, 0) for kind in Kind)


class BtfMember(NamedTuple):
    """A member of a struct or union: its type's number, its place in bits, its width if it is a bit-field."""

    name: str
    type: int
    bits: int
    width: int


class Btf:
    """The types of one BTF section; number 0 is void.

    With a `base`, the section is split BTF as modules have it: its numbers and strings go on where those of
    the base, the kernel's, end.
    """

    def __init__(self, data: bytes, path: str, base: "Btf | None" = None) -> None:
        self.path = path
        self.base = base
        self._words, self._strings = self._read_header(data)
        self._first = base.count if base else 1
        self._string_base = base.string_end if base else 0
        self._with_names: list[int] = []  # indexes in _places of what `named` has
        self._places = self._index()

    @property
    def count(self) -> int:
        """One more than the highest type number, void and the base's included."""
        return self._first + len(self._places)

    @property
    def string_end(self) -> int:
        """Where the strings of split BTF on top of this one begin."""
        return self._string_base + len(self._strings)

    def kind(self, number: int) -> Kind:
        """What type `number` is; `ElfError` if there is no such type."""
        return Kind(self._type(number)[1] >> 24 & 0x1F)

    def name(self, number: int) -> str:
        """Its name; empty if it has none."""
        return self.string(self._type(number)[0])

    def size(self, number: int) -> int:
        """Bytes of an int, float, enum, struct or union."""
        return self._type(number)[2]

    def target(self, number: int) -> int:
        """The type that a pointer, typedef or qualifier refers to."""
        return self._type(number)[2]

    def flag(self, number: int) -> bool:
        """kind_flag: an enum has negative values, a forward declaration is one of a union."""
        return bool(self._type(number)[1] >> 31)

    def encoding(self, number: int) -> int:
        """BTF_INT_ENCODING of an int: 1 signed, 2 char, 4 bool."""
        return self._type(number)[3] >> 24 & 0xF

    def array_of(self, number: int) -> tuple[int, int]:
        """The type of an array's elements and their count."""
        words = self._type(number)
        return words[3], words[5]

    def members(self, number: int) -> Iterator[BtfMember]:
        """The members of a struct or union, in their order."""
        words = self._type(number)
        has_widths = words[1] >> 31
        for at in range(3, len(words), 3):
            name, type_, bits = words[at : at + 3]
            width = 0
            if has_widths:
                bits, width = bits & 0xFFFFFF, bits >> 24
            elif self.kind(type_) == Kind.INT:
                # Bit-fields the old way are ints of fewer bits than their size has.
                packed = self._type(type_)[3]
                if packed & 0xFF != 8 * self.size(type_) or packed >> 16 & 0xFF:
                    bits, width = bits + (packed >> 16 & 0xFF), packed & 0xFF
            yield BtfMember(self.string(name), type_, bits, width)

    def enumerators(self, name: str) -> dict[str, int]:
        """The constants of `enum name` and their values; `ElfError` if there is no such enum."""
        number = self.named.get((Kind.ENUM, name)) or self.named.get((Kind.ENUM64, name))
        if number is None:
            raise ElfError(f"no enum {name}", where=self.path)
        words = self._type(number)
        bits = 32 if self.kind(number) == Kind.ENUM else 64
        values = {}
        for at in range(3, len(words), bits // 32 + 1):
            value = words[at + 1] | (words[at + 2] << 32 if bits == 64 else 0)
            if self.flag(number) and value >> (bits - 1):
                value -= 1 << bits
            values[self.string(words[at])] = value
        return values

    @cached_property
    def named(self) -> dict[tuple[Kind, str], int]:
        """The first of each kind and name, as btf_find_by_name_kind() finds it (kernel/bpf/btf.c).

        Structs, unions, enums and typedefs are indexed.
        """
        found = dict(self.base.named) if self.base else {}
        words = self._words
        for index in self._with_names:
            place = self._places[index]
            kind = _NAMED[words[place + 1] >> 24 & 0x1F]
            found.setdefault((kind, self.string(words[place])), self._first + index)
        return found

    def string(self, offset: int) -> str:
        """The string at `offset` of the string section; `ElfError` if it is outside."""
        if offset < self._string_base and self.base:
            return self.base.string(offset)
        text = string_at(self._strings, offset - self._string_base)
        if text is None:
            raise ElfError(f"a name at {offset:#x}, where no string ends", where=self.path)
        return text

    def _type(self, number: int) -> "array[int]":
        if number < self._first:
            if self.base:
                return self.base._type(number)
            if number == 0:
                return _VOID
        if not self._first <= number < self.count:
            raise ElfError(f"type {number} does not exist, there are {self.count}", where=self.path)
        place = self._places[number - self._first]
        info = self._words[place + 1]
        kind = info >> 24 & 0x1F
        return self._words[place : place + _FIXED[kind] + (info & 0xFFFF) * _PER_ENTRY[kind]]

    def _read_header(self, data: bytes) -> tuple["array[int]", bytes]:
        if len(data) < _HEADER.size:
            raise ElfError(f"{len(data)} bytes are no BTF", where=self.path, advice=_ADVICE)
        magic, version, _flags, header, types, types_size, strings, strings_size = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != _VERSION:
            raise ElfError(
                f"magic {magic:#x}, version {version}; expected {_MAGIC:#x}, 1",
                where=self.path,
                advice=_ADVICE,
            )
        for what, start, size in (("types", types, types_size), ("strings", strings, strings_size)):
            if header + start + size > len(data) or header < _HEADER.size:
                raise ElfError(
                    f"{size:#x} bytes of {what} at {header + start:#x}; BTF ends at {len(data):#x}",
                    where=self.path,
                )
        if types_size % 4:
            raise ElfError(f"{types_size:#x} bytes of types; expected whole words", where=self.path)
        words = array("I", data[header + types : header + types + types_size])
        return words, data[header + strings : header + strings + strings_size]

    def _index(self) -> "array[int]":
        words, end = self._words, len(self._words)
        places = array("I")
        at = 0
        try:
            while at < end:
                places.append(at)
                info = words[at + 1]
                kind = info >> 24 & 0x1F
                if kind in _NAMED and words[at]:
                    self._with_names.append(len(places) - 1)
                at += _FIXED[kind] + (info & 0xFFFF) * _PER_ENTRY[kind]
        except IndexError:
            raise ElfError(
                f"type {self._first + len(places) - 1} is cut off or of an unknown kind", where=self.path
            ) from None
        if at != end:
            raise ElfError("the last type is cut off", where=self.path)
        return places


_VOID: Final = array("I", [0, 0, 0])
_NAMED: Final = {int(kind): kind for kind in (Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.TYPEDEF, Kind.ENUM64)}


def read_btf(image: Image, symbols: KernelSymbols | None = None, base: Btf | None = None) -> Btf:
    """The BTF of `image`: its section `.BTF`, or what is between the symbols __start_BTF and __stop_BTF.

    For a module, `base` is the BTF of its kernel.  Raises `ElfError` if there is none, or if it is damaged.
    """
    where = image.place(".BTF")
    table = kernel_table(image, symbols, ".BTF", ("__start_BTF", "__stop_BTF"))
    if table is not None:
        return Btf(table[0], where, base)
    raise ElfError("no BTF", where=image.path, advice=_ADVICE)
