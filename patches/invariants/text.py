"""Text: every byte is what the files, the fentry sites and the ftrace records say it is."""

from collections.abc import Iterator
from typing import Any

from emu.dyn_ftrace import FtraceFl, ftrace_rec_count
from emu.memory import MemoryFault
from patches.invariants.finding import Finding
from patches.invariants.subject import Subject

__all__ = ["records_match_ops", "text_matches_records", "trampolines_are_copies"]

NOP5 = bytes.fromhex("0f1f440000")
SAVE_REGS = 1 << 2
ALLOC_TRAMP = 1 << 11
IPMODIFY = 1 << 12


def text_matches_records(subject: Subject) -> Iterator[Finding | None]:
    """Every byte of text is the file's, but for fentry sites, which are what their record says."""
    symbols = subject.symbols
    called = _called(subject)
    func = subject.pointer("ftrace_trace_function")
    special = {symbols[name]: _call(symbols[name], func) for name in ("ftrace_call", "ftrace_regs_call")}
    for text in subject.texts:
        end = text.address + len(text.contents)
        expected = bytearray(text.contents)
        for ip in subject.sites_in(text.address, end):
            target = called.get(ip)
            expected[ip - text.address : ip - text.address + 5] = NOP5 if target is None else _call(ip, target)
        for ip, code in special.items():
            if text.address <= ip < end:
                expected[ip - text.address : ip - text.address + 5] = code
        yield from _compare(subject, text.address, bytes(expected), "text differs")


def records_match_ops(subject: Subject) -> Iterator[Finding | None]:
    """The records are those of the files' sites, and their flags are what the registered ops add up to."""
    records = subject.records
    for ip in sorted(subject.sites ^ records.keys()):
        what = "a site of the file has no record" if ip in subject.sites else "a record names no site of a file"
        yield Finding("records_match_ops", what, ip, subject.kallsyms.describe(ip))
    wanted: dict[int, list[Any]] = {}
    for ops, addresses in subject.registered:
        for ip in addresses:
            wanted.setdefault(ip, []).append(ops)
    for ip, flags in records.items():
        expected = _flags(wanted.get(ip, []))
        if flags == expected:
            yield None
            continue
        yield Finding(
            "records_match_ops",
            f"record flags are {flags:#x} (count {ftrace_rec_count(flags)}), the registered ops ask for {expected:#x}",
            ip,
            subject.kallsyms.describe(ip),
        )


def trampolines_are_copies(subject: Subject) -> Iterator[Finding | None]:
    """Each private trampoline is the file's ftrace_caller with its own ops, its own handler, and a return."""
    code = next(text for text in subject.texts if text.address <= subject.symbols["ftrace_caller"] < _end(text))
    for ops, _ in subject.registered:
        if not ops.flags & ALLOC_TRAMP:
            continue
        name = "ftrace_regs_caller" if ops.flags & SAVE_REGS else "ftrace_caller"
        call_name = "ftrace_regs_call" if ops.flags & SAVE_REGS else "ftrace_call"
        start, end = subject.symbols[name], subject.symbols[f"{name}_end"]
        load = subject.symbols[f"{name}_op_ptr"] - start
        call = subject.symbols[call_name] - start
        expected = bytearray(code.contents[start - code.address : end - code.address])
        size = len(expected)
        if ops.flags & SAVE_REGS:
            jump = subject.symbols["ftrace_regs_caller_jmp"] - start
            expected[jump : jump + 2] = b"\x66\x90"
        expected += b"\xc3\xcc\0\0\0" + ops.address_.to_bytes(8, "little")
        expected[load + 3 : load + 7] = (size + 5 - load - 7).to_bytes(4, "little")
        expected[call : call + 5] = _call(ops.trampoline + call, ops.func)
        yield from _compare(subject, ops.trampoline, bytes(expected), "trampoline differs")


def _called(subject: Subject) -> dict[int, int | None]:
    """What each enabled site calls; None where the record says a trampoline and no ops has one for it."""
    trampolines: dict[int, int] = {}
    for ops, addresses in subject.registered:
        if ops.trampoline:
            for ip in addresses:
                trampolines.setdefault(ip, ops.trampoline)
    called: dict[int, int | None] = {}
    for ip, flags in subject.records.items():
        if flags & FtraceFl.TRAMP_EN:
            called[ip] = trampolines.get(ip)
        elif flags & FtraceFl.ENABLED:
            called[ip] = subject.symbols["ftrace_regs_caller" if flags & FtraceFl.REGS_EN else "ftrace_caller"]
    return called


def _flags(ops: list[Any]) -> int:
    if not ops:
        return 0
    flags = len(ops) | FtraceFl.ENABLED
    if len(ops) == 1 and ops[0].trampoline:
        flags |= FtraceFl.TRAMP | FtraceFl.TRAMP_EN
    if any(each.flags & SAVE_REGS for each in ops):
        flags |= FtraceFl.REGS | FtraceFl.REGS_EN
    if any(each.flags & IPMODIFY for each in ops):
        flags |= FtraceFl.IPMODIFY
    return int(flags)


def _call(address: int, target: int) -> bytes:
    """`call rel32`: E8 and the distance from the next instruction (SDM Vol. 2A, CALL)."""
    return b"\xe8" + ((target - address - 5) & 0xFFFF_FFFF).to_bytes(4, "little")


def _compare(subject: Subject, address: int, expected: bytes, what: str) -> Iterator[Finding | None]:
    """One finding for each run of bytes that differ, widened to the instruction at a site if there is one."""
    try:
        found = subject.memory.read(address, len(expected))
    except MemoryFault:
        yield Finding("text_matches_records", "text is not mapped", address, subject.kallsyms.describe(address))
        return
    yield None
    if found == expected:
        return
    at = 0
    while at < len(expected):
        if expected[at] == found[at]:
            at += 1
            continue
        start = subject.site_at(address + at) - address
        end = max(at + 1, start + 5 if start != at else at + 1)
        while end < len(expected) and expected[end] != found[end]:
            end += 1
        yield Finding(
            "text_matches_records" if what == "text differs" else "trampolines_are_copies",
            what,
            address + start,
            subject.kallsyms.describe(address + start),
            expected[start:end],
            found[start:end],
        )
        at = end


def _end(text: Any) -> int:
    return int(text.address) + len(text.contents)
