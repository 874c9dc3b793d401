"""The form in which people write a call of a guest function: `area_of(3, 0x4)`, `libarc4:arc4_crypt(0)`."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from elf.errors import KlpemuError

if TYPE_CHECKING:
    from klpemu.kernel import Kernel

__all__ = ["CallExpression", "parse_argument", "parse_call"]

_CALL: Final = re.compile(r"\s*([^\s()]+)\s*\(([^()]*)\)\s*")
_NAME: Final = re.compile(r"(\w+:)?[A-Za-z_.$][\w.$]*(,\d+)?")
_NUMBER: Final = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)")


@dataclass(frozen=True, slots=True)
class CallExpression:
    """A guest function by name, and its arguments: numbers, or names that stand for their address."""

    function: str
    arguments: tuple[int | str, ...] = ()

    def __str__(self) -> str:
        return f"{self.function}({', '.join(str(each) for each in self.arguments)})"

    def values(self, kernel: "Kernel") -> list[int]:
        """The arguments as numbers; `SymbolError` for a name that `kernel` does not have."""
        return [each if isinstance(each, int) else kernel.address_of(each) for each in self.arguments]


def parse_call(text: str) -> CallExpression:
    """Parse `function(argument, ...)`; raises `KlpemuError`."""
    found = _CALL.fullmatch(text)
    if found is None or not _NAME.fullmatch(found[1]):
        raise KlpemuError(f"'{text}' is no call", advice="write it like area_of(3, 4)")
    arguments = found[2].split(",") if found[2].strip() else []
    return CallExpression(found[1], tuple(parse_argument(each.strip()) for each in arguments))


def parse_argument(text: str) -> int | str:
    """Parse one argument: decimal, 0x hexadecimal, or the name of a symbol, whose address is meant."""
    if _NUMBER.fullmatch(text):
        value = int(text, 16 if "x" in text.lower() else 10)
        if not -(1 << 63) <= value < 1 << 64:
            raise KlpemuError(f"{text} does not fit 64 bits", advice="an argument is one register")
        return value
    if _NAME.fullmatch(text):
        return text
    raise KlpemuError(
        f"'{text}' is no argument", advice="write a number, 0x and hexadecimal, or a symbol's name"
    )
