"""Text: every byte is what the files, the fentry sites and the ftrace records say it is."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import repeat
from typing import Any

from emu.assembly import disassemble
from emu.dyn_ftrace import FtraceFl, ftrace_rec_count
from emu.memory import PAGE_SIZE, MemoryFault, read_u32, read_u64
from emu.module import Text
from patches.invariants.finding import Finding, value_finding
from patches.invariants.subject import Subject

__all__ = ["records_match_ops", "text_matches_records", "trampolines_are_copies"]

NOP5 = bytes.fromhex("0f1f440000")
SAVE_REGS = 1 << 2
ALLOC_TRAMP = 1 << 11
IPMODIFY = 1 << 12
DIRECT = 1 << 17
PIECE = 256 * PAGE_SIZE


def text_matches_records(subject: Subject) -> Iterator[Finding | None]:
    """Every byte of text is the file's, but for fentry sites, which are what their record says.

    Source: ftrace_replace_code() and ftrace_modify_all_code() of arch/x86/kernel/ftrace.c and
    kernel/trace/ftrace.c.
    """
    symbols = subject.symbols
    called = _called(subject)
    func = subject.pointer("ftrace_trace_function")
    names = ("ftrace_call", "ftrace_regs_call")
    if _is_enabled(subject) and subject.ftrace.ops:
        special = {symbols[name]: _call(symbols[name], func) for name in names}
    else:  # nothing calls the trampolines: these two are changed when something does again
        special = {symbols[name]: subject.memory.read(symbols[name], 5) for name in names}
    calls = {ip: _call(ip, target) for ip, target in called.items() if ip in subject.sites} | special
    for text in subject.texts:
        own = {ip: code for ip, code in sorted(calls.items()) if text.address <= ip < _end(text)}
        if len(text.contents) <= PIECE:
            same = _is_as_expected(subject, text, 0, tuple(own.items()))
        else:
            starts = range(0, len(text.contents), PIECE)
            pieces = ((text, start, _calls_in(own, text.address + start)) for start in starts)
            same = all(subject.once(_is_as_expected, *piece) for piece in pieces)
        if same:
            yield None
            continue
        expected = bytearray(_idle(text, tuple(subject.sites_in(text.address, _end(text)))))
        for ip, code in own.items():
            expected[ip - text.address : ip - text.address + 5] = code
        yield from _compare(subject, "text_matches_records", "text differs", text.address, bytes(expected))


def _calls_in(calls: Mapping[int, bytes], start: int) -> tuple[tuple[int, bytes], ...]:
    """The calls that lie in the piece at an address, or reach into it."""
    return tuple((ip, code) for ip, code in calls.items() if start - len(code) < ip < start + PIECE)


def _is_as_expected(subject: Subject, text: Text, start: int, calls: tuple[tuple[int, bytes], ...]) -> bool:
    """A piece of the text, `start` bytes behind its beginning, is idle but for the calls.

    Piece by piece: copies of all of a kernel's text at once would take longer than comparing it.
    """
    size = min(PIECE, len(text.contents) - start)
    address = text.address + start
    sites = subject.sites_in(address - len(NOP5) + 1, address + size)
    expected = bytearray(_idle_piece(text, start, size, tuple(sites)))
    for ip, code in calls:
        _put(expected, ip - address, code)
    try:
        return subject.memory.read(address, size) == expected
    except MemoryFault:
        return False


@lru_cache(maxsize=256)
def _idle_piece(text: Text, start: int, size: int, sites: tuple[int, ...]) -> bytes:
    """A piece of the text with all its sites idle.  It is the same at each step."""
    piece = bytearray(text.contents[start : start + size])
    for ip in sites:
        _put(piece, ip - text.address - start, NOP5)
    return bytes(piece)


def _put(piece: bytearray, at: int, code: bytes) -> None:
    """Write code at an offset that may lie before the piece, and reach over its end."""
    first, last = max(at, 0), min(at + len(code), len(piece))
    piece[first:last] = code[first - at : last - at]


@lru_cache(maxsize=8)
def _idle(text: Text, sites: tuple[int, ...]) -> bytes:
    """The text with all its sites idle."""
    contents = bytearray(text.contents)
    for ip in sites:
        contents[ip - text.address : ip - text.address + 5] = NOP5
    return bytes(contents)


def records_match_ops(subject: Subject) -> Iterator[Finding | None]:
    """The records are those of the files' sites, and their flags are what the registered ops add up to.

    Source: __ftrace_hash_rec_update() and the flags of include/linux/ftrace.h.
    """
    invariant, ftrace, enabled = "records_match_ops", subject.ftrace, _is_enabled(subject)
    for damage in (*ftrace.record_damage, *ftrace.hash_damage):
        yield Finding(invariant, damage.what, damage.address, subject.place(damage.address))
    without, strange = _compared(subject.sites, ftrace.ips)
    for ip in without:
        yield Finding(invariant, "a site of the file has no record", ip, subject.place(ip))
    for ip in strange:
        at = ftrace.record_at(ip)
        yield Finding(invariant, f"a record's ip is {ip:#x}, no site of a file", at, subject.place(at))
    wanted: dict[int, list[Any]] = {}
    for each in ftrace.ops:
        for ip in each.addresses:
            wanted.setdefault(ip, []).append(each.ops)
    for ip in sorted(ip for ip in wanted.keys() - subject.sites if ip not in ftrace.ips):
        yield Finding(invariant, f"an ops wants {ip:#x}, which is no site", ip, subject.place(ip))
    busy = ftrace.flags.keys() | {ip for ip in wanted if ip in ftrace.ips}
    yield from repeat(None, len(ftrace.ips) - len(busy))
    for ip in sorted(busy):
        flags = ftrace.flags.get(ip, 0)
        expected = _flags(wanted.get(ip, []), enabled)
        if flags == expected:
            yield None
            continue
        what = (
            f"record flags are {flags:#x} (count {ftrace_rec_count(flags)}), "
            f"the registered ops ask for {expected:#x} (count {ftrace_rec_count(expected)})"
        )
        yield value_finding(invariant, what, ip, subject.place(ip), expected, flags)


@lru_cache(maxsize=16)
def _compared(sites: frozenset[int], ips: frozenset[int]) -> tuple[list[int], list[int]]:
    """The sites without a record, and the records of no site."""
    return sorted(sites - ips), sorted(ips - sites)


def trampolines_are_copies(subject: Subject) -> Iterator[Finding | None]:
    """Each private trampoline is the file's ftrace_caller with its own ops, its own handler, and a return.

    Source: create_trampoline() of arch/x86/kernel/ftrace.c.
    """
    code = next(
        text for text in subject.texts if text.address <= subject.symbols["ftrace_caller"] < _end(text)
    )
    for each in subject.ftrace.ops:
        ops = each.ops
        if not ops.flags & ALLOC_TRAMP:
            continue
        address, func, regs = ops.trampoline, ops.func, bool(ops.flags & SAVE_REGS)
        size = _size_of_copy(subject, regs)
        if ops.trampoline_size != size:
            what = f"trampoline_size is {ops.trampoline_size:#x}, a copy takes {size:#x} bytes"
            at = ops.member_("trampoline_size")
            yield value_finding(
                "trampolines_are_copies", what, at, subject.place(at), size, ops.trampoline_size
            )
        expected = _copy(subject, code, regs, address, func)
        pointer = address + len(expected)
        yield from _compare(subject, "trampolines_are_copies", "trampoline differs", address, expected)
        yield _check_pointer(subject, pointer, ops.address_)
        rest = bytes(-(pointer + 8) % PAGE_SIZE)
        yield from _compare(
            subject, "trampolines_are_copies", "the page behind a trampoline differs", pointer + 8, rest
        )


def _size_of_copy(subject: Subject, regs: bool) -> int:
    name = "ftrace_regs_caller" if regs else "ftrace_caller"
    return subject.symbols[f"{name}_end"] - subject.symbols[name] + 5 + 8


def _check_pointer(subject: Subject, at: int, ops: int) -> Finding | None:
    try:
        found = read_u64(subject.memory, at)
    except MemoryFault:
        return None  # the code before it is not mapped either, and that is reported
    if found == ops:
        return None
    what = f"the trampoline of the ops at {ops:#x} passes the ops at {found:#x}"
    return value_finding("trampolines_are_copies", what, at, subject.place(at), ops, found)


def _copy(subject: Subject, code: Text, regs: bool, address: int, func: int) -> bytes:
    """The code of a trampoline and its return of five bytes (create_trampoline()); the ops pointer is behind
    it.
    """
    name, call_name = ("ftrace_regs_caller", "ftrace_regs_call") if regs else ("ftrace_caller", "ftrace_call")
    start, end = subject.symbols[name], subject.symbols[f"{name}_end"]
    load = subject.symbols[f"{name}_op_ptr"] - start
    call = subject.symbols[call_name] - start
    expected = bytearray(code.contents[start - code.address : end - code.address])
    size = len(expected)
    if regs:
        jump = subject.symbols["ftrace_regs_caller_jmp"] - start
        expected[jump : jump + 2] = b"\x66\x90"
    thunk = subject.return_thunk_at(address + size)
    expected += b"\xc3\xcc\0\0\0" if thunk is None else b"\xe9" + _call(address + size, thunk)[1:]
    expected[load + 3 : load + 7] = (size + 5 - load - 7).to_bytes(4, "little")
    expected[call : call + 5] = _call(address + call, func)
    return bytes(expected)


def _called(subject: Subject) -> dict[int, int]:
    """What each site that is no NOP calls, as its record says, or without a record as the ops want it."""
    ftrace = subject.ftrace
    trampolines: dict[int, int] = {}
    flags = dict(ftrace.flags)
    for each in ftrace.ops:
        for ip in each.addresses:
            if each.ops.trampoline:
                trampolines.setdefault(ip, each.ops.trampoline)
            if ip not in ftrace.ips:
                flags[ip] = _flags([other.ops for other in ftrace.ops if ip in other.addresses], True)
    called: dict[int, int] = {}
    for ip, flag in flags.items():
        if not flag:
            continue
        if flag & FtraceFl.TRAMP_EN:
            target = trampolines.get(ip) or _trampoline_called(subject, ip)
            if target is not None:
                called[ip] = target
        elif flag & FtraceFl.ENABLED:
            called[ip] = subject.symbols["ftrace_regs_caller" if flag & FtraceFl.REGS_EN else "ftrace_caller"]
    return called


def _trampoline_called(subject: Subject, ip: int) -> int | None:
    """The start of the trampoline that the site's bytes call.

    The record says "a trampoline" and no ops of the list has one for this site, so which one cannot be known;
    that is a finding of records_match_ops, and here only a call of anything else is one more.
    """
    code = subject.memory.read(ip, 5)
    target = ip + 5 + int.from_bytes(code[1:], "little", signed=True)
    symbol = subject.kallsyms.at(target)
    inside = symbol is not None and symbol.name == "ftrace_trampoline" and symbol.address == target
    return target if code[0] == 0xE8 and inside else None


def _is_enabled(subject: Subject) -> bool:
    """kernel.ftrace_enabled: without it the records count their ops, and no site calls anything."""
    return bool(read_u32(subject.memory, subject.symbols["ftrace_enabled"]))


def _flags(ops: list[Any], enabled: bool) -> int:
    """What the ops of a site make of its record's flags."""
    if not ops:
        return 0
    flags = len(ops) | FtraceFl.ENABLED
    if len(ops) == 1 and ops[0].trampoline:
        flags |= FtraceFl.TRAMP | FtraceFl.TRAMP_EN
    if any(each.flags & SAVE_REGS for each in ops):
        flags |= FtraceFl.REGS | FtraceFl.REGS_EN
    if any(each.flags & IPMODIFY for each in ops):
        flags |= FtraceFl.IPMODIFY
    if any(each.flags & DIRECT for each in ops):
        flags |= FtraceFl.DIRECT | (FtraceFl.DIRECT_EN if len(ops) == 1 else 0)
    if not enabled:
        flags &= ~(FtraceFl.ENABLED | FtraceFl.TRAMP_EN | FtraceFl.REGS_EN | FtraceFl.DIRECT_EN)
    return int(flags)


