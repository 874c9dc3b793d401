"""What every func_stack must hold, computed from the patches as they were declared and nothing else.

Variants that change what stays on a func_stack replace `expected_functions`.
"""

from collections.abc import Mapping, Sequence

from emu.kallsyms import Kallsyms
from patches.invariants.subject import ExpectedFunc
from patches.livepatch import VMLINUX, Patch

__all__ = ["expected_functions"]


def expected_functions(
    kallsyms: Kallsyms, enabled: Sequence[tuple[Patch, Mapping[str, int]]]
) -> list[ExpectedFunc]:
    """The patched functions of loaded objects; `enabled` are the patches, oldest first, with their symbols."""
    stacks: dict[int, list[int | None]] = {}
    loaded = set(kallsyms.modules())
    for patch, new_func in enabled:
        for objname, funcs in patch.objects.items():
            module = "" if objname == VMLINUX else objname
            if module not in loaded:
                continue
            for func in funcs:
                address = kallsyms.address_of(func.old, module, func.sympos)
                stacks.setdefault(address, []).insert(0, new_func[func.new])
    return [
        ExpectedFunc(address, kallsyms.describe(address), tuple(stack)) for address, stack in stacks.items()
    ]
