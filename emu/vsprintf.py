"""The kernel's formatted printing: lib/vsprintf.c.

Arguments come from the registers and the stack of a variadic call (`variadic`) or out of a `va_list`
(`va_list`), one 64-bit word each; a kernel has no floating point.  A conversion that is not carried out here
prints as an unknown one of `%p` does in a kernel: as a hashed pointer.
"""

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from emu.exports import export
from emu.gfp_flags import gfp_flags
from emu.memory import MemoryFault, read_string, read_u32, read_u64
from emu.traps import ARGUMENTS

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["va_list", "variadic", "vsprintf"]

CONVERSION: Final = re.compile(
    r"%(?P<flags>[-+ #0]*)(?P<width>\d+|\*)?(?:\.(?P<precision>\*|\d*))?"
    r"(?P<size>hh|h|ll|l|L|z|Z|t)?(?P<type>.)",
    re.DOTALL,
)
# What may follow %p (Documentation/core-api/printk-formats.rst), as far as it is carried out.
POINTER_FORM: Final = re.compile(r"SR|S|s|B|x|K|e|V|Gg|bl|b|h[CDN]?|M[RF]?|m[RF]?|I4|i4")
SIZES: Final = {"hh": 8, "h": 16, "l": 64, "ll": 64, "L": 64, "z": 64, "Z": 64, "t": 64}
PAGE_SIZE, MAX_ERRNO = 4096, 4095
LONGEST: Final = 4096  # KSYM_NAME_LEN and PRINTK_MESSAGE_MAX are less


@dataclass(frozen=True, slots=True)
class Spec:
    """A conversion's flags, width and precision (-1: none): struct printf_spec."""

    flags: str
    width: int = 0
    precision: int = -1

    @property
    def left(self) -> bool:
        return "-" in self.flags

    @property
    def zero(self) -> bool:
        return "0" in self.flags and not self.left


def variadic(machine: "Machine", named: int) -> Iterator[int]:
    """The arguments of the running export behind its `named` first ones (psABI 3.5.7), 64 bits each."""
    registers = machine.hub.current.cpu.registers()
    yield from (registers[name] for name in ARGUMENTS[named:])
    at = registers["rsp"] + 8  # above the return address
    while True:
        yield read_u64(machine.space, at)
        at += 8


def va_list(machine: "Machine", address: int) -> Iterator[int]:
    """The arguments that a `va_list` in guest memory still has (psABI 3.5.7, figure 3.34), 64 bits each.

    What is taken is not marked as taken there.
    """
    offset = read_u32(machine.space, address)
    overflow, saved = read_u64(machine.space, address + 8), read_u64(machine.space, address + 16)
    for at in range(offset, 8 * len(ARGUMENTS), 8):
        yield read_u64(machine.space, saved + at)
    while True:
        yield read_u64(machine.space, overflow)
        overflow += 8


def vsprintf(machine: "Machine", fmt: str, arguments: Iterator[int]) -> str:
    """The formatted text, as vsnprintf() with a buffer without end would have it."""
    parts, at = [], 0
    while (percent := fmt.find("%", at)) >= 0:
        parts.append(fmt[at:percent])
        found = CONVERSION.match(fmt, percent)
        if found is None:  # a % at the very end
            return "".join(parts)
        at = found.end()
        spec = _spec(found, arguments)
        kind = found["type"]
        if kind == "%":
            parts.append("%")
        elif kind == "p":
            form = POINTER_FORM.match(fmt, at)
            # All letters behind a %p belong to it, known or not.
            parts.append(_pointer(machine, form[0] if form else "", next(arguments), spec))
            while at < len(fmt) and fmt[at].isalnum():
                at += 1
        elif kind == "s":
            parts.append(_padded(_string(machine, next(arguments), spec.precision), spec))
        elif kind == "c":
            parts.append(_padded(chr(next(arguments) & 0xFF), spec))
        elif kind in "diuxXo":
            parts.append(_integer(kind, found["size"], next(arguments), spec))
        else:  # FORMAT_TYPE_INVALID: the kernel warns and prints nothing more
            return "".join(parts)
    return "".join([*parts, fmt[at:]])


def _spec(found: re.Match[str], arguments: Iterator[int]) -> Spec:
    flags, width, precision = found["flags"], 0, -1
    if found["width"] == "*":
        width = _signed(next(arguments), 32)
        if width < 0:
            flags, width = f"{flags}-", -width
    elif found["width"]:
        width = int(found["width"])
    if found["precision"] is not None:
        text = found["precision"]
        precision = max(0, _signed(next(arguments), 32) if text == "*" else int(text or 0))
    return Spec(flags, width, precision)


