"""A private trampoline for one ftrace_ops: create_trampoline() of arch/x86/kernel/ftrace.c.

It is a copy of `ftrace_caller` (or of `ftrace_regs_caller`, for an ops that wants all registers) in pages of
its own, followed by a return of RET_SIZE bytes and the pointer to the ops.  The copy loads that pointer
instead of `function_trace_op` and calls the ops' function instead of the list function.
"""

from collections.abc import Callable
from typing import Any

from elf.errors import KlpemuError
from emu.ftrace_64 import RIP_RELATIVE_LOAD_RDX
from emu.ftrace_ops import FtraceOpsFl
from emu.kallsyms import Kallsyms
from emu.module_area import ModuleArea
from emu.paging import Access, AddressSpace
from emu.text_poke import CALL_OPCODE, JMP32_OPCODE, text_gen_insn

__all__ = ["RETURN", "RET_SIZE", "Trampolines"]

RET_SIZE = 5  # a jump to a return thunk, where the CPU needs one
RETURN = bytes.fromhex("c3cc000000")  # without one: ret, int3, and the rest of the page's zeroes
JNZ_SHORT = 0x75
NOP2 = bytes.fromhex("6690")


class Trampolines:
    """Makes and frees private trampolines.

    `symbol` gives the address of a vmlinux symbol, `return_thunk_at` that of the thunk through which the
    return at an address has to go, None if it need not.
    """

    def __init__(
        self,
        space: AddressSpace,
        area: ModuleArea,
        kallsyms: Kallsyms,
        symbol: Callable[[str], int],
        return_thunk_at: Callable[[int], int | None] = lambda address: None,
    ) -> None:
        self._space = space
        self._area = area
        self._kallsyms = kallsyms
        self._symbol = symbol
        self._return_thunk_at = return_thunk_at

    def create(self, ops: Any, func: int) -> tuple[int, int]:
        """Address and size in bytes of a new trampoline for `ops` that calls `func`."""
        regs = bool(ops.flags & FtraceOpsFl.SAVE_REGS)
        name = "ftrace_regs_caller" if regs else "ftrace_caller"
        start, end = self._symbol(name), self._symbol(f"{name}_end")
        code = bytearray(self._space.read(start, end - start))
        length = len(code)
        size = length + RET_SIZE + 8
        address = self._area.module_alloc(size, f"ftrace_trampoline for {ops!r}", Access.EXECUTE)
        thunk = self._return_thunk_at(address + length)
        code += RETURN if thunk is None else text_gen_insn(JMP32_OPCODE, address + length, thunk)
        if regs:
            jump = self._symbol("ftrace_regs_caller_jmp") - start
            if code[jump] != JNZ_SHORT:
                raise KlpemuError("no short jnz at ftrace_regs_caller_jmp", where=f"{start + jump:#x}")
            code[jump : jump + 2] = NOP2
        code += ops.address_.to_bytes(8, "little")
        load = self._symbol(f"{name}_op_ptr") - start
        if code[load : load + 3] != RIP_RELATIVE_LOAD_RDX:
            raise KlpemuError("no load of the ops at the op_ptr label", where=f"{start + load:#x}")
        code[load + 3 : load + 7] = (length + RET_SIZE - (load + 7)).to_bytes(4, "little")
        call = self.call_offset(regs)
        code[call : call + 5] = text_gen_insn(CALL_OPCODE, address + call, func)
        self._space.write(address, bytes(code))
        self._kallsyms.add_trampoline(address, size)
        return address, size

    def free(self, address: int) -> None:
        """Unmap a trampoline that no CPU and no task can be on any more."""
        self._kallsyms.remove_trampoline(address)
        self._area.free(address)

    def call_offset(self, regs: bool) -> int:
        """Offset of the call of the handler in a trampoline (calc_trampoline_call_offset())."""
        if regs:
            return self._symbol("ftrace_regs_call") - self._symbol("ftrace_regs_caller")
        return self._symbol("ftrace_call") - self._symbol("ftrace_caller")
