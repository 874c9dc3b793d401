"""Module parameters: kernel/params.c, the part that is the same for every kind of parameter.

A parameter is a struct kernel_param in the module's `__param` section.  Its ops have the functions that set
and get it; these are called in the guest, whoever answers them.
"""

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from emu.errno import KernelErrno
from emu.memory import PAGE_SIZE, read_c_string, read_string
from emu.module_state import struct_name

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["ModuleParameters", "next_arg", "parameq"]

KERNEL_PARAM_OPS_FL_NOARG: Final = 1 << 0
KERNEL_PARAM_FL_UNSAFE: Final = 1 << 0
SPACES: Final = " \t\n\v\f\r"  # isspace()
READABLE: Final = 0o444
WRITABLE: Final = 0o222
_WORDS: Final = {
    errno.ENOENT: "Unknown parameter `{name}'",
    errno.ENOSPC: "`{value}' too large for parameter `{name}'",
}


def parameq(one: str, other: str) -> bool:
    """The names are the same, `-` and `_` being one."""
    return one.replace("-", "_") == other.replace("-", "_")


def next_arg(args: str) -> tuple[tuple[int, int], tuple[int, int] | None, int]:
    """The first argument: spans of its name and its value (None: no `=`), and where the next one begins.

    Spaces inside quotes do not end an argument; quotes around a value, or around all of it, are left out.
    """
    start = 1 if args.startswith('"') else 0
    in_quote = quoted = bool(start)
    equals, at = 0, start
    while at < len(args) and (in_quote or args[at] not in SPACES):
        if not equals and at > start and args[at] == "=":
            equals = at
        if args[at] == '"':
            in_quote = not in_quote
        at += 1
    end = at
    value = None
    if equals:
        first, last = equals + 1, end
        if args[first:last].startswith('"'):
            first += 1
            if args[end - 1] == '"' and end - 1 >= first:
                last = end - 1
        if quoted and last == end and args[end - 1] == '"':
            last = end - 1
        value = (first, last)
        name = (start, equals)
    else:
        name = (start, end - 1 if quoted and end > start and args[end - 1] == '"' else end)
    at = min(end + 1, len(args))
    while at < len(args) and args[at] in SPACES:
        at += 1
    return name, value, at


