"""Layouts of C structs and unions, taken from an image's own DWARF (versions 4 and 5, as gcc -g writes it).

The sections are prepared here (decompressed, relocated) and walked entry by entry in file order; pyelftools
decodes one entry at a time.  Its own tree walk is not used: it follows DW_AT_sibling wherever that points, so
a damaged file could make it go in circles.  What is walked here always moves forward.
Source of the rules: DWARF 5, sections 5.1 to 5.7 (types) and 7.5.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from elf.dwarf import DwarfError, Entry, entries
from elf.errors import ElfError
from elf.image import Image

__all__ = ["Array", "Integer", "Member", "Pointer", "StructLayout", "StructRef", "TypeRef", "struct_layouts"]


@dataclass(frozen=True, slots=True)
class Integer:
    """A C integer, enum or _Bool of `size` bytes, little-endian."""

    size: int
    signed: bool
    is_bool: bool = False


@dataclass(frozen=True, slots=True)
class Pointer:
    """An 8-byte pointer; `target` is the key in the layouts of the struct it points to, None for others."""

    target: str | None


@dataclass(frozen=True, slots=True)
class StructRef:
    """A struct or union held by value; `name` is its key in the layouts."""

    name: str


@dataclass(frozen=True, slots=True)
class Array:
    """`count` elements one after the other; a flexible array member has 0.

    What is no integer, pointer, struct or array (a float, say) is shown as an array of its bytes.
    """

    element: "TypeRef"
    count: int


TypeRef = Integer | Pointer | StructRef | Array


@dataclass(frozen=True, slots=True)
class Member:
    """A member `offset` bytes from the start of its struct.

    A bit-field has a `bit_size`, and starts `bit_offset` bits above the lowest bit of the little-endian word
    at `offset`; other members have 0 for both.
    """

    name: str
    offset: int
    type: TypeRef
    bit_offset: int = 0
    bit_size: int = 0


@dataclass(frozen=True, slots=True)
class StructLayout:
    """A complete struct or union of `size` bytes; the members of its anonymous members count as its own."""

    name: str
    size: int
    members: Mapping[str, Member]


def struct_layouts(image: Image) -> dict[str, StructLayout]:
    """All complete structs and unions at file scope, by name, in file order; `ElfError` without usable DWARF.

    A struct is called by its tag, a union `union TAG`, one that only a typedef names by the typedef, and one
    without any name `OUTER.MEMBER`.  Two definitions of one name must agree.
    """
    where = image.place("DWARF")
    try:
        return _Layouts(list(entries(image))).named()
    except ElfError:
        raise
    except DwarfError as error:
        raise ElfError(str(error), where=where) from error
    except Exception as error:
        # On damaged input pyelftools raises almost anything: AssertionError, KeyError, struct.error, ...
        raise ElfError(f"cannot be read: {type(error).__name__}: {error}", where=where) from error


_ALIASES: Final = {
    f"DW_TAG_{name}_type" for name in ("const", "volatile", "restrict", "atomic", "packed", "immutable")
} | {"DW_TAG_typedef"}
_AGGREGATES: Final = {"DW_TAG_structure_type": "", "DW_TAG_union_type": "union ", "DW_TAG_class_type": ""}
_ENCODING_BOOLEAN: Final = 0x02
_ENCODINGS_SIGNED: Final = {0x05, 0x06}  # signed, signed_char
_ENCODINGS_INTEGER: Final = {0x02, 0x05, 0x06, 0x07, 0x08, 0x10}  # ... boolean, unsigned, unsigned_char, UTF
_MAX_DEPTH: Final = 64


class _Layouts:
    """Turns entries into layouts; `done` collects them by name."""

    def __init__(self, entries: list[Entry]) -> None:
        self.by_offset = {entry.offset: entry for entry in entries}
        local = {
            id(child)
            for entry in entries
            if entry.tag in ("DW_TAG_subprogram", "DW_TAG_lexical_block")
            for child in entry.children
        }
        self.at_file_scope = [entry for entry in entries if id(entry) not in local]
        self.done: dict[str, StructLayout] = {}
        # Each entry is visited a few times at most, unless the file refers in circles.
        self.budget = 64 * len(entries) + 1024

    def named(self) -> dict[str, StructLayout]:
        for entry in self.at_file_scope:
            if entry.tag in _AGGREGATES and entry.name:
                self.define(_AGGREGATES[entry.tag] + entry.name, entry, 0)
            elif entry.tag == "DW_TAG_typedef":
                target = self.unaliased(entry)
                if target is not None and target.tag in _AGGREGATES and not target.name:
                    self.define(self.aggregate_name(entry) or entry.name, target, 0)
        return self.done

    def define(self, name: str, entry: Entry, depth: int) -> None:
        if "DW_AT_declaration" in entry.attributes:
            return
        size = entry.number("DW_AT_byte_size")
        members: dict[str, Member] = {}
        for member in self.members(name, entry, 0, depth):
            if not 0 <= member.offset <= size:
                raise DwarfError(f"'{name}' has {size} bytes and '{member.name}' at {member.offset}")
            if members.setdefault(member.name, member) is not member:
                raise DwarfError(f"'{name}' has two members '{member.name}'")
        layout = StructLayout(name, size, members)
        if self.done.setdefault(name, layout) != layout:
            raise DwarfError(f"two different definitions of '{name}'")

    def members(self, outer: str, entry: Entry, base: int, depth: int) -> Iterator[Member]:
        self.spend(depth)
        for child in entry.children:
            if child.tag != "DW_TAG_member":
                continue
            offset = base + child.number("DW_AT_data_member_location")
            target = self.unaliased(child)
            if child.name:
                type_ = self.type_of(child, f"{outer}.{child.name}", depth)
                yield _bit_field(child, offset, type_) or Member(child.name, offset, type_)
            elif target is not None and target.tag in _AGGREGATES:
                yield from self.members(outer, target, offset, depth + 1)

    def type_of(self, user: Entry, path: str, depth: int) -> TypeRef:
        """The type that `user` refers to; `path` names it if it is a struct without a name."""
        self.spend(depth)
        entry = self.unaliased(user)
        if entry is None:
            raise DwarfError(f"'{path}' has no type")
        if entry.tag in _AGGREGATES:
            name = self.aggregate_name(user)
            if not name:
                name = path
                self.define(name, entry, depth + 1)
            return StructRef(name)
        if entry.tag == "DW_TAG_pointer_type":
            return Pointer(self.aggregate_name(entry) or None)
        if entry.tag == "DW_TAG_array_type":
            type_ = self.type_of(entry, path, depth + 1)
            for bounds in reversed(
                [child for child in entry.children if child.tag == "DW_TAG_subrange_type"]
            ):
                type_ = Array(type_, _count(bounds))
            return type_
        size = entry.number("DW_AT_byte_size")
        if entry.tag == "DW_TAG_enumeration_type" and "DW_AT_encoding" not in entry.attributes:
            return Integer(size, signed=False)
        encoding = entry.number("DW_AT_encoding")
        if encoding in _ENCODINGS_INTEGER:
            return Integer(size, encoding in _ENCODINGS_SIGNED, encoding == _ENCODING_BOOLEAN)
        return Array(Integer(1, signed=False), size)

    def unaliased(self, user: Entry) -> Entry | None:
        """The type that `user` refers to behind its typedefs and qualifiers; None is void."""
        for entry in self.chain(user):
            if entry.tag not in _ALIASES:
                return entry
        return None

    def aggregate_name(self, user: Entry) -> str:
        """The key of the struct that `user` refers to; empty if that is none, or has no name at all."""
        typedef = ""
        for entry in self.chain(user):
            if entry.tag in _AGGREGATES:
                return _AGGREGATES[entry.tag] + entry.name if entry.name else typedef
            if entry.tag == "DW_TAG_typedef":
                typedef = entry.name
        return ""

    def chain(self, user: Entry) -> Iterator[Entry]:
        for _ in range(_MAX_DEPTH):
            if user.type_offset is None:
                return
            if user.type_offset not in self.by_offset:
                raise DwarfError(f"the entry at {user.offset:#x} refers to no entry")
            user = self.by_offset[user.type_offset]
            yield user
            if user.tag not in _ALIASES:
                return
        raise DwarfError(f"the typedef at {user.offset:#x} refers to itself")

    def spend(self, depth: int) -> None:
        self.budget -= 1
        if self.budget < 0 or depth > _MAX_DEPTH:
            raise DwarfError("a struct contains itself")


def _bit_field(entry: Entry, offset: int, type_: TypeRef) -> Member | None:
    width = entry.number("DW_AT_bit_size")
    if not width or not isinstance(type_, Integer):
        return None
    if "DW_AT_data_bit_offset" in entry.attributes:
        first = 8 * offset + entry.number("DW_AT_data_bit_offset")
    else:
        # DWARF 2 and 3 count from the most significant bit of a word of DW_AT_byte_size bytes.
        word = entry.number("DW_AT_byte_size", type_.size)
        first = 8 * (offset + word) - entry.number("DW_AT_bit_offset") - width
    start = first // (8 * type_.size) * type_.size
    if first + width > 8 * (start + type_.size):
        start = first // 8  # packed across two words of its type
    return Member(entry.name, start, type_, first - 8 * start, width)


def _count(bounds: Entry) -> int:
    """Elements of one dimension: DW_AT_count, or DW_AT_upper_bound + 1; 0 if neither is given."""
    if "DW_AT_count" in bounds.attributes:
        return bounds.number("DW_AT_count")
    if "DW_AT_upper_bound" not in bounds.attributes:
        return 0
    # gcc gives `[0]` the upper bound -1, in a form without sign.
    return (bounds.number("DW_AT_upper_bound") + 1) & 0xFFFFFFFFFFFFFFFF
