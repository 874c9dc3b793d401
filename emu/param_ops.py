"""The kinds of module parameters, where the kernel image leaves them to us: param_set_int() and its like.

kernel/params.c and lib/kstrtox.c.  The structs of function pointers, `param_ops_int` and its like, are the
image's; a value lies where the parameter's `arg` points.
"""

import errno
from typing import TYPE_CHECKING, Any, Final

from elf.errors import KlpemuError
from emu.exports import EXPORTS, export
from emu.memory import PAGE_SIZE, read_c_string, read_string

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["NUMBERS", "kstrtobool", "kstrtoint"]

MAX_CHARP: Final = 1024
KMALLOCED: Final = "kmalloc_parameter by "  # and the parameter: it is nobody's but the module's

# Kind: size in bytes, signed, and the format that shows it.
NUMBERS: Final = {
    "byte": (1, False, "{}"),
    "short": (2, True, "{}"),
    "ushort": (2, False, "{}"),
    "int": (4, True, "{}"),
    "uint": (4, False, "{}"),
    "long": (8, True, "{}"),
    "ulong": (8, False, "{}"),
    "ullong": (8, False, "{}"),
    "hexint": (4, False, "{:#08x}"),
}


def kstrtoint(text: str, size: int, *, signed: bool) -> int:
    """The number that `text` is, in base 16, 8 or 10 by its prefix; one newline may follow.

    Raises ValueError for what is no number, OverflowError for what does not fit.
    """
    negative = signed and text.startswith("-")
    digits = text[1:] if negative or text.startswith("+") else text
    digits = digits.removesuffix("\n")
    base = 10
    if digits[:2].lower() == "0x" and digits[2:3] and digits[2] in "0123456789abcdefABCDEF":
        base, digits = 16, digits[2:]
    elif digits.startswith("0"):
        base = 8
    allowed = "0123456789abcdefABCDEF" if base == 16 else "0123456789"[:base]
    if not digits or any(each not in allowed for each in digits):
        raise ValueError(f"'{text}' is no number")
    value = -int(digits, base) if negative else int(digits, base)
    bits = 8 * size
    low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
    if not low <= value < high:
        raise OverflowError(f"{value} does not fit {size} bytes")
    return value


def kstrtobool(text: str) -> bool:
    """y, t, 1, on; n, f, 0, off, in either case: only the first letters count.  Raises ValueError."""
    first = text[:2].lower() if text[:1] in ("o", "O") else text[:1].lower()
    if first in ("y", "t", "1", "on"):
        return True
    if first in ("n", "f", "0", "of"):
        return False
    raise ValueError(f"'{text}' is no boolean")


def _set_number(machine: "Machine", registers: dict[str, int], size: int, *, signed: bool) -> int:
    param = machine.view("kernel_param", registers["rsi"])
    try:
        value = kstrtoint(read_string(machine.shared, registers["rdi"]), size, signed=signed)
    except ValueError:
        return -errno.EINVAL
    except OverflowError:
        return -errno.ERANGE
    machine.shared.write(param.arg, value.to_bytes(size, "little", signed=signed))
    return 0


def _get_number(machine: "Machine", registers: dict[str, int], size: int, form: str, *, signed: bool) -> int:
    param = machine.view("kernel_param", registers["rsi"])
    value = int.from_bytes(machine.shared.read(param.arg, size), "little", signed=signed)
    return _show(machine, registers["rdi"], form.format(value).encode())


def _enter_numbers() -> None:
    """STANDARD_PARAM_DEF for each kind."""
    for kind, (size, signed, form) in NUMBERS.items():

        def setter(
            machine: "Machine", registers: dict[str, int], size: int = size, signed: bool = signed
        ) -> int:
            return _set_number(machine, registers, size, signed=signed)

        def getter(
            machine: "Machine",
            registers: dict[str, int],
            size: int = size,
            form: str = form,
            signed: bool = signed,
        ) -> int:
            return _get_number(machine, registers, size, form, signed=signed)

        setter.__doc__ = f"Set the parameter's {kind} of {size} bytes: -EINVAL for no number, -ERANGE beyond."
        getter.__doc__ = f"Print the parameter's {kind}, and a newline."
        EXPORTS[f"param_set_{kind}"] = setter
        EXPORTS[f"param_get_{kind}"] = getter


