"""One function at one moment: its site's bytes and what they say, its func_stack, ftrace's line about it."""

from dataclasses import dataclass

from emu.assembly import Instruction, disassemble
from klpemu.kernel import Kernel
from patches.livepatch import VMLINUX

__all__ = ["FunctionState", "branch_target", "function_state", "has_site", "patched_functions"]


@dataclass(frozen=True, slots=True)
class FunctionState:
    """`place` is the site as `sym+0x0/0x10`, `site` its guest virtual address, `text` its disassembly.

    `func_stack` is newest first, empty if no patch is on the function; `enabled_functions` is the line of
    tracefs' file about the site, with tabs, empty if it has none.
    """

    function: str
    place: str
    site: int
    code: bytes
    text: str
    func_stack: tuple[str, ...]
    enabled_functions: str


def function_state(kernel: Kernel, function: str, *, att: bool = False) -> FunctionState:
    """The present state of a function given as `name`, `module:name` or `name,sympos`."""
    site, code = kernel.site_of(function)
    describe = kernel.machine.kallsyms.describe
    texts = []
    for each in disassemble(code, site, att=att):
        target = branch_target(each)
        texts.append(f"{each}  # {describe(target)}" if target is not None else str(each))
    return FunctionState(
        function=function,
        place=describe(site),
        site=site,
        code=code,
        text="; ".join(texts),
        func_stack=tuple(kernel.function_stack(function)),
        enabled_functions=kernel.machine.ftrace.enabled_function(site),
    )


def has_site(kernel: Kernel, function: str) -> bool:
    """Whether ftrace has a record in the function."""
    return bool(kernel.machine.ftrace.ftrace_location(kernel.address_of(function)))


def patched_functions(kernel: Kernel) -> list[str]:
    """The functions that enabled patches replace in loaded objects, in the order they were declared."""
    names: dict[int, str] = {}
    for each in kernel.enabled:
        for objname, funcs in each.patch.objects.items():
            if objname != VMLINUX and objname not in kernel.machine.modules.objects:
                continue
            for func in funcs:
                name = f"{objname}:{func.old}" + (f",{func.sympos}" if func.sympos else "")
                names.setdefault(kernel.address_of(name), name)
    return list(names.values())


def branch_target(instruction: Instruction) -> int | None:
    """Where a direct call or jump leads; None for every other instruction."""
    if not instruction.mnemonic.startswith(("call", "j")):
        return None
    try:
        return int(instruction.operands, 16)
    except ValueError:
        return None
