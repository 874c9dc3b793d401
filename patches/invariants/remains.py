"""Memory: nothing is left behind, and nobody wrote where he must not."""

from collections.abc import Iterator

from emu.memory import MemoryFault
from emu.slab import Corruption
from patches.invariants.finding import Finding, value_finding
from patches.invariants.subject import Subject
from patches.invariants.walk import entries

__all__ = ["heap_is_intact", "nothing_remains", "tasks_are_settled"]

KLP_UNDEFINED, KLP_UNPATCHED, KLP_PATCHED = -1, 0, 1
TIF_PATCH_PENDING = 1 << 13


def nothing_remains(subject: Subject) -> Iterator[Finding | None]:
    """Once all patches are gone there is no trampoline, no ops and no allocation beyond what was there
    before.

    Source: klp_free_patch_finish() and klp_unpatch_func(); the selftests of livepatch, which load and unload
    without end.
    """
    if subject.patches:
        return
    for address, tag in subject.remaining:
        yield Finding("nothing_remains", f"still allocated: {tag}", address, subject.place(address))
    yield None


def heap_is_intact(subject: Subject) -> Iterator[Finding | None]:
    """The red zones around every object hold, and no freed object was written to.

    Source: Documentation/mm/slub.rst: what slub_debug=FZP checks.
    """
    if subject.slab is None:
        return
    for damage in subject.slab.corruptions(subject.memory):
        name = f"{damage.tag}{damage.address - damage.object:+#x}/{damage.size:#x}"
        what = f"{damage.what}: {damage.tag}, {damage.size} bytes at {damage.object:#x}"
        found = subject.memory.read(damage.address, 1)[0]
        expected = _filler(damage)
        yield value_finding("heap_is_intact", what, damage.address, name, expected, found, 1)
    yield None


def _filler(damage: Corruption) -> int:
    """The byte that must be there: SLUB_RED_ACTIVE, POISON_FREE, or POISON_END (include/linux/poison.h)."""
    if not damage.object <= damage.address < damage.object + damage.size:
        return 0xCC
    return 0xA5 if damage.address == damage.object + damage.size - 1 else 0x6B


def tasks_are_settled(subject: Subject) -> Iterator[Finding | None]:
    """Without a transition every patch_state and the target state are KLP_UNDEFINED; in one every task has a
    state, and TIF_PATCH_PENDING if that is not the target.

    Source: klp_init_transition() and klp_complete_transition() of kernel/livepatch/transition.c, and their
    WARN_ON_ONCE()s.
    """
    transition_patch = subject.pointer("klp_transition_patch")
    listed = entries(subject, subject.symbols["klp_patches"], "klp_patch", "list")
    if transition_patch and transition_patch not in listed:
        return  # patches_are_listed says so
    moving = bool(transition_patch)
    at = subject.symbols["klp_target_state"]
    target = int.from_bytes(subject.memory.read(at, 4), "little", signed=True)
    if moving == (target == KLP_UNDEFINED):
        what = f"klp_target_state is {target}, {'a' if moving else 'no'} transition is on"
        expected = KLP_PATCHED if moving else KLP_UNDEFINED
        yield value_finding("tasks_are_settled", what, at, subject.place(at), expected, target, 4)
    else:
        yield None
    init_task = subject.symbols["init_task"]
    head = init_task + subject.layouts.offsetof("task_struct", "tasks")
    for address in (init_task, *entries(subject, head, "task_struct", "tasks")):
        yield _task(subject, address, target if moving else None)


def _task(subject: Subject, address: int, target: int | None) -> Finding | None:
    """Judge one task; `target` is the target state of the transition, None without one."""
    task = subject.view("task_struct", address)
    try:
        state, comm, pid, flags = task.patch_state, task.comm, task.pid, task.thread_info.flags
    except MemoryFault:
        return Finding("tasks_are_settled", "the task list leads to no task", address, subject.place(address))
    name = comm.split(b"\0")[0].decode("ascii", "backslashreplace")
    at = task.member_("patch_state")
    if target is None and state != KLP_UNDEFINED:
        what = f"patch_state of {name}:{pid} is {state}, no transition is on"
        return value_finding("tasks_are_settled", what, at, subject.place(at), KLP_UNDEFINED, state, 4)
    if target is not None and state not in (KLP_UNPATCHED, KLP_PATCHED):
        what = f"patch_state of {name}:{pid} is {state} while a transition is on"
        return value_finding("tasks_are_settled", what, at, subject.place(at), target, state, 4)
    pending, wanted = bool(flags & TIF_PATCH_PENDING), target is not None and state != target
    if pending != wanted:
        at = task.member_("thread_info")
        what = f"TIF_PATCH_PENDING of {name}:{pid} is {int(pending)}, its patch_state is {state}"
        expected = flags ^ TIF_PATCH_PENDING
        return value_finding("tasks_are_settled", what, at, subject.place(at), expected, flags)
    return None
