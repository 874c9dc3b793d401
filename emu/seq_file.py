"""Files whose contents a function prints, in guest memory: fs/seq_file.c.

What does not fit the buffer sets `count` to `size`; whoever reads the file then tries again with twice as
much (seq_read_iter()).
"""

from typing import TYPE_CHECKING

from elf.errors import KlpemuError
from emu.errno import KernelErrno
from emu.exports import export
from emu.memory import PAGE_SIZE, read_string
from emu.vsprintf import va_list, variadic, vsprintf

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["single_open_read"]

LARGEST = 1 << 22  # KMALLOC_MAX_SIZE


def single_open_read(machine: "Machine", show: int) -> bytes:
    """The contents of a file that was opened with single_open(): what guest function `show` prints.

    Called in a service; `show` runs on the current task's stack, as in read(2).  Raises KernelErrno with what
    `show` returns if that is negative.
    """
    size = PAGE_SIZE
    file = machine.view("seq_file", machine.slab.kzalloc(machine.layouts.sizeof("seq_file"), "seq_file"))
    try:
        while size <= LARGEST:
            buffer = machine.slab.kzalloc(size, "seq_file buffer")
            try:
                file.buf, file.size, file.count = buffer, size, 0
                result = machine.hub.call_guest(show, file.address_, 0) & 0xFFFF_FFFF
                if result >> 31:
                    where = machine.kallsyms.describe(show)
                    raise KernelErrno((1 << 32) - result, "the file could not be shown", where=where)
                if file.count < size:
                    return machine.space.read(buffer, file.count)
            finally:
                machine.slab.kfree(buffer)
            size *= 2
    finally:
        machine.slab.kfree(file.address_)
    raise KlpemuError("a file without end", where=machine.kallsyms.describe(show))


def _write(machine: "Machine", address: int, data: bytes, room: int) -> bool:
    """Append, if there are `room` bytes more than what is there; else the buffer counts as full."""
    file = machine.view("seq_file", address)
    count, size = file.count, file.size
    if count + room >= size + 1:
        file.count = size
        return False
    machine.shared.write(file.buf + count, data)
    file.count = count + len(data)
    return True


def _append(machine: "Machine", address: int, text: str) -> bool:
    data = text.encode("latin-1", "backslashreplace")
    return _write(machine, address, data, len(data) + 1)  # vsnprintf() stores a NUL


@export
def seq_printf(machine: "Machine", file: int, fmt: int) -> None:
    """Format and append to the file's buffer."""
    _append(machine, file, vsprintf(machine, read_string(machine.space, fmt), variadic(machine, 2)))


@export
def seq_vprintf(machine: "Machine", file: int, fmt: int, arguments: int) -> None:
    """As seq_printf(), with a va_list, which is left as it is."""
    _append(machine, file, vsprintf(machine, read_string(machine.space, fmt), va_list(machine, arguments)))


@export
def seq_puts(machine: "Machine", file: int, text: int) -> None:
    """Append a string to the file's buffer."""
    _append(machine, file, read_string(machine.space, text))


@export
def seq_putc(machine: "Machine", file: int, character: int) -> None:
    """Append a byte to the file's buffer."""
    _write(machine, file, bytes([character & 0xFF]), 1)


@export
def seq_write(machine: "Machine", file: int, data: int, length: int) -> int:
    """Append so many bytes to the file's buffer; -1 if they do not fit."""
    return 0 if _write(machine, file, machine.space.read(data, length), length + 1) else -1


@export
def seq_put_decimal_ull(machine: "Machine", file: int, delimiter: int, number: int) -> None:
    """Append a string, if there is one, and an unsigned decimal number."""
    text = read_string(machine.space, delimiter) if delimiter else ""
    _append(machine, file, f"{text}{number}")
