"""Two states of one machine: what a failure must not change, and what must be again as it was."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields

from patches.invariants.finding import Finding
from patches.invariants.subject import Subject
from patches.invariants.walk import entries

__all__ = ["RESTORES", "RestoredText", "State", "failures_leave_the_state_before", "state_of"]

RESTORES = "removal_restores_the_text"


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
    return State(
        text=tuple((at, _digest(subject, at, size)) for at, size in _texts(subject)),
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

    def __init__(self) -> None:
        self._original: dict[int, tuple[bytes, str]] = {}

    def check(self, subject: Subject) -> Iterator[Finding | None]:
        """Compare, if nothing is registered; text that is seen for the first time is remembered."""
        if subject.ftrace.ops:
            return
        for text in subject.texts:
            digest = _digest(subject, text.address, len(text.contents))
            loaded, original = self._original.get(text.address, (b"", ""))
            if loaded != text.contents:
                self._original[text.address] = text.contents, digest
            elif original == digest:
                yield None
            else:
                what = "text is not as it was before anything was registered"
                yield Finding(RESTORES, what, text.address, subject.place(text.address))


def _texts(subject: Subject) -> list[tuple[int, int]]:
    """Address and size in bytes of every executable section."""
    return [(text.address, len(text.contents)) for text in subject.texts]


def _digest(subject: Subject, address: int, size: int) -> str:
    return hashlib.sha256(subject.memory.read(address, size)).hexdigest()
