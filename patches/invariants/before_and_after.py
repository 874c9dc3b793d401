"""Two states of one machine: what a failure must not change, and what must be again as it was."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields

from emu.memory import read_u32
from patches.invariants.finding import Finding
from patches.invariants.relocations import fields_for_modules
from patches.invariants.subject import Subject
from patches.invariants.walk import entries

__all__ = ["RESTORES", "RestoredText", "State", "failures_leave_the_state_before", "state_of"]

RESTORES = "removal_restores_the_text"
INSN_SIZE = 5  # of a call
PIECE = 1 << 20  # bytes of text


@dataclass(frozen=True, slots=True)
class State:
    """What livepatch and ftrace have changed in a kernel, each part in a form that can be compared."""

    text: tuple[tuple[int, str], ...]  # address and digest of every executable section
    patches: tuple[int, ...]
    func_stacks: tuple[tuple[int, ...], ...]
    ops: tuple[tuple[int, int], ...]  # address and flags
    sysfs: tuple[str, ...]
    allocations: tuple[int, ...]  # by livepatch, of what is allocated for no module
    transition: int


def state_of(subject: Subject) -> State:
    """The present state."""
    ops = entries(subject, subject.symbols["klp_ops"], "klp_ops", "node")
    stack_at = subject.layouts.offsetof("klp_ops", "func_stack")
    left = tuple(field for each in subject.livepatches for field in fields_for_modules(each).items())
    return State(
        text=subject.once(_patched, left),
        patches=tuple(entries(subject, subject.symbols["klp_patches"], "klp_patch", "list")),
        func_stacks=tuple(tuple(entries(subject, at + stack_at, "klp_func", "stack_node")) for at in ops),
        ops=tuple((each.ops.address_, each.ops.flags) for each in subject.ftrace.ops),
        sysfs=tuple(subject.directories or ()),
        allocations=tuple(sorted(at for at, _ in subject.remaining)),
        transition=subject.pointer("klp_transition_patch"),
    )


def failures_leave_the_state_before(before: State, after: State) -> Iterator[Finding | None]:
    """An operation that the kernel has refused has changed nothing: text, func_stacks, lists, sysfs, memory.

    Source: klp_enable_patch() and load_module(), whose error paths undo what was done.
    """
    for each in fields(State):
        if getattr(before, each.name) == getattr(after, each.name):
            yield None
        else:
            yield Finding("failures_leave_the_state_before", f"a failure has changed: {each.name}")


class RestoredText:
    """removal_restores_the_text: When nothing is registered with ftrace, every byte of text is as it was
    before anything was.

    Source: "Disabling" in Documentation/livepatch/livepatch.rst; ftrace_shutdown() of kernel/trace/ftrace.c.
    """

    # While kernel.ftrace_enabled is 0 ftrace_shutdown() changes no text: what ftrace_call calls stays, and no
    # site leads there, until the next ops comes.

    def __init__(self) -> None:
        self._original: dict[int, tuple[bytes, str, str]] = {}
        self._was_off = False

    def check(self, subject: Subject) -> Iterator[Finding | None]:
        """Compare, if nothing is registered; text that is seen for the first time is remembered."""
        self._was_off |= not read_u32(subject.memory, subject.symbols["ftrace_enabled"])
        if subject.ftrace.ops:
            return
        for text, (address, digest) in zip(subject.texts, subject.once(_patched, ()), strict=True):
            loaded, *original = self._original.get(address, (b"", "", ""))
            size = len(text.contents)
            if loaded != text.contents:
                without_calls = subject.once(_without_calls, address, size)
                self._original[address] = text.contents, digest, without_calls
            elif original[0] == digest or (
                self._was_off
                and original[1]
                and original[1] == subject.once(_without_calls, text.address, size)
            ):
                yield None
            else:
                what = "text is not as it was before anything was registered"
                yield Finding(RESTORES, what, text.address, subject.place(text.address))


def _without_calls(subject: Subject, address: int, size: int) -> str:
    """The digest of a text without where ftrace_call and ftrace_regs_call lead; "" if it has neither."""
    calls = [subject.symbols[name] - address for name in ("ftrace_call", "ftrace_regs_call")]
    calls = [at for at in calls if 0 <= at < size]
    if not calls:
        return ""
    data = bytearray(subject.memory.read(address, size))
    for at in calls:
        data[at : at + INSN_SIZE] = bytes(INSN_SIZE)
    return hashlib.sha256(data).hexdigest()


def _patched(subject: Subject, left: tuple[tuple[int, int], ...]) -> tuple[tuple[int, str], ...]:
    """Address and digest of every executable section, without the fields (address and size) that klp
    relocations have `left`, which no failure undoes.
    """
    found = []
    for text in subject.texts:
        address, end = text.address, text.address + len(text.contents)
        fields_ = [(at, length) for at, length in left if address <= at < end]
        if not fields_:
            found.append((address, subject.once(_digest, address, end - address)))
            continue
        data = bytearray(subject.memory.read(address, end - address))
        for at, length in fields_:
            data[at - address : at - address + length] = bytes(length)
        found.append((address, hashlib.sha256(data).hexdigest()))
    return tuple(found)


def _digest(subject: Subject, address: int, size: int) -> str:
    """Piece by piece, as most of a kernel's text is what it was a step ago."""
    starts = range(address, address + size, PIECE)
    pieces = [subject.once(_digest_of, at, min(PIECE, address + size - at)) for at in starts]
    return pieces[0] if len(pieces) == 1 else hashlib.sha256("".join(pieces).encode()).hexdigest()


def _digest_of(subject: Subject, address: int, size: int) -> str:
    return hashlib.sha256(subject.memory.read(address, size)).hexdigest()