_enter_numbers()


@export
def param_set_bool(machine: "Machine", val: int, kp: int) -> int:
    """Set a bool; no value means yes."""
    return _set_bool(machine, val, machine.view("kernel_param", kp).arg, 1)


@export
def param_get_bool(machine: "Machine", buffer: int, kp: int) -> int:
    """Y or N."""
    is_set = machine.shared.read(machine.view("kernel_param", kp).arg, 1) != b"\0"
    return _show(machine, buffer, b"Y" if is_set else b"N")


@export
def param_set_invbool(machine: "Machine", val: int, kp: int) -> int:
    """Set a bool to the contrary; no value means yes, so N is stored."""
    param = machine.view("kernel_param", kp)
    result = _set_bool(machine, val, param.arg, 1)
    if not result:
        machine.shared.write(param.arg, bytes([not machine.shared.read(param.arg, 1)[0]]))
    return result


@export
def param_get_invbool(machine: "Machine", buffer: int, kp: int) -> int:
    """The contrary of the bool: Y or N."""
    is_set = machine.shared.read(machine.view("kernel_param", kp).arg, 1) != b"\0"
    return _show(machine, buffer, b"N" if is_set else b"Y")


@export
def param_set_bool_enable_only(machine: "Machine", val: int, kp: int) -> int:
    """Set a bool that cannot be cleared again: -EROFS."""
    at = machine.view("kernel_param", kp).arg
    was = machine.shared.read(at, 1)
    try:
        wanted = _bool(machine, val)
    except ValueError:
        return -errno.EINVAL
    if not wanted and was != b"\0":
        return -errno.EROFS
    return _set_bool(machine, val, at, 1) if wanted else 0


@export
def param_set_bint(machine: "Machine", val: int, kp: int) -> int:
    """Set an int to 0 or 1, from what a bool accepts."""
    return _set_bool(machine, val, machine.view("kernel_param", kp).arg, 4)


@export
def param_set_charp(machine: "Machine", val: int, kp: int) -> int:
    """Point to a copy of the string; the copy before is freed.  -ENOSPC for more than 1024 bytes."""
    param = machine.view("kernel_param", kp)
    data = read_c_string(machine.shared, val) + b"\0"
    if len(data) > MAX_CHARP + 1:
        machine.log.pr_err(f"{_name(machine, param)}: string parameter too long")
        return -errno.ENOSPC
    new = machine.slab.kmalloc(len(data), KMALLOCED + _name(machine, param))
    machine.shared.write(new, data)
    param_free(machine, param.arg)
    machine.shared.write(param.arg, new.to_bytes(8, "little"))
    return 0


@export
def param_get_charp(machine: "Machine", buffer: int, kp: int) -> int:
    """The string, "(null)" for none."""
    at = int.from_bytes(machine.shared.read(machine.view("kernel_param", kp).arg, 8), "little")
    return _show(machine, buffer, read_c_string(machine.shared, at) if at else b"(null)")


@export
def param_free_charp(machine: "Machine", arg: int) -> None:
    """Free the string, if it is a copy."""
    param_free(machine, arg)


@export
def param_set_copystring(machine: "Machine", val: int, kp: int) -> int:
    """Copy the string into the parameter's own buffer; -ENOSPC if it does not fit with its end."""
    param = machine.view("kernel_param", kp)
    string = machine.view("kparam_string", param.arg)
    data = read_c_string(machine.shared, val) + b"\0"
    if len(data) > string.maxlen:
        machine.log.pr_err(f"{_name(machine, param)}: string doesn't fit in {string.maxlen - 1} chars.")
        return -errno.ENOSPC
    machine.shared.write(string.string, data)
    return 0


@export
def param_get_string(machine: "Machine", buffer: int, kp: int) -> int:
    """The string in the buffer."""
    string = machine.view("kparam_string", machine.view("kernel_param", kp).arg)
    return _show(machine, buffer, read_c_string(machine.shared, string.string))


