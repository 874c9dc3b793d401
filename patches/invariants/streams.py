"""Streams: a call of a patched function goes from site to trampoline to handler to the expected function."""

from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache

from unicorn.unicorn_py3.unicorn import UcError

from elf.errors import KlpemuError
from emu.assembly import Instruction, disassemble
from emu.memory import PAGE_SIZE, MemoryFault
from emu.stream import Stream
from patches.invariants.finding import Finding
from patches.invariants.subject import ExpectedFunc, Subject

__all__ = ["calls_reach_the_expected_function", "expected_target"]

# restore_mcount_regs brings these back, the handler's C ABI the others (psABI 3.2.1, "callee-saved").
ALWAYS_KEPT = ("rax", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "rbx", "r8", "r9", "r12", "r13", "r14", "r15")
THUNKS = ("_return_thunk", "_safe_ret")  # on its way a return may pass those of arch/x86/lib/retpoline.S
LONGEST = 15  # bytes of an instruction
RETURNS = {"ret", "retf", "retfq", "iret", "iretd", "iretq"}


def calls_reach_the_expected_function(subject: Subject) -> Iterator[Finding | None]:
    """Executed from its first byte, each patched function ends up at the func on top, every kept register
    intact.

    Source: klp_ftrace_handler() of kernel/livepatch/patch.c.
    """
    if subject.execute is None:
        return
    for function in subject.functions:
        for state in (0, 1) if function.moving else (None,):
            target = expected_target(subject, function, state)
            if target is None:
                problem: str | None = "no fentry site"
            else:
                problem = _judge(subject, function, target, state)
            if problem is None:
                yield None
            else:
                yield Finding("calls_reach_the_expected_function", problem, function.address, function.name)


def _judge(subject: Subject, function: ExpectedFunc, target: int, state: int | None) -> str | None:
    """What is wrong with a call of one function; None if nothing is."""
    try:
        stream = subject.run(function.address, target, state)
        assert stream is not None
        return (
            _did_not_arrive(subject, stream, target)
            or _took_another_way(subject, function, stream)
            or _lost_something(stream)
        )
    except (KlpemuError, UcError) as error:
        return f"the call cannot be followed: {error}"


def expected_target(subject: Subject, function: ExpectedFunc, state: int | None = None) -> int | None:
    """First instruction of the function that a call must reach: the top func's, or the original behind its
    site.

    `state` is the caller's patch_state: while the top func is in transition, one that has not switched (0)
    gets the func below.
    """
    symbol = subject.kallsyms.at(function.address)
    size = symbol.size if symbol is not None else 5
    sites = subject.sites_in(function.address, function.address + max(size, 5))
    if not sites:
        return None
    stack = function.stack[1:] if function.moving and state == 0 else function.stack
    top = stack[0] if stack else None
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
    way = (*stream.addresses, stream.after["rip"])
    wrong = _first_wrong(way, _codes(subject, stream.addresses))
    if wrong is not None:
        here, there = way[wrong], way[wrong + 1]
        instruction = _decoded(_code(subject, here), here)
        return f"from {subject.place(here)} ({instruction}) execution went to {subject.place(there)}"
    return _regions_in_order(subject, function, stream)


def _first_wrong(way: tuple[int, ...], codes: tuple[bytes, ...]) -> int | None:
    """Index of the first instruction that does not lead to the next address of the way; None without one."""
    for index, (here, code, there) in enumerate(zip(way, codes, way[1:], strict=False)):
        allowed = _successors(code, here)
        if allowed is not None and there not in allowed:
            return index
    return None


def _codes(subject: Subject, addresses: tuple[int, ...]) -> tuple[bytes, ...]:
    """The bytes at each of the addresses; what lies close together is read at once."""
    starts: list[int] = []
    blocks: list[bytes] = []
    ordered = sorted(set(addresses))
    for first, last in _runs(ordered):
        try:
            block = subject.memory.read(first, last + LONGEST - first)
        except MemoryFault:
            return tuple(_code(subject, address) for address in addresses)
        starts.append(first)
        blocks.append(block)
    found = {}
    for address in ordered:
        index = bisect_right(starts, address) - 1
        at = address - starts[index]
        found[address] = blocks[index][at : at + LONGEST]
    return tuple(found[address] for address in addresses)


