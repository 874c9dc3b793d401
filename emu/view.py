"""Typed views of guest memory: a C struct at an address, its members under the kernel's names.

A view holds no value.  Every access goes to guest memory, so two views of one struct always agree with each
other and with whatever guest code reads.  Layouts come from the image's debug information, never from this
file.

A view's own attributes end in an underscore (`address_`), so that every member name stays free for the
kernel.
"""

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from elf.errors import KlpemuError
from elf.layout import Array, Integer, Member, Pointer, StructLayout, StructRef
from emu.memory import Memory, WritableMemory

__all__ = ["GuestVariable", "Layouts", "Struct", "container_of", "list_for_each_entry"]


class Struct:
    """A C struct at the guest virtual address `address_`; members are attributes.

    Integers and pointers read as `int` (a pointer is the address it holds), `bool` as `bool`; a nested struct
    reads as a view of itself, an array of bytes as `bytes`.  Assignment stores.
    """

    __slots__ = ("address_", "memory_")

    layout_: StructLayout
    layouts_: "Layouts"

    def __init__(self, memory: Memory, address: int) -> None:
        self.memory_ = memory
        self.address_ = address

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Struct)
            and self.address_ == other.address_
            and self.layout_.name == other.layout_.name
        )

    def __hash__(self) -> int:
        return hash((self.layout_.name, self.address_))

    def __repr__(self) -> str:
        return f"(struct {self.layout_.name} *){self.address_:#x}"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"struct {self.layout_.name} has no member {name!r}")

    def member_(self, name: str) -> int:
        """Guest virtual address of a member."""
        return self.address_ + self.layouts_.offsetof(self.layout_.name, name)

    def follow_(self, name: str) -> Any:
        """The struct that a pointer member points to; None for NULL."""
        kind = self.layout_.members[name].type
        if not isinstance(kind, Pointer) or kind.target is None:
            raise TypeError(f"{self.layout_.name}.{name} is not a pointer to a struct")
        address = getattr(self, name)
        return self.layouts_.view(kind.target, self.memory_, address) if address else None


class Layouts:
    """All struct layouts of one image, and the view classes made from them."""

    def __init__(self, layouts: Mapping[str, StructLayout]) -> None:
        self._layouts = layouts
        self._classes: dict[str, type[Struct]] = {}
        self._offsets: dict[tuple[str, str], int] = {}

    def __getitem__(self, name: str) -> StructLayout:
        try:
            return self._layouts[name]
        except KeyError:
            raise KlpemuError(
                f"the kernel image describes no struct {name}",
                advice="build it with -g, and with kernel.h's structs in it",
            ) from None

    def sizeof(self, name: str) -> int:
        """Size of a struct in bytes."""
        return self[name].size

    def offsetof(self, name: str, member: str) -> int:
        """Offset of a member in bytes; `a.b` reaches into a nested struct."""
        try:
            return self._offsets[name, member]
        except KeyError:
            pass
        offset = 0
        layout = self[name]
        for step in member.split("."):
            found = layout.members.get(step)
            if found is None:
                raise KlpemuError(f"struct {layout.name} of this kernel image has no member {step}")
            offset += found.offset
            if isinstance(found.type, StructRef):
                layout = self[found.type.name]
        self._offsets[name, member] = offset
        return offset

    def view(self, name: str, memory: Memory, address: int) -> Any:
        """A `Struct`: the view of the struct `name` at a guest virtual address."""
        try:
            return self._classes[name](memory, address)
        except KeyError:
            return self.class_of(name)(memory, address)

    def class_of(self, name: str) -> type[Struct]:
        """The class of the views of the struct `name`."""
        cls = self._classes.get(name)
        if cls is None:
            cls = self._classes[name] = self._make_class(self[name])
        return cls

    def _make_class(self, layout: StructLayout) -> type[Struct]:
        body: dict[str, Any] = {"__slots__": (), "layout_": layout, "layouts_": self}
        for member in layout.members.values():
            body[member.name] = _accessor(member, self)
        return type(layout.name, (Struct,), body)