def _call(address: int, target: int) -> bytes:
    """`call rel32`: E8 and the distance from the next instruction (SDM Vol. 2A, CALL)."""
    return b"\xe8" + ((target - address - 5) & 0xFFFF_FFFF).to_bytes(4, "little")


def _compare(
    subject: Subject, invariant: str, what: str, address: int, expected: bytes
) -> Iterator[Finding | None]:
    """One finding for each run of instructions that differ."""
    try:
        found = subject.memory.read(address, len(expected))
    except MemoryFault:
        yield Finding(invariant, f"{what}: it is not mapped", address, subject.place(address), is_code=True)
        return
    yield None
    if found == expected:
        return
    at = 0
    while at < len(expected):
        if expected[at] == found[at]:
            same = expected[at : at + PAGE_SIZE] == found[at : at + PAGE_SIZE]
            at += PAGE_SIZE if same else 1
            continue
        start, end = _instruction(subject, address, expected, at)
        while end < len(expected) and expected[end] != found[end]:
            end = max(_instruction(subject, address, expected, end)[1], end + 1)
        yield Finding(
            invariant,
            what,
            address + start,
            subject.place(address + start),
            expected[start:end],
            found[start:end],
            is_code=True,
        )
        at = end


def _instruction(subject: Subject, address: int, expected: bytes, at: int) -> tuple[int, int]:
    """Start and end of the expected instruction that holds byte `at`, decoded from its symbol on."""
    symbol = subject.kallsyms.at(address + at)
    begin = max(symbol.address - address, 0) if symbol is not None else at
    for each in disassemble(expected[begin : at + 16], address + begin):
        start = each.address - address
        if start + len(each.code) > at:
            return start, start + len(each.code)
    return at, at + 1


def _end(text: Text) -> int:
    return text.address + len(text.contents)
