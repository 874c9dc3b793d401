"""Layouts of C structs and unions taken from BTF, in the form that elf/layout.py takes them from DWARF.

A kernel describes some ten thousand structs; each is only made when somebody asks for it.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Final

from elf.btf import Btf, BtfMember, Kind, read_btf
from elf.errors import ElfError
from elf.image import Image
from elf.kernel_symbols import KernelSymbols
from elf.layout import Array, Integer, Member, Pointer, StructLayout, StructRef, TypeRef

__all__ = ["BtfLayouts", "btf_layouts"]

_SIGNED: Final = 1
_BOOL: Final = 4
_QUALIFIERS: Final = {Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG}
_AGGREGATES: Final = {Kind.STRUCT: "", Kind.UNION: "union "}
_UNION_PREFIX: Final = "union "
_MAX_DEPTH: Final = 64
# No struct has as many members; nameless ones that hold each other twice have ever more.
_MAX_MEMBERS: Final = 1 << 16


def btf_layouts(image: Image, symbols: KernelSymbols | None = None) -> "BtfLayouts":
    """The layouts that the BTF of the kernel `image` describes; see `read_btf` for where that is.

    Raises `ElfError` if there is none; damage in a struct is noticed when that struct is asked for.
    """
    return BtfLayouts(read_btf(image, symbols))


class BtfLayouts(Mapping[str, StructLayout]):
    """Layouts by name, named as `elf.layout.struct_layouts` does.

    A struct is called by its tag, a union `union TAG`, one that only a typedef names by the typedef, and one
    without any name `OUTER.MEMBER`, which can be looked up but does not come up in iteration.  Where a kernel
    has several of one name, it is the first one (btf_find_by_name_kind() in kernel/bpf/btf.c).
    """

    def __init__(self, btf: Btf) -> None:
        self.btf = btf
        self._done: dict[str, StructLayout] = {}
        self._left = 0

    def __getitem__(self, name: str) -> StructLayout:
        layout = self._done.get(name)
        if layout is None:
            number = self._numbers.get(name)
            if number is not None:
                self._left = _MAX_MEMBERS
                return self._define(name, number, 0)
            outer, dot, _ = name.rpartition(".")
            if dot and outer in self:
                layout = self._done.get(name)  # came with the struct around it
        if layout is None:
            raise KeyError(name)
        return layout

    def __contains__(self, name: object) -> bool:
        try:
            self[str(name)]
        except KeyError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        btf = self.btf
        found: dict[str, int] = {}
        for (kind, name), number in btf.named.items():
            if kind in _AGGREGATES:
                found[_AGGREGATES[kind] + name] = number
        for (kind, name), number in btf.named.items():
            if kind == Kind.TYPEDEF:
                target = btf.target(number)
                if btf.kind(target) in _AGGREGATES and not btf.name(target):
                    found.setdefault(name, target)
        return found

    def _define(self, name: str, number: int, depth: int) -> StructLayout:
        size = self.btf.size(number)
        members: dict[str, Member] = {}
        for member in self._members(name, number, 0, depth):
            if not 0 <= member.offset <= size:
                raise self._error(f"'{name}' has {size} bytes and '{member.name}' at {member.offset}")
            if members.setdefault(member.name, member) is not member:
                raise self._error(f"'{name}' has two members '{member.name}'")
        layout = self._done[name] = StructLayout(name, size, members)
        return layout

    def _members(self, outer: str, number: int, base: int, depth: int) -> Iterator[Member]:
        """The members of type `number`, which starts `base` bits into the struct `outer`."""
        for member in self.btf.members(number):
            self._spend(depth)
            bits = base + member.bits
            target = self._unaliased(member.type)
            if member.name:
                type_ = self._type_of(member.type, f"{outer}.{member.name}", depth)
                yield _placed(member, bits, type_)
            elif self.btf.kind(target) in _AGGREGATES:
                yield from self._members(outer, target, bits, depth + 1)

    def _type_of(self, number: int, path: str, depth: int) -> TypeRef:
        """The type `number`; `path` names it if it is a struct without a name."""
        self._spend(depth)
        btf = self.btf
        target = self._unaliased(number)
        kind = btf.kind(target)
        if kind in _AGGREGATES:
            name = self._aggregate_name(number)
            if not name:
                name = path
                self._define(name, target, depth + 1)
            return StructRef(name)
        if kind == Kind.PTR:
            return Pointer(self._aggregate_name(btf.target(target)) or None)
        if kind == Kind.ARRAY:
            element, count = btf.array_of(target)
            return Array(self._type_of(element, path, depth + 1), count)
        size = btf.size(target)
        if kind == Kind.INT:
            encoding = btf.encoding(target)
            return Integer(size, bool(encoding & _SIGNED), bool(encoding & _BOOL))
        if kind in (Kind.ENUM, Kind.ENUM64):
            return Integer(size, btf.flag(target))
        if kind == Kind.FLOAT:
            return Array(Integer(1, signed=False), size)
        raise self._error(f"'{path}' is of type {target}, a {kind.name}, which has no size")

    def _unaliased(self, number: int) -> int:
        """The type behind typedefs and qualifiers."""
        for _ in range(_MAX_DEPTH):
            if self.btf.kind(number) not in _QUALIFIERS:
                return number
            number = self.btf.target(number)
        raise self._error(f"type {number} refers to itself")

    def _aggregate_name(self, number: int) -> str:
        """The key of the struct that is type `number`; empty if that is none, or has no name at all."""
        typedef = ""
        for _ in range(_MAX_DEPTH):
            kind = self.btf.kind(number)
            if kind in _AGGREGATES:
                name = self.btf.name(number)
                return _AGGREGATES[kind] + name if name else typedef
            if kind == Kind.FWD:
                return (_UNION_PREFIX if self.btf.flag(number) else "") + self.btf.name(number)
            if kind not in _QUALIFIERS:
                return ""
            if kind == Kind.TYPEDEF:
                typedef = self.btf.name(number)
            number = self.btf.target(number)
        raise self._error(f"type {number} refers to itself")

    def _spend(self, depth: int) -> None:
        self._left -= 1
        if self._left < 0 or depth > _MAX_DEPTH:
            raise self._error("a struct contains itself, or has more members than any has")

    def _error(self, what: str) -> ElfError:
        return ElfError(what, where=self.btf.path)


def _placed(member: BtfMember, bits: int, type_: TypeRef) -> Member:
    if not member.width or not isinstance(type_, Integer) or not type_.size:
        return Member(member.name, bits // 8, type_)
    start = bits // (8 * type_.size) * type_.size
    if bits + member.width > 8 * (start + type_.size):
        start = bits // 8  # packed across two words of its type
    return Member(member.name, start, type_, bits - 8 * start, member.width)
