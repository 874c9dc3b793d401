"""The executed stream of a redirected call, laid out again as plain code: what a redirect is compared with.

A redirected call executes the function's site (a call of the trampoline), the trampoline, the handler, and,
by the address that the handler has put in place of the return address, the new function.  As plain code the
same instructions stand like this:

    P:  call Q              the site
        the new function    its ret goes back to the caller
    Q:  the trampoline, with a call of H in it; its ret goes back behind the site's call
    H:  the handler, there once, as it is there once in the redirect

Every instruction keeps its kind and its number of bytes, so the same number of the same instructions
executes, and calls and returns stay calls and returns.  What differs is what "redirected" means: every return
goes back to where the call was, every jump goes to the next instruction, and all code stands side by side.
Loads and stores are executed too: the trampoline gets an ops pointer of its own, to a copy of the klp_ops and
the klp_func with `P + 5` as new function, so that it writes its own return address.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from bench.guest import place
from elf.errors import KlpemuError
from emu.assembly import disassemble
from emu.ftrace_64 import RIP_RELATIVE_LOAD_RDX
from emu.machine import Machine

__all__ = ["PlainCode"]

CALL, RET = 0xE8, 0xC3
Executed = tuple[int, bytes]  # address and bytes of one instruction


@dataclass
class PlainCode:
    """Lays out streams one after the other; `functions` are the addresses to call."""

    machine: Machine
    functions: list[int] = field(default_factory=list)
    _sizes: dict[int, int] = field(default_factory=dict)
    _shared: int = 0
    _next: int = 0
    _end: int = 0

    def add(self, addresses: Sequence[int], ops: int) -> int:
        """Lay out one executed stream, that of a call redirected through the klp_ops at `ops`."""
        executed = [(address, self._code(address)) for address in addresses]
        body, trampoline, handler = self._split(executed)
        if not self._shared:
            self._shared = place(self.machine, sum(map(len, handler)), "plain handler")
            self.machine.space.write(self._shared, b"".join(handler))
        size = sum(map(len, body)) + sum(map(len, trampoline))
        start = self._room(size + 8)
        inner = start + sum(map(len, body))
        pointer = start + size
        code = _relocated(body, start, inner, 0) + _relocated(trampoline, inner, self._shared, pointer)
        self.machine.space.write(start, code + self._copy_of(ops, start + 5).to_bytes(8, "little"))
        self.functions.append(start)
        return start

    def _split(self, executed: Sequence[Executed]) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """The instructions by what they become: the body (site and new function), trampoline, handler."""
        levels: list[list[bytes]] = [[], [], []]
        depth = 0
        for _, code in executed:
            levels[depth].append(_fall_through(code))
            if code[0] == CALL:
                depth += 1
            elif code[0] == RET:
                depth -= 1
        if depth != -1 or any(not level for level in levels):
            raise KlpemuError("the stream is not site, trampoline, handler and function")
        return levels[0], levels[1], levels[2]

    def _copy_of(self, ops: int, new_func: int) -> int:
        """A copy of a klp_ops and its top klp_func that leads to `new_func`; its ftrace_ops' address."""
        machine, layouts = self.machine, self.machine.layouts
        node = layouts.offsetof("klp_func", "stack_node")
        original = layouts.view("klp_ops", machine.space, ops)
        copies = []
        for name, address in (("klp_ops", ops), ("klp_func", original.func_stack.next - node)):
            size = layouts.sizeof(name)
            copy = machine.slab.kmalloc(size, "bench: copy")
            machine.space.write(copy, machine.space.read(address, size))
            copies.append(layouts.view(name, machine.space, copy))
        copied_ops, func = copies
        func.new_func = new_func
        copied_ops.func_stack.next = func.address_ + node
        return int(copied_ops.fops.address_)

    def _code(self, address: int) -> bytes:
        size = self._sizes.get(address)
        if size is None:
            code = self.machine.space.read(address, min(15, 4096 - (address & 4095)))
            size = self._sizes[address] = len(next(disassemble(code, address)).code)
        return self.machine.space.read(address, size)

    def _room(self, size: int) -> int:
        size = -(-size // 16) * 16
        if self._next + size > self._end:
            self._next = place(self.machine, 1 << 20, "plain code")
            self._end = self._next + (1 << 20)
        self._next += size
        return self._next - size


def _fall_through(code: bytes) -> bytes:
    """A jump becomes one to the next instruction: taken or not, the stream goes on there."""
    if code[0] == 0xEB or 0x70 <= code[0] <= 0x7F:
        return code[:1] + bytes(1)
    if code[0] == 0xE9:
        return code[:1] + bytes(4)
    if code[0] == 0x0F and 0x80 <= code[1] <= 0x8F:
        return code[:2] + bytes(4)
    return code


def _relocated(instructions: Sequence[bytes], address: int, callee: int, pointer: int) -> bytes:
    """The instructions at `address`: the call goes to `callee`, the ops pointer is read at `pointer`."""
    return b"".join(_targets(instructions, address, callee, pointer))


def _targets(instructions: Sequence[bytes], address: int, callee: int, pointer: int) -> Iterator[bytes]:
    for code in instructions:
        behind = address + len(code)
        if code[0] == CALL:
            code = code[:1] + (callee - behind).to_bytes(4, "little", signed=True)
        elif code[:3] == RIP_RELATIVE_LOAD_RDX:
            code = code[:3] + (pointer - behind).to_bytes(4, "little", signed=True)
        elif any("rip" in each.operands for each in disassemble(code, 0)):
            raise KlpemuError(
                "an instruction relative to RIP that the benchmark does not know", where=f"{address:#x}"
            )
        yield code
        address = behind