def _runs(ordered: list[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of addresses with no more than an instruction between them."""
    first = last = ordered[0]
    for address in ordered[1:]:
        if address > last + LONGEST:
            yield first, last
            first = address
        last = address
    yield first, last


def _code(subject: Subject, address: int) -> bytes:
    """The bytes at an address; an instruction has at most 15, and its page may be the last one mapped."""
    try:
        return subject.memory.read(address, LONGEST)
    except MemoryFault:
        return subject.memory.read(address, min(LONGEST, PAGE_SIZE - address % PAGE_SIZE))


def _decoded(code: bytes, address: int) -> Instruction:
    """The first instruction of the code."""
    return next(disassemble(code, address))


@lru_cache(maxsize=1 << 14)
def _successors(code: bytes, address: int) -> frozenset[int] | None:
    """Where execution may go from the instruction that the code begins with; None where only the machine can
    tell.  Most streams go through the same trampolines and handler.
    """
    instruction = _decoded(code, address)
    word = instruction.mnemonic.split()[-1]
    behind = instruction.address + len(instruction.code)
    if word in RETURNS:
        return None
    if word in ("jmp", "call"):
        return frozenset({int(instruction.operands, 16)}) if instruction.operands.startswith("0x") else None
    if word.startswith(("j", "loop")):
        return frozenset({behind, int(instruction.operands, 16)})
    if instruction.mnemonic.startswith("rep"):
        return frozenset({behind, instruction.address})
    return frozenset({behind})


def _regions_in_order(subject: Subject, function: ExpectedFunc, stream: Stream) -> str | None:
    """The stream may touch the function up to its site, the trampoline, and what that calls, no more."""
    if not function.stack:
        return None
    names: list[str] = []
    low, high = 0, 0
    for address in stream.addresses:
        if not low <= address < high:
            name, here = _region(subject, address)
            low, high = here.start, here.stop
            if not name.endswith(THUNKS) and (not names or names[-1] != name):
                names.append(name)
    handler = [name for name in names if name == "klp_ftrace_handler"]
    if len(handler) != 1:
        return f"the stream went through {' -> '.join(names)}: the handler must run exactly once"
    entry = names[1] if len(names) > 1 else ""
    if (
        not entry.startswith(("ftrace_trampoline", "ftrace_caller", "ftrace_regs_caller"))
        or names[-1] != entry
    ):
        return f"the stream went through {' -> '.join(names)}: not into a trampoline and out of it again"
    return None


def _region(subject: Subject, address: int) -> tuple[str, range]:
    """What an address is part of, and from where to where that goes."""
    symbol = subject.kallsyms.at(address)
    if symbol is None:
        return f"{address:#x}", range(address, address + 1)
    for name in ("ftrace_caller", "ftrace_regs_caller", "klp_ftrace_handler", "arch_ftrace_ops_list_func"):
        end = subject.symbols.get(f"{name}_end")  # none where a whole function has one symbol
        if end is not None:
            region = range(subject.symbols[name], end + (16 if "caller" in name else 0))
            if address in region:
                return name, region
    return symbol.name, range(symbol.address, symbol.address + max(symbol.size, 1))


def _lost_something(stream: Stream) -> str | None:
    for name in ALWAYS_KEPT:
        if stream.before[name] != stream.after[name]:
            return (
                f"{name} was {stream.before[name]:#x} and is {stream.after[name]:#x} at the expected function"
            )
    if stream.stack_before != stream.stack_after:
        return "the caller's return address or stack was overwritten"
    if stream.vectors_before != stream.vectors_after:
        return "an SSE register changed"
    return None
