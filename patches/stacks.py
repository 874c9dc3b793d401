"""What every func_stack must hold, computed from the patches as they were declared and nothing else.

Variants that change what a patch keeps on the func_stacks replace `expected_funcs`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emu.kallsyms import Kallsyms
from patches.invariants.subject import ExpectedFunc
from patches.klp import Klp
from patches.livepatch import VMLINUX, Patch

__all__ = ["expected_funcs", "expected_functions", "has_funcs_on_stacks"]


def expected_functions(
    kallsyms: Kallsyms,
    enabled: Sequence[tuple[Patch, Mapping[str, int]]],
    moving: str = "",
    *,
    replaces: bool = False,
) -> list[ExpectedFunc]:
    """The patched functions; `enabled` are the patches, oldest first, with their replacements' addresses.

    `moving` is the patch in transition.  If it `replaces` the older ones and has not done so yet, it has a
    nop func for each function that they patch and it does not.
    """
    stacks: dict[int, list[int | None]] = {}
    on_top: set[int] = set()
    for patch, new_func in enabled:
        for address, target in expected_funcs(kallsyms, patch, new_func):
            stacks.setdefault(address, []).insert(0, target)
            on_top.discard(address)
            if patch.name == moving:
                on_top.add(address)
    if replaces:
        for address in stacks.keys() - on_top:
            stacks[address].insert(0, None)
        on_top = set(stacks)
    return [
        ExpectedFunc(address, kallsyms.describe(address), tuple(stack), address in on_top)
        for address, stack in stacks.items()
    ]


def has_funcs_on_stacks(klp: Klp, guest: Any) -> bool:
    """Whether the patch of a klp_patch that the core knows has funcs on the func_stacks.

    It has, from when it is enabled until it is gone; where a patch outlives being disabled a variant says so.
    """
    return True


def expected_funcs(
    kallsyms: Kallsyms, patch: Patch, new_func: Mapping[str, int]
) -> Iterator[tuple[int, int | None]]:
    """What one enabled patch has on the func_stacks: a function, and its replacement (None for a nop func).

    Only loaded objects count, and nop funcs are gone once their patch is enabled.
    """
    loaded = set(kallsyms.modules())
    for objname, funcs in patch.objects.items():
        module = "" if objname == VMLINUX else objname
        if module in loaded:
            for func in funcs:
                yield kallsyms.address_of(func.old, module, func.sympos), new_func[func.new]