class GuestVariable:
    """A global variable of the kernel, a number or a pointer; `code` is its struct format, "<Q" or "<i"."""

    def __init__(self, memory: Memory, address: int, code: str = "<Q") -> None:
        self._memory = memory
        self._code = struct.Struct(code)
        self.address = address

    def get(self) -> int:
        """Its value in guest memory."""
        return cast(int, self._code.unpack(self._memory.read(self.address, self._code.size))[0])

    def set(self, value: Any) -> None:
        """Store a number, or the address of a view."""
        number = value.address_ if isinstance(value, Struct) else value
        cast(WritableMemory, self._memory).write(self.address, self._code.pack(number))


def container_of(view: Struct, name: str, member: str) -> Any:
    """The struct `name` that `view` is the member `member` of (include/linux/container_of.h)."""
    offset = view.layouts_.offsetof(name, member)
    return view.layouts_.view(name, view.memory_, view.address_ - offset)


def list_for_each_entry(head: Struct, name: str, member: str) -> Iterator[Any]:
    """The structs `name` linked into the list `head` by their `member`, first to last (include/linux/list.h).

    As with the kernel's macro, the current entry must stay linked while the loop body runs; for the _safe
    form make a list of the entries first.
    """
    offset = head.layouts_.offsetof(name, member)
    at = cast(int, head.next)
    while at != head.address_:
        entry = head.layouts_.view(name, head.memory_, at - offset)
        yield entry
        at = getattr(entry, member).next


_FORMATS = {(1, False): "B", (2, False): "<H", (4, False): "<I", (8, False): "<Q"} | {
    (1, True): "b",
    (2, True): "<h",
    (4, True): "<i",
    (8, True): "<q",
}


def _accessor(member: Member, layouts: Layouts) -> property:
    kind, offset = member.type, member.offset
    if isinstance(kind, Pointer):
        return _scalar(offset, struct.Struct("<Q"))
    if isinstance(kind, Integer):
        code = struct.Struct(_FORMATS[kind.size, kind.signed])
        return _truth(offset, code) if kind.is_bool else _scalar(offset, code)
    if isinstance(kind, StructRef):
        return _nested(offset, kind.name, layouts)
    return _array(offset, kind)


def _scalar(offset: int, code: struct.Struct) -> property:
    size, unpack = code.size, code.unpack

    def get(self: Struct) -> Any:
        return unpack(self.memory_.read(self.address_ + offset, size))[0]

    return property(get, _store(offset, code))


def _truth(offset: int, code: struct.Struct) -> property:
    return property(
        lambda self: any(self.memory_.read(self.address_ + offset, code.size)), _store(offset, code)
    )


def _store(offset: int, code: struct.Struct) -> Callable[[Struct, Any], None]:
    size, pack = code.size, code.pack

    def put(self: Struct, value: Any) -> None:
        number = value.address_ if isinstance(value, Struct) else value
        try:
            data = pack(number)
        except struct.error:
            raise KlpemuError(f"{number!r} does not fit a member of {size} bytes", where=repr(self)) from None
        self.memory_.write(self.address_ + offset, data)  # type: ignore[attr-defined]  # or it is read only

    return put


def _nested(offset: int, name: str, layouts: Layouts) -> property:
    kind: type[Struct] | None = None

    def get(self: Struct) -> Any:
        nonlocal kind
        if kind is None:  # not before it is asked for: the image need not describe it
            kind = layouts.class_of(name)
        return kind(self.memory_, self.address_ + offset)

    return property(get)


def _array(offset: int, kind: Array) -> property:
    element = kind.element
    if not isinstance(element, Integer) or element.size != 1:
        # Nothing the services touch is an array of anything larger; its address is what a caller can want.
        return property(lambda self: self.address_ + offset)

    def get(self: Struct) -> bytes:
        return self.memory_.read(self.address_ + offset, kind.count)

    def put(self: Struct, value: bytes) -> None:
        if len(value) > kind.count:
            raise ValueError(f"{len(value)} bytes do not fit the {kind.count} of the array")
        data = value.ljust(kind.count, b"\0")
        cast(WritableMemory, self.memory_).write(self.address_ + offset, data)

    return property(get, put)
