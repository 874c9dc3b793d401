"""Streams: a call of a patched function goes from site to trampoline to handler to the expected function."""

import itertools
from collections.abc import Iterator

from emu.assembly import disassemble
from emu.memory import MemoryFault
from emu.stream import Stream
from patches.invariants.finding import Finding
from patches.invariants.subject import ExpectedFunc, Subject

__all__ = ["calls_reach_the_expected_function", "expected_target"]

# restore_mcount_regs brings these back, the handler's C ABI the others (psABI 3.2.1, "callee-saved").
ALWAYS_KEPT = ("rax", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "rbx", "r8", "r9", "r12", "r13", "r14", "r15")
UNCONDITIONAL = {"jmp", "call", "ret", "retf", "iretq"}


def calls_reach_the_expected_function(subject: Subject) -> Iterator[Finding | None]:
    """Executed from its first byte, each patched function ends up at the func on top, every kept register intact."""
    if subject.execute is None:
        return
    for function in subject.functions:
        target = expected_target(subject, function)
        if target is None:
            yield Finding("calls_reach_the_expected_function", "no fentry site", function.address, function.name)
            continue
        stream = subject.execute(function.address, target)
        problem = (
            _did_not_arrive(subject, stream, target)
            or _took_another_way(subject, function, stream)
            or _lost_something(stream)
        )
        if problem is None:
            yield None
        else:
            yield Finding("calls_reach_the_expected_function", problem, function.address, function.name)


def expected_target(subject: Subject, function: ExpectedFunc) -> int | None:
    """First instruction of the function that a call must reach: the top func's, or the original behind its site."""
    symbol = subject.kallsyms.at(function.address)
    size = symbol.size if symbol is not None else 5
    sites = subject.sites_in(function.address, function.address + max(size, 5))
    if not sites:
        return None
    top = function.stack[0] if function.stack else None
    return sites[0] + 5 if top is None else top


def _did_not_arrive(subject: Subject, stream: Stream, target: int) -> str | None:
    if stream.reached:
        return None
    at = stream.stop.rip
    wanted = subject.kallsyms.describe(target)
    return (
        f"{wanted} was not reached: {stream.stop.kind.value} at {subject.kallsyms.describe(at)} "
        f"after {len(stream.addresses)} instructions"
    )


def _took_another_way(subject: Subject, function: ExpectedFunc, stream: Stream) -> str | None:
    """Each executed instruction must be one that Capstone decodes, and its successor one that it allows."""
    decoded: dict[int, tuple[int, str, str]] = {}
    for address in stream.addresses:
        if address not in decoded:
            try:
                instruction = next(disassemble(subject.memory.read(address, 15), address))
            except MemoryFault:
                instruction = next(disassemble(subject.memory.read(address, 1), address))
            decoded[address] = (len(instruction.code), instruction.mnemonic, instruction.operands)
    for here, there in itertools.pairwise((*stream.addresses, stream.after["rip"])):
        size, mnemonic, operands = decoded[here]
        allowed = {here + size}
        word = mnemonic.split()[-1]
        direct = int(operands, 16) if operands.startswith("0x") else None
        if word in UNCONDITIONAL:
            if direct is None:
                continue  # a return or an indirect jump: where it goes is the machine's answer
            allowed = {direct}
        elif direct is not None and word.startswith("j"):
            allowed.add(direct)
        if there not in allowed:
            return f"from {here:#x} ({mnemonic} {operands}) execution went to {there:#x}"
    return _regions_in_order(subject, function, stream)


def _regions_in_order(subject: Subject, function: ExpectedFunc, stream: Stream) -> str | None:
    """The stream may only touch the function up to its site, the trampoline, and what the trampoline calls."""
    if not function.stack:
        return None
    names = [name for name, _ in itertools.groupby(_region(subject, address) for address in stream.addresses)]
    handler = [name for name in names if name == "klp_ftrace_handler"]
    if len(handler) != 1:
        return f"the stream went through {' -> '.join(names)}: the handler must run exactly once"
    entry = names[1] if len(names) > 1 else ""
    if not entry.startswith(("ftrace_trampoline", "ftrace_caller", "ftrace_regs_caller")) or names[-1] != entry:
        return f"the stream went through {' -> '.join(names)}: not into a trampoline and out of it again"
    return None


def _region(subject: Subject, address: int) -> str:
    symbol = subject.kallsyms.at(address)
    if symbol is None:
        return f"{address:#x}"
    for name in ("ftrace_caller", "ftrace_regs_caller", "klp_ftrace_handler", "arch_ftrace_ops_list_func"):
        if subject.symbols[name] <= address < subject.symbols[f"{name}_end"] + (16 if "caller" in name else 0):
            return name
    return symbol.name


def _lost_something(stream: Stream) -> str | None:
    for name in ALWAYS_KEPT:
        if stream.before[name] != stream.after[name]:
            return f"{name} was {stream.before[name]:#x} and is {stream.after[name]:#x} at the expected function"
    if stream.stack_before != stream.stack_after:
        return "the caller's return address or stack was overwritten"
    if stream.vectors_before != stream.vectors_after:
        return "an SSE register changed"
    return None
