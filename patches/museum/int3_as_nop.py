"""While a site was being changed, whoever hit its int3 skipped it as if a NOP stood there.

That was right for a tracer, which misses one call, and wrong for a livepatch: as soon as a second user of
ftrace comes to a patched function, the site goes from one call to another, and for that moment the function
ran unpatched.  The fix had to push a return address from inside of the breakpoint handler, for which the
entry code had to leave a gap on the stack.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from emu.text_poke import INSN_SIZE, TextPoker
from patches.museum import Bug, Kind
from patches.variants import replaced

__all__ = ["BUG", "int3_as_nop"]


@contextmanager
def int3_as_nop() -> Iterator[None]:
    """Go on behind the site, whatever will stand there."""
    claims = TextPoker.poke_int3_handler

    def poke_int3_handler(poker: TextPoker, registers: dict[str, int], push: Callable[[int], None]) -> bool:
        behind = registers["rip"] - 1 + INSN_SIZE
        ours = claims(poker, registers, lambda value: None)
        registers["rip"] = behind if ours else registers["rip"]
        return ours

    with replaced(TextPoker, "poke_int3_handler", poke_int3_handler):
        yield


BUG = Bug(
    title="An int3 on a live call site is treated as a NOP",
    kind=Kind.SHIPPED,
    commit='9e298e860408 ("ftrace/x86_64: Emulate call function while updating in breakpoint handler") '
    "(in v5.2)",
    invariant="versions_are_never_mixed",
    breaks="poke_int3_handler() goes on behind the site instead of doing what the new instruction does",
    bug=int3_as_nop,
)