def _integer(kind: str, size: str | None, word: int, spec: Spec) -> str:
    bits = SIZES.get(size or "", 32)
    value = _signed(word, bits) if kind in "di" else word & ((1 << bits) - 1)
    return _number(value, {"x": 16, "X": 16, "o": 8}.get(kind, 10), spec, upper=kind == "X")


def _number(value: int, base: int, spec: Spec, *, upper: bool = False) -> str:
    """number(): padding with zeroes goes up to the width whatever the precision is, unlike in C."""
    digits = format(abs(value), {16: "x", 8: "o", 10: "d"}[base])
    sign = "-" if value < 0 else "+" if "+" in spec.flags else " " if " " in spec.flags else ""
    prefix = ""
    if "#" in spec.flags and base != 10:
        prefix = "0x" if base == 16 else "0" if value else ""
    digits = digits.rjust(spec.precision, "0")
    if spec.zero:
        digits = digits.rjust(spec.width - len(sign + prefix), "0")
    text = sign + prefix + digits
    return (text.ljust if spec.left else text.rjust)(spec.width).translate(_UPPER if upper else {})


_UPPER: Final = str.maketrans("abcdefx", "ABCDEFX")


def _padded(text: str, spec: Spec) -> str:
    return (text.ljust if spec.left else text.rjust)(spec.width)


def _string(machine: "Machine", address: int, precision: int) -> str:
    if bad := _bad_pointer(address):
        return bad[: precision if precision >= 0 else None]
    if precision < 0:
        return read_string(machine.space, address)
    found = bytearray()  # it need not end there
    while (
        len(found) < min(precision, LONGEST)
        and (byte := machine.space.read(address + len(found), 1)) != b"\0"
    ):
        found += byte
    return found.decode("ascii", "backslashreplace")


def _bad_pointer(address: int) -> str:
    """check_pointer_msg()."""
    if not address:
        return "(null)"
    return "(efault)" if address < PAGE_SIZE or _is_error(address) else ""


def _pointer(machine: "Machine", form: str, address: int, spec: Spec) -> str:
    kallsyms = machine.kallsyms
    match form:
        case "S" | "SR" | "B":
            # %pB is for return addresses, which may be behind the end of a function.
            symbol = kallsyms.at(address - 1 if form == "B" else address)
            text = f"{address:#x}"
            if symbol is not None:
                module = f" [{symbol.module}]" if symbol.module else ""
                text = f"{symbol.name}+{address - symbol.address:#x}/{symbol.size:#x}{module}"
            return _padded(text, spec)
        case "s":
            found = kallsyms.at(address)
            if found is None:
                return _padded(f"{address:#x}", spec)
            return _padded(found.name + (f" [{found.module}]" if found.module else ""), spec)
        case "x" | "K":
            return _number(address, 16, _as_pointer(spec))
        case "e" if _is_error(address):
            number = (1 << 64) - address
            name = errno.errorcode.get(number)
            return _padded(f"-{name}" if name else f"{_signed(address, 64)}", spec)
    if form in ("V", "Gg", "b", "bl") or form[:1] in tuple("hMmIi"):
        if bad := _bad_pointer(address):
            return _padded(bad, spec)
        try:
            text = _pointed_to(machine, form, address, spec)
        except MemoryFault:
            return _padded("(efault)", spec)
        return text if form[0] in "bh" else _padded(text, spec)  # there the width is how much is printed
    return _number(_hashed(address), 16, _as_pointer(spec))