class ModuleParameters:
    """The parameters of one machine's modules; a module is given by the address of its struct."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine

    def parameters(self, module: int) -> list[tuple[str, int]]:
        """Name and mode of each parameter that has a file in sysfs: one with mode 0 has none."""
        return [(self._name(each), each.perm) for each in self._all(module) if each.perm]

    def param_get(self, module: int, name: str) -> str:
        """What the file shows: the value and a newline.

        ENOENT if there is no such file, EACCES if nobody may read it, EPERM if nothing can be read there.
        """
        param = self._file(module, name)
        if not param.perm & READABLE:
            raise KernelErrno(errno.EACCES, f"parameter '{name}' cannot be read")
        getter = param.follow_("ops").get
        if not getter:
            raise KernelErrno(errno.EPERM, f"parameter '{name}' cannot be read")
        machine = self._machine
        buffer = machine.slab.kzalloc(PAGE_SIZE, f"buffer of parameter {name}")
        try:
            length = _int(machine.hub.call_guest(getter, buffer, param.address_))
            if length < 0:
                raise KernelErrno(-length, f"reading parameter '{name}'")
            return machine.shared.read(buffer, length).decode("utf-8", "backslashreplace")
        finally:
            machine.slab.kfree(buffer)

    def param_set(self, module: int, name: str, text: str) -> None:
        """Write the file: `text` as it is, a newline at the end included if there is one.

        ENOENT if there is no such file, EACCES if nobody may write it, EPERM if nothing can be set there.
        """
        param = self._file(module, name)
        if not param.perm & WRITABLE:
            raise KernelErrno(errno.EACCES, f"parameter '{name}' cannot be written")
        if not param.follow_("ops").set:
            raise KernelErrno(errno.EPERM, f"parameter '{name}' cannot be written")
        buffer = self._machine.slab.kstrdup(text, f"buffer of parameter {name}")
        try:
            number = self._set(param, buffer)
        finally:
            self._machine.slab.kfree(buffer)
        if number:
            raise KernelErrno(number, f"`{text.strip()}' invalid for parameter `{name}'")

    def parse_args(self, module: int) -> None:
        """Set what the module's `args` name, in their order; they are cut up in place, as in the kernel.

        A name that the module does not have is logged and ignored.  All arguments are gone through; then the
        last error is raised.
        """
        machine = self._machine
        struct = machine.view("module", module)
        doing, at = struct_name(struct), struct.args
        args = read_c_string(machine.shared, at).decode("latin-1")
        rest = args.lstrip(SPACES)
        failed: KernelErrno | None = None
        while rest:
            start = at + len(args) - len(rest)
            name_span, value_span, end = next_arg(rest)
            name = rest[slice(*name_span)]
            value = None if value_span is None else rest[slice(*value_span)]
            address = self._cut(start, rest, name_span, value_span)
            rest = rest[end:]
            if value is None and name == "--":
                if rest and failed is None:
                    machine.log.pr_warn(f"{doing}: parameters '{rest}' after `--' ignored")
                break
            number = self._parse_one(module, doing, name, address)
            if number:
                words = _WORDS.get(number, "`{value}' invalid for parameter `{name}'")
                # What is left of it: the kinds that take it apart have put ends in.
                left = read_string(machine.shared, address) if address else ""
                what = words.format(value=left, name=name)
                machine.log.pr_err(f"{doing}: {what}")
                failed = KernelErrno(number, what, where=f"module '{doing}'")
        if failed is not None:
            raise failed

    def destroy(self, module: int) -> None:
        """The module goes: what its parameters have allocated is freed.

        Outside of a service no guest code has run that could have allocated anything.
        """
        if not self._machine.hub.in_service:
            return
        for param in self._all(module):
            free = param.follow_("ops").free
            if free:
                self._machine.hub.call_guest(free, param.arg)

    def _parse_one(self, module: int, doing: str, name: str, value: int) -> int:
        """Set one parameter to the string at `value` (0: no value); returns the errno."""
        for param in self._all(module):
            if parameq(name, self._name(param)):
                if not value and not param.follow_("ops").flags & KERNEL_PARAM_OPS_FL_NOARG:
                    return errno.EINVAL
                return self._set(param, value)
        # unknown_module_param_cb(): these two are for others than the module.
        if name != "async_probe" and name != "dyndbg":
            self._machine.log.pr_warn(f"{doing}: unknown parameter '{name}' ignored")
        return 0

    def _set(self, param: Any, value: int) -> int:
        """Call the parameter's set function; returns the errno."""
        machine = self._machine
        if param.flags & KERNEL_PARAM_FL_UNSAFE:
            machine.log.pr_notice(f"Setting dangerous option {self._name(param)} - tainting kernel")
        return -_int(machine.hub.call_guest(param.follow_("ops").set, value, param.address_))

    def _cut(self, start: int, text: str, name: tuple[int, int], value: tuple[int, int] | None) -> int:
        """End name and value with a zero byte each, in guest memory; returns the value's address."""
        for _, end in filter(None, (name, value)):
            if end < len(text):
                self._machine.shared.write(start + end, b"\0")
        return 0 if value is None else start + value[0]

    def _file(self, module: int, name: str) -> Any:
        found = next((each for each in self._all(module) if each.perm and self._name(each) == name), None)
        if found is None:
            raise KernelErrno(errno.ENOENT, f"no parameter '{name}' in sysfs")
        return found

    def _all(self, module: int) -> Iterator[Any]:
        machine = self._machine
        struct = machine.view("module", module)
        if struct.num_kp:
            size = machine.layouts.sizeof("kernel_param")
            for index in range(struct.num_kp):
                yield machine.view("kernel_param", struct.kp + index * size)

    def _name(self, param: Any) -> str:
        return read_string(self._machine.shared, param.name)


def _int(rax: int) -> int:
    """RAX as the int that a C function returns."""
    value = rax & 0xFFFF_FFFF
    return value - (1 << 32) if value >> 31 else value
