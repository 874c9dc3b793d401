"""Writes BTF type by type: a test says exactly what is in it."""

from struct import pack

from elf.btf import Kind

Member = tuple[str, int, int]


class BtfWriter:
    """Types in the order in which they are added, from number `first` on; strings from `string_base` on."""

    def __init__(self, first: int = 1, string_base: int = 0) -> None:
        self.types = bytearray()
        self.next = first
        self.string_base = string_base
        self.strings = bytearray(b"" if string_base else b"\0")

    def name(self, text: str) -> int:
        if not text:
            return 0
        at = self.string_base + len(self.strings)
        self.strings += text.encode() + b"\0"
        return at

    def add(
        self, kind: Kind, name: str = "", size: int = 0, *words: int, vlen: int = 0, flag: bool = False
    ) -> int:
        """The number of a new type; `size` is its size or the type it refers to, `words` what is behind."""
        info = flag << 31 | kind << 24 | vlen
        numbers = (self.name(name), info, size, *(word % 2**32 for word in words))
        self.types += pack(f"<{len(numbers)}I", *numbers)
        self.next += 1
        return self.next - 1

    def integer(self, name: str, size: int, encoding: int = 0, bits: int = 0, offset: int = 0) -> int:
        return self.add(Kind.INT, name, size, encoding << 24 | offset << 16 | (bits or 8 * size))

    def struct(
        self,
        name: str,
        size: int,
        *members: tuple[str, int, int],
        kind: Kind = Kind.STRUCT,
        flag: bool = False,
    ) -> int:
        """`members` are (name, type, offset in bits); with `flag` the high byte of that is a width."""
        words = [word for text, type_, bits in members for word in (self.name(text), type_, bits)]
        return self.add(kind, name, size, *words, vlen=len(members), flag=flag)

    def array(self, element: int, count: int) -> int:
        return self.add(Kind.ARRAY, "", 0, element, element, count)

    def data(self) -> bytes:
        size = len(self.types)
        header = pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, size, size, len(self.strings))
        return header + bytes(self.types) + bytes(self.strings)
