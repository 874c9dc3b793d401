"""A trampoline is a copy of ftrace_caller, and its return was copied, too.

With return thunks a `ret` in the kernel's text is a `jmp __x86_return_thunk`, which is relative: copied as
it is to another place it jumps by the same distance, to where there is nothing. 1f001e9da6bb writes the
jump anew for each trampoline; its first backport to stable kernels copied it from ftrace_stub, broke
ftrace, and was reverted. The fixtures have no return thunks: here the bytes are those that a copied jump of
ftrace_stub would have.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from emu.text_poke import JMP32_OPCODE, text_gen_insn
from emu.trampoline import RET_SIZE, Trampolines
from patches.museum import Bug, Kind
from patches.variants import replaced

__all__ = ["BUG", "return_not_rebased"]


@contextmanager
def return_not_rebased() -> Iterator[None]:
    """End each trampoline with the jump of ftrace_stub, byte by byte."""
    create = Trampolines.create

    def create_trampoline(trampolines: Trampolines, ops: Any, func: int) -> tuple[int, int]:
        address, size = create(trampolines, ops, func)
        stub, thunk = (trampolines._symbol(name) for name in ("ftrace_stub", "__x86_return_thunk"))
        jump = text_gen_insn(JMP32_OPCODE, stub, thunk)
        trampolines._space.write(address + size - 8 - RET_SIZE, jump)
        return address, size

    with replaced(Trampolines, "create", create_trampoline):
        yield


BUG = Bug(
    title="A trampoline's relative jump to the return thunk is copied without being rebased",
    kind=Kind.SHIPPED,
    commit='1f001e9da6bb ("x86/ftrace: Use alternative RET encoding") (in v5.19)',
    invariant="trampolines_are_copies",
    breaks="create_trampoline() copies the return's bytes from ftrace_stub",
    bug=return_not_rebased,
)
