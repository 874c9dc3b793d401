"""Relocation of sections of an x86-64 image: psABI table 4.10 ("Relocation Types"), RELA only.

In the formulas S is the symbol's value, A the addend, P the address of the field, all modulo 2**64.
Supported are the types of apply_relocate_add() in arch/x86/kernel/module.c; others are refused by name.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, cast

from elf.errors import ElfError, RelocationError
from elf.image import Image, Section

__all__ = [
    "NAMES",
    "RELA",
    "RULES",
    "R_X86_64_32",
    "R_X86_64_32S",
    "R_X86_64_64",
    "R_X86_64_NONE",
    "R_X86_64_PC32",
    "R_X86_64_PC64",
    "R_X86_64_PLT32",
    "R_X86_64_RELATIVE",
    "Rule",
    "apply_relocations",
    "relocations",
    "type_name",
]

_NAMES_IN_ORDER: Final = """
    NONE 64 PC32 GOT32 PLT32 COPY GLOB_DAT JUMP_SLOT RELATIVE GOTPCREL 32 32S 16 PC16 8 PC8 DTPMOD64 DTPOFF64
    TPOFF64 TLSGD TLSLD DTPOFF32 GOTTPOFF TPOFF32 PC64 GOTOFF64 GOTPC32 GOT64 GOTPCREL64 GOTPC64 GOTPLT64
    PLTOFF64 SIZE32 SIZE64 GOTPC32_TLSDESC TLSDESC_CALL TLSDESC IRELATIVE RELATIVE64 PC32_BND PLT32_BND
    GOTPCRELX REX_GOTPCRELX CODE_4_GOTPCRELX CODE_4_GOTTPOFF CODE_4_GOTPC32_TLSDESC CODE_5_GOTPCRELX
    CODE_5_GOTTPOFF CODE_5_GOTPC32_TLSDESC CODE_6_GOTPCRELX CODE_6_GOTTPOFF CODE_6_GOTPC32_TLSDESC
"""
NAMES: Final = {number: f"R_X86_64_{name}" for number, name in enumerate(_NAMES_IN_ORDER.split())}

R_X86_64_NONE: Final = 0
R_X86_64_64: Final = 1
R_X86_64_PC32: Final = 2
R_X86_64_PLT32: Final = 4
R_X86_64_RELATIVE: Final = 8
R_X86_64_32: Final = 10
R_X86_64_32S: Final = 11
R_X86_64_PC64: Final = 24


@dataclass(frozen=True, slots=True)
class Rule:
    """How one relocation type is calculated: bytes of its field, and the range that the value must have."""

    formula: str
    size: int
    minimum: int
    maximum: int

    @property
    def is_relative(self) -> bool:
        """The formula subtracts P, the address of the field."""
        return self.formula.endswith("P")


_UNSIGNED32: Final = (4, 0, 2**32 - 1)
_SIGNED32: Final = (4, -(2**31), 2**31 - 1)
_ANY64: Final = (8, 0, 2**64 - 1)

RULES: Final[dict[int, Rule]] = {
    R_X86_64_64: Rule("S + A", *_ANY64),
    R_X86_64_PC32: Rule("S + A - P", *_SIGNED32),
    # psABI: L + A - P.  Kernel code has no PLT, so L, the PLT entry of the symbol, is the symbol itself.
    R_X86_64_PLT32: Rule("S + A - P", *_SIGNED32),
    R_X86_64_32: Rule("S + A", *_UNSIGNED32),
    R_X86_64_32S: Rule("S + A", *_SIGNED32),
    R_X86_64_PC64: Rule("S + A - P", *_ANY64),
}

RELA: Final = struct.Struct("<QQq")
_U32: Final = struct.Struct("<I")
_S32: Final = struct.Struct("<i")
_U64: Final = struct.Struct("<Q")
_ZERO: Final = (0,)


def type_name(number: int) -> str:
    """The psABI's name of relocation type `number`, or the number itself if the psABI has none."""
    return NAMES.get(number, f"relocation type {number}")


def relocations(image: Image, rela: Section) -> Iterator[tuple[int, int, int, int]]:
    """The entries of `rela` in file order: offset, type, symbol index, addend.

    The offset is in bytes from the start of the target section in ET_REL, a virtual address otherwise.
    """
    for offset, info, addend in RELA.iter_unpack(image.contents(rela)):
        yield offset, info & 0xFFFFFFFF, info >> 32, addend


