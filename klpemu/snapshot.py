"""A snapshot of an emulated kernel, in the form of the recording of a real one (klpemu/recording.py)."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from elf.errors import KlpemuError
from emu.assembly import disassemble
from emu.errno import KernelErrno
from emu.ftrace_64 import RIP_RELATIVE_LOAD_RDX
from emu.memory import PAGE_SIZE
from emu.text_poke import CALL_OPCODE, INSN_SIZE, NOP5
from emu.view import list_for_each_entry
from klpemu.kernel import Kernel
from klpemu.recording import Snapshot

__all__ = ["LIVEPATCH", "symbol_at", "take_snapshot"]

LIVEPATCH: Final = "/sys/kernel/livepatch"
_SHOWN: Final = 16  # bytes of a function
_PATCH_FILES: Final = ("enabled", "transition")


def take_snapshot(kernel: Kernel, label: str, watched: Mapping[str, str]) -> Snapshot:
    """What memory is like now; `watched` has the modules of the functions to look at ("": the kernel).

    A function of a module that is not loaded is left out.
    """
    sites = {}
    for name, module in watched.items():
        found = kernel.machine.kallsyms.named(name, module)
        if found:
            sites[name] = _site(kernel, found[0].address, module)
    return Snapshot(
        label,
        sites,
        tuple(kernel.machine.ftrace.enabled_functions()),
        {name: _patch_files(kernel, name) for name in _listdir(kernel, LIVEPATCH)},
        kernel.read("/proc/modules"),
    )


def symbol_at(kernel: Kernel, address: int, preferred: Mapping[int, str] | None = None) -> str:
    """`name` or `name [module]` of what begins at an address, as the recorder writes it; else the address."""
    if preferred and address in preferred:
        return preferred[address]
    symbol = kernel.machine.kallsyms.at(address)
    if symbol is None or symbol.address != address:
        return f"{address:#x}"
    name = symbol.name.removeprefix("__klpemu_")
    return f"{name} [{symbol.module}]" if symbol.module else name


def _site(kernel: Kernel, address: int, module: str) -> dict[str, Any]:
    code = kernel.machine.space.read(address, _SHOWN)
    site: dict[str, Any] = {
        "addr": f"{address:#x}",
        "module": module,
        "bytes16": code.hex(),
        "kind": "nop5" if code[:INSN_SIZE] == NOP5 else "call" if code[0] == CALL_OPCODE else "other",
    }
    if site["kind"] == "call":
        target = address + INSN_SIZE + int.from_bytes(code[1:INSN_SIZE], "little", signed=True)
        site["target"] = f"{target:#x}"
        site["target_sym"] = symbol_at(kernel, target)
        site |= _trampoline(kernel, target)
    site |= _ops(kernel, address)
    return site


def _trampoline(kernel: Kernel, target: int) -> dict[str, Any]:
    """The private trampoline at an address, as its bytes tell it."""
    owner = next((ops for ops in kernel.machine.ftrace.each_ops() if ops.trampoline == target), None)
    if owner is None:
        return {"per_ops_trampoline": False}
    size = owner.trampoline_size
    pointer = size - 8
    code = kernel.machine.space.read(target, size)
    found: dict[str, Any] = {
        "per_ops_trampoline": True,
        "tramp_bytes": code[:pointer].hex(),
        "ops_ptr_off": pointer,
        "tramp_len": size,
    }
    for each in disassemble(code[:pointer], target):
        displacement = int.from_bytes(each.code[-4:], "little", signed=True)
        to = each.address + len(each.code) + displacement
        if each.code[:3] == RIP_RELATIVE_LOAD_RDX and to == target + pointer:
            found["ops_load_insn_off"] = each.address - target
        if each.code[0] == CALL_OPCODE and "call_off" not in found:
            found["call_off"] = each.address - target
            found["call_target"] = f"{to:#x}"
            found["call_target_sym"] = symbol_at(kernel, to)
    rest = kernel.machine.space.read(target + size, -(target + size) % PAGE_SIZE)
    found["tramp_page_rest_zero"] = not any(rest)
    return found


def _ops(kernel: Kernel, address: int) -> dict[str, Any]:
    """The klp_ops of a function: its ftrace_ops, and the funcs on its stack, top first."""
    for ops in kernel.klp.ops():
        funcs = list(list_for_each_entry(ops.func_stack, "klp_func", "stack_node"))
        if funcs and funcs[0].old_func == address:
            return {
                "fops": {"func": symbol_at(kernel, ops.fops.func), "flags": f"{ops.fops.flags:#x}"},
                "func_stack": [_func(kernel, each) for each in funcs],
            }
    return {}


def _func(kernel: Kernel, func: Any) -> dict[str, Any]:
    return {
        "old_name": kernel.klp.string(func.old_name),
        "old_func": f"{func.old_func:#x}",
        "new_func": f"{func.new_func:#x}",
        "new_sym": symbol_at(kernel, func.new_func),
        "nop": int(func.nop),
        "patched": int(func.patched),
        "transition": int(func.transition),
    }


def _patch_files(kernel: Kernel, name: str) -> dict[str, str]:
    values = {}
    for file in _PATCH_FILES:
        try:
            values[file] = kernel.read(f"{LIVEPATCH}/{name}/{file}").rstrip("\n")
        except KernelErrno as error:
            values[file] = str(error)
    return values


def _listdir(kernel: Kernel, path: str) -> Iterable[str]:
    try:
        return kernel.machine.kernfs.listdir(path)
    except KlpemuError:
        return ()
