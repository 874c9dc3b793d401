"""String functions that are not guest code: lib/string.c, lib/kstrtox.c.

They are answered in Python, where those of emu/exports.py run in the guest.
"""

import errno
import re
from typing import TYPE_CHECKING

from emu.exports import export
from emu.memory import read_string

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = [
    "kstrdup",
    "kstrtoint",
    "kstrtoll",
    "kstrtouint",
    "kstrtoull",
    "strchr",
    "strcmp",
    "strcpy",
    "strlcpy",
    "strncmp",
    "strncpy",
    "strnlen",
    "strrchr",
    "strscpy",
    "strstr",
]

LIMIT = 4096


def _bytes(machine: "Machine", address: int, limit: int = LIMIT) -> bytes:
    """The bytes before the NUL, at most `limit`; what is behind them need not be mapped."""
    found = bytearray()
    while len(found) < limit and (byte := machine.space.read(address + len(found), 1)) != b"\0":
        found += byte
    return bytes(found)


def _compared(one: bytes, other: bytes) -> int:
    return (one > other) - (one < other)


@export
def strcmp(machine: "Machine", one: int, other: int) -> int:
    """Compare two strings: negative, 0 or positive."""
    return _compared(_bytes(machine, one), _bytes(machine, other))


@export
def strncmp(machine: "Machine", one: int, other: int, count: int) -> int:
    """Compare at most so many bytes of two strings."""
    count = min(count, LIMIT)
    return _compared(_bytes(machine, one, count), _bytes(machine, other, count))


@export
def strnlen(machine: "Machine", text: int, count: int) -> int:
    """The length of a string, at most so many."""
    return len(_bytes(machine, text, min(count, LIMIT)))


@export
def strcpy(machine: "Machine", to: int, text: int) -> int:
    """Copy a string."""
    machine.space.write(to, _bytes(machine, text) + b"\0")
    return to


@export
def strncpy(machine: "Machine", to: int, text: int, count: int) -> int:
    """Copy exactly so many bytes, NULs behind the string's end; without a NUL if it is too long."""
    machine.space.write(to, _bytes(machine, text, count)[:count].ljust(count, b"\0"))
    return to


@export
def strscpy(machine: "Machine", to: int, text: int, count: int) -> int:
    """Copy as much as fits, and a NUL; the length, or -E2BIG if that was not all."""
    if not count:
        return -errno.E2BIG
    data = _bytes(machine, text, count)
    machine.space.write(to, data[: count - 1] + b"\0")
    return len(data) if len(data) < count else -errno.E2BIG


@export
def strlcpy(machine: "Machine", to: int, text: int, count: int) -> int:
    """Copy as much as fits, and a NUL; the length of the whole string."""
    data = _bytes(machine, text)
    if count:
        machine.space.write(to, data[: count - 1] + b"\0")
    return len(data)


@export
def strchr(machine: "Machine", text: int, character: int) -> int:
    """Where a byte comes first in a string, its NUL included; NULL if nowhere."""
    at = (_bytes(machine, text) + b"\0").find(character & 0xFF)
    return text + at if at >= 0 else 0


@export
def strrchr(machine: "Machine", text: int, character: int) -> int:
    """Where a byte comes last in a string, its NUL included; NULL if nowhere."""
    at = (_bytes(machine, text) + b"\0").rfind(character & 0xFF)
    return text + at if at >= 0 else 0


@export
def strstr(machine: "Machine", text: int, wanted: int) -> int:
    """Where a string comes first in another; NULL if nowhere."""
    at = _bytes(machine, text).find(_bytes(machine, wanted))
    return text + at if at >= 0 else 0


@export
def kstrdup(machine: "Machine", text: int, _flags: int) -> int:
    """A copy of a string in the slab; NULL for NULL."""
    if not text:
        return 0
    data = read_string(machine.space, text).encode("latin-1", "backslashreplace") + b"\0"
    address = machine.slab.kzalloc(len(data), f"kstrdup by {machine.caller()}")
    machine.space.write(address, data)
    return address


def _kstrto(machine: "Machine", text: int, base: int, to: int, size: int, *, signed: bool) -> int:
    """A whole string, one newline at its end or not, as a number (_kstrtoull()); 0, -EINVAL or -ERANGE."""
    base &= 0xFFFF_FFFF
    digits = read_string(machine.space, text).removesuffix("\n")
    found = re.fullmatch(r"([+-]?)(0[xX](?=[0-9a-fA-F]))?([0-9a-zA-Z]+)", digits)
    if found is None or (found[1] == "-" and not signed) or (found[2] and base not in (0, 16)):
        return -errno.EINVAL
    octal = base == 0 and not found[2] and found[3].startswith("0")
    try:
        value = int(found[3], 16 if found[2] else 8 if octal else base or 10)
    except ValueError:
        return -errno.EINVAL
    value = -value if found[1] == "-" else value
    try:
        machine.space.write(to, value.to_bytes(size, "little", signed=signed))
    except OverflowError:
        return -errno.ERANGE
    return 0


@export
def kstrtoint(machine: "Machine", text: int, base: int, to: int) -> int:
    """An int; base 0 finds it from the prefix."""
    return _kstrto(machine, text, base, to, 4, signed=True)


@export
def kstrtouint(machine: "Machine", text: int, base: int, to: int) -> int:
    """An unsigned int, likewise."""
    return _kstrto(machine, text, base, to, 4, signed=False)


@export
def kstrtoll(machine: "Machine", text: int, base: int, to: int) -> int:
    """A long long, likewise; kstrtol() is this one."""
    return _kstrto(machine, text, base, to, 8, signed=True)


@export
def kstrtoull(machine: "Machine", text: int, base: int, to: int) -> int:
    """An unsigned long long, likewise; kstrtoul() is this one."""
    return _kstrto(machine, text, base, to, 8, signed=False)