def apply_relocations(
    image: Image,
    rela: Section,
    *,
    target: bytearray | memoryview,
    target_address: int,
    symbol_values: Sequence[int | None],
) -> None:
    """Apply all entries of `rela` to `target`, the whole target section, which will run at `target_address`.

    `symbol_values` are guest virtual addresses indexed by symbol, None for one without a value.  Raises
    `RelocationError` at the first entry that cannot be applied; what `target` holds then is to be thrown
    away.  Where the kernel has a message for it, that message is the error's `what`.  The range check of PC32
    and PLT32 is the psABI's; the kernel, whose modules are always near, leaves it out.
    """
    section = image.section_by_index(rela.info, rela.name)
    symbols = image.symbols_of(image.section_by_index(rela.link, rela.name))
    if not image.is_relocatable:
        raise ElfError("already linked; only ET_REL can be relocated", where=image.place(rela.name))
    if len(target) != section.size or len(symbol_values) != len(symbols):
        raise ElfError(
            f"{len(target):#x} bytes and {len(symbol_values)} symbol values given; the section has "
            f"{section.size:#x} bytes and the file {len(symbols)} symbols",
            where=image.place(section.name),
        )
    values = cast(Sequence[int], symbol_values)  # a None among them raises TypeError in the sum
    u32_at, u32_into, s32_into = _U32.unpack_from, _U32.pack_into, _S32.pack_into
    u64_at, u64_into = _U64.unpack_from, _U64.pack_into
    for offset, info, addend in RELA.iter_unpack(image.contents(rela)):
        kind = info & 0xFFFFFFFF
        try:
            # A plain sum that fits the field is right; one that does not may still fit modulo 2**64.
            if kind in (R_X86_64_PC32, R_X86_64_PLT32):
                if u32_at(target, offset) != _ZERO:
                    raise ValueError
                s32_into(target, offset, values[info >> 32] + addend - target_address - offset)
            elif kind == R_X86_64_64:
                if u64_at(target, offset) != _ZERO:
                    raise ValueError
                u64_into(target, offset, values[info >> 32] + addend)
            elif kind == R_X86_64_32S:
                if u32_at(target, offset) != _ZERO:
                    raise ValueError
                s32_into(target, offset, values[info >> 32] + addend - 2**64)
            elif kind == R_X86_64_32:
                if u32_at(target, offset) != _ZERO:
                    raise ValueError
                u32_into(target, offset, values[info >> 32] + addend)
            elif kind != R_X86_64_NONE:
                raise ValueError
        except (ValueError, TypeError, IndexError, OverflowError, struct.error):
            _apply_with_care(image, rela, section, target, target_address, values, (offset, info, addend))


def _apply_with_care(
    image: Image,
    rela: Section,
    section: Section,
    target: bytearray | memoryview,
    target_address: int,
    symbol_values: Sequence[int | None],
    entry: tuple[int, int, int],
) -> None:
    """Apply one entry by its `Rule`, or say exactly why it cannot be applied."""
    offset, info, addend = entry
    kind, index = info & 0xFFFFFFFF, info >> 32
    where = image.place(f"{section.name}+{offset:#x}: {type_name(kind)}")
    rule = RULES.get(kind)
    if rule is None:
        raise RelocationError(
            f"Unknown rela relocation: {kind}", where=where, advice="build with -mcmodel=kernel -fno-pic"
        )
    if offset + rule.size > section.size:
        raise RelocationError(
            f"field of {rule.size} bytes is outside the section of {section.size:#x}", where=where
        )
    symbols = image.symbols_of(image.section_by_index(rela.link, rela.name))
    if index >= len(symbols):
        raise RelocationError(f"symbol {index} does not exist, there are {len(symbols)}", where=where)
    name = symbols[index].name or f"symbol {index}"
    value = symbol_values[index]
    if value is None:
        raise RelocationError(f"against '{name}', which has no value", where=where)
    total = (value + addend) % 2**64
    field = slice(offset, offset + rule.size)
    if any(target[field]):
        raise RelocationError(
            "Skipping invalid relocation target, existing value is nonzero for type "
            f"{kind}, loc {target_address + offset:#x}, val {total:x}",
            where=where,
            advice="the field is already relocated, or the object was not built with RELA",
        )
    if rule.is_relative:
        total = (total - target_address - offset) % 2**64
    number = total - 2**64 if rule.minimum < 0 and total >= 2**63 else total
    if not rule.minimum <= number <= rule.maximum:
        raise RelocationError(
            f"overflow in relocation type {kind} val {total:x}",
            where=f"{where} against '{name}'",
            advice=f"{rule.formula} must be from {rule.minimum:#x} to {rule.maximum:#x}",
        )
    target[field] = (number % 2 ** (8 * rule.size)).to_bytes(rule.size, "little")
