"""Nop funcs stay until their patch goes: the behaviour before d697bad588 ("livepatch: Remove Nop structures
when unused") (in v5.1).

Atomic replace came one commit earlier, in e1452b607c ("livepatch: Add atomic replace") (in v5.1): what the
new patch does not patch gets a nop func, which leaves the original to run.  Until d697bad588 nothing removed
it again, so that a function nobody patches any more kept its call, its trampoline and its walk through the
handler.  The next replacing patch finds the nops of the one before among its funcs and makes nops for them,
too.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from emu.kallsyms import Kallsyms
from patches import core, stacks
from patches.klp import Klp, klp_for_each_func, klp_for_each_object
from patches.livepatch import Patch
from patches.variants import replaced

__all__ = ["nops_kept"]


@contextmanager
def nops_kept() -> Iterator[None]:
    """Enable, replace and disable as a kernel before d697bad588 does, and expect it of the func_stacks.

    What is enabled inside the block must be disabled inside it.
    """
    # By kernel and patch: the functions that older patches patched and this one does not.
    left: dict[tuple[Kallsyms, str], set[int]] = {}
    original = stacks.expected_funcs

    def klp_discard_nops(klp: Klp, new_patch: Any) -> None:
        kallsyms, older = klp.machine.kallsyms, set[int]()
        for each in klp.patches():
            if each == new_patch:
                break
            older |= _patched_by(each) | left.get((kallsyms, klp.name_of(each)), set())
        left[kallsyms, klp.name_of(new_patch)] = older - _patched_by(new_patch)

    def expected_funcs(
        kallsyms: Kallsyms, patch: Patch, new_func: Mapping[str, int]
    ) -> Iterator[tuple[int, int | None]]:
        yield from original(kallsyms, patch, new_func)
        for address in sorted(left.get((kallsyms, patch.name), ())):
            yield address, None

    with (
        replaced(core, "klp_discard_nops", klp_discard_nops),
        replaced(stacks, "expected_funcs", expected_funcs),
    ):
        yield


def _patched_by(patch_: Any) -> set[int]:
    """The functions that a patch replaces with code of its own."""
    return {
        func.old_func
        for obj in klp_for_each_object(patch_)
        for func in klp_for_each_func(obj)
        if not func.nop and func.old_func
    }