@export
def param_array_set(machine: "Machine", val: int, kp: int) -> int:
    """Set the elements from what stands between commas, each by the element's own function.

    The string is cut up in place, as in the kernel.
    """
    param = machine.view("kernel_param", kp)
    array = machine.view("kparam_array", param.arg)
    element = machine.view("kernel_param", machine.on_stack(machine.layouts.sizeof("kernel_param")))
    element.name, element.level, element.arg = param.name, param.level, array.elem
    # The kernel leaves the rest of its copy as the stack had it.
    element.mod = element.ops = element.perm = element.flags = 0
    values = read_c_string(machine.shared, val).split(b",")
    _count(machine, array, 0)
    for number, text in enumerate(values):
        if number == array.max:
            machine.log.pr_err(f"{_name(machine, param)}: can only take {array.max} arguments")
            return -errno.EINVAL
        machine.shared.write(val + len(text), b"\0")
        result = _int(machine.hub.call_guest(array.follow_("ops").set, val, element.address_))
        if result:
            return result
        element.arg = element.arg + array.elemsize
        val += len(text) + 1
        _count(machine, array, number + 1)
    return 0


@export
def param_array_get(machine: "Machine", buffer: int, kp: int) -> int:
    """The elements, with commas between; as many as were set, or all if nobody counts them."""
    param = machine.view("kernel_param", kp)
    array = machine.view("kparam_array", param.arg)
    size = machine.layouts.sizeof("kernel_param")
    element = machine.view("kernel_param", machine.on_stack(size))
    machine.shared.write(element.address_, machine.shared.read(kp, size))
    end = 0
    for number in range(_elements(machine, array)):
        if number:
            machine.shared.write(buffer + end - 1, b",")
        element.arg = array.elem + number * array.elemsize
        result = _int(machine.hub.call_guest(array.follow_("ops").get, buffer + end, element.address_))
        if result < 0:
            return result
        end += result
    machine.shared.write(buffer + end, b"\0")
    return end


@export
def param_array_free(machine: "Machine", arg: int) -> None:
    """Free what the elements have allocated."""
    array = machine.view("kparam_array", arg)
    free = array.follow_("ops").free
    if free:
        for number in range(_elements(machine, array)):
            machine.hub.call_guest(free, array.elem + number * array.elemsize)


def param_free(machine: "Machine", at: int) -> None:
    """maybe_kfree_parameter(): the string that a pointer points to, unless it is the module's own."""
    string = int.from_bytes(machine.shared.read(at, 8), "little")
    found = machine.slab.live.get(string)
    if found is not None and found[1].startswith(KMALLOCED):
        machine.slab.kfree(string)


def _bool(machine: "Machine", val: int) -> bool:
    return kstrtobool(read_string(machine.shared, val)) if val else True


def _set_bool(machine: "Machine", val: int, at: int, size: int) -> int:
    try:
        value = _bool(machine, val)
    except ValueError:
        return -errno.EINVAL
    machine.shared.write(at, int(value).to_bytes(size, "little"))
    return 0


def _show(machine: "Machine", buffer: int, text: bytes) -> int:
    """scnprintf(buffer, PAGE_SIZE, "%s\\n"): returns the length."""
    data = text[: PAGE_SIZE - 2] + b"\n"
    machine.shared.write(buffer, data + b"\0")
    return len(data)


def _count(machine: "Machine", array: Any, number: int) -> None:
    if array.num:
        machine.shared.write(array.num, number.to_bytes(4, "little"))


def _elements(machine: "Machine", array: Any) -> int:
    if not array.num:
        return int(array.max)
    count = int.from_bytes(machine.shared.read(array.num, 4), "little")
    if count > array.max:
        raise KlpemuError(f"an array parameter of {array.max} elements counts {count}")
    return count


def _name(machine: "Machine", param: Any) -> str:
    return read_string(machine.shared, param.name)


def _int(rax: int) -> int:
    value = rax & 0xFFFF_FFFF
    return value - (1 << 32) if value >> 31 else value
