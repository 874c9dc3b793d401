"""Memory: nothing is left behind, and nobody wrote where he must not."""

from collections.abc import Iterator

from emu.memory import MemoryFault
from emu.slab import Corruption
from patches.invariants.finding import Finding, value_finding
from patches.invariants.subject import Subject
from patches.invariants.walk import entries

__all__ = ["heap_is_intact", "nothing_remains", "tasks_are_settled"]

KLP_UNDEFINED = -1


def nothing_remains(subject: Subject) -> Iterator[Finding | None]:
    """Once all patches are gone there is no trampoline, no ops and no allocation beyond what was there
    before.
    """
    if subject.patches:
        return
    for address, tag in subject.remaining:
        yield Finding("nothing_remains", f"still allocated: {tag}", address, subject.place(address))
    yield None


def heap_is_intact(subject: Subject) -> Iterator[Finding | None]:
    """The red zones around every object hold, and no freed object was written to."""
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
    """Without a transition every task's patch_state is KLP_UNDEFINED, and so is the target state."""
    if subject.pointer("klp_transition_patch"):
        return
    invariant = "tasks_are_settled"
    at = subject.symbols["klp_target_state"]
    target = int.from_bytes(subject.memory.read(at, 4), "little", signed=True)
    if target != KLP_UNDEFINED:
        what = f"klp_target_state is {target}, no transition is on"
        yield value_finding(invariant, what, at, subject.place(at), KLP_UNDEFINED, target, 4)
    else:
        yield None
    init_task = subject.symbols["init_task"]
    head = init_task + subject.layouts.offsetof("task_struct", "tasks")
    for address in (init_task, *entries(subject, head, "task_struct", "tasks")):
        task = subject.view("task_struct", address)
        try:
            state, comm, pid = task.patch_state, task.comm, task.pid
        except MemoryFault:
            yield Finding(invariant, "the task list leads to no task", address, subject.place(address))
            continue
        if state == KLP_UNDEFINED:
            yield None
            continue
        name = comm.split(b"\0")[0].decode("ascii", "backslashreplace")
        what = f"patch_state of {name}:{pid} is {state}, no transition is on"
        at = task.member_("patch_state")
        yield value_finding(invariant, what, at, subject.place(at), KLP_UNDEFINED, state, 4)