def _pointed_to(machine: "Machine", form: str, address: int, spec: Spec) -> str:
    """The forms that print what lies at the address; `width` then is the number of bytes or bits."""
    space = machine.space
    if form == "V":  # struct va_format
        arguments = va_list(machine, read_u64(space, address + 8))
        return vsprintf(machine, read_string(space, read_u64(space, address)), arguments)
    if form == "Gg":
        return gfp_flags(read_u32(space, address))
    if form in ("b", "bl"):
        bits = int.from_bytes(space.read(address, -(-spec.width // 64) * 8), "little")
        bits &= (1 << spec.width) - 1
        return _bit_list(bits, spec.width) if form == "bl" else _bit_map(bits, spec.width)
    if form[0] in "Ii":
        return ".".join(f"{byte:d}" if form[0] == "I" else f"{byte:03d}" for byte in space.read(address, 4))
    if form[0] in "Mm":
        data = space.read(address, 6)[:: -1 if form.endswith("R") else 1]
        return data.hex("-" if form.endswith("F") else ":") if form[0] == "M" else data.hex()
    data = space.read(address, min(max(spec.width, 1), 64))
    separator = {"C": ":", "D": "-", "N": "", "h": " "}[form[-1]]
    return data.hex(separator) if separator else data.hex()


def _bit_list(bits: int, width: int) -> str:
    """bitmap_list_string(): 0,3-5."""
    runs, at = [], 0
    while at < width:
        if not bits >> at & 1:
            at += 1
            continue
        end = at
        while bits >> end + 1 & 1:
            end += 1
        runs.append(f"{at}" if at == end else f"{at}-{end}")
        at = end + 1
    return ",".join(runs)


def _bit_map(bits: int, width: int) -> str:
    """bitmap_string(): groups of 32 bits, the highest first."""
    digits = f"{bits:0{max(1, -(-width // 4))}x}"
    head = len(digits) % 8
    return ",".join(filter(None, [digits[:head], *(digits[i : i + 8] for i in range(head, len(digits), 8))]))


def _as_pointer(spec: Spec) -> Spec:
    """pointer_string(): all digits, unless a width says how many."""
    return replace(spec, flags=f"{spec.flags}0", width=spec.width or 16) if not spec.width else spec


def _hashed(address: int) -> int:
    """ptr_to_id(): a number that says nothing about the address; the key is the same in every run."""
    if not address or _is_error(address):
        return address
    return int.from_bytes(
        blake2b(address.to_bytes(8, "little"), digest_size=4, key=b"klpemu").digest(), "little"
    )


def _is_error(address: int) -> bool:
    return address >= (1 << 64) - MAX_ERRNO


def _signed(word: int, bits: int) -> int:
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> bits - 1 else word


def _store(machine: "Machine", buffer: int, size: int, text: str) -> int:
    """Put as much as fits and a NUL into the buffer; returns the length of the whole text."""
    data = text.encode("latin-1", "backslashreplace")
    if size:
        machine.space.write(buffer, data[: size - 1] + b"\0")
    return len(data)


def _format(machine: "Machine", fmt: int, arguments: Iterator[int]) -> str:
    return vsprintf(machine, read_string(machine.space, fmt), arguments)


@export
def sprintf(machine: "Machine", buffer: int, fmt: int) -> int:
    """Format into a buffer; returns the length."""
    text = _format(machine, fmt, variadic(machine, 2))
    return _store(machine, buffer, len(text) + 1, text)


@export
def snprintf(machine: "Machine", buffer: int, size: int, fmt: int) -> int:
    """Format into a buffer of so many bytes; returns the length that the whole text would have."""
    return _store(machine, buffer, size, _format(machine, fmt, variadic(machine, 3)))


@export
def scnprintf(machine: "Machine", buffer: int, size: int, fmt: int) -> int:
    """As snprintf(); returns the length of what was stored."""
    return min(_store(machine, buffer, size, _format(machine, fmt, variadic(machine, 3))), max(0, size - 1))


@export
def vsnprintf(machine: "Machine", buffer: int, size: int, fmt: int, arguments: int) -> int:
    """As snprintf(), with a va_list, which is left as it is."""
    return _store(machine, buffer, size, _format(machine, fmt, va_list(machine, arguments)))


@export
def vscnprintf(machine: "Machine", buffer: int, size: int, fmt: int, arguments: int) -> int:
    """As scnprintf(), with a va_list, which is left as it is."""
    text = _format(machine, fmt, va_list(machine, arguments))
    return min(_store(machine, buffer, size, text), max(0, size - 1))


@export
def kasprintf(machine: "Machine", _flags: int, fmt: int) -> int:
    """Format into a buffer of the right size from the slab; returns it."""
    return _duplicate(machine, _format(machine, fmt, variadic(machine, 2)))


@export
def kvasprintf(machine: "Machine", _flags: int, fmt: int, arguments: int) -> int:
    """As kasprintf(), with a va_list, which is left as it is."""
    return _duplicate(machine, _format(machine, fmt, va_list(machine, arguments)))


def _duplicate(machine: "Machine", text: str) -> int:
    buffer = machine.slab.kzalloc(len(text) + 1, f"kasprintf by {machine.caller()}")
    _store(machine, buffer, len(text) + 1, text)
    return buffer
