"""Memory: nothing is left behind, and nobody wrote where he must not."""

from collections.abc import Iterator

from patches.invariants.finding import Finding
from patches.invariants.subject import Subject

__all__ = ["heap_is_intact", "nothing_remains", "tasks_are_settled"]


def nothing_remains(subject: Subject) -> Iterator[Finding | None]:
    """Once all patches are gone there is no trampoline, no ops and no allocation beyond what was there before."""
    if subject.patches:
        return
    for address, tag in subject.remaining:
        yield Finding("nothing_remains", f"still allocated: {tag}", address)
    yield None


def heap_is_intact(subject: Subject) -> Iterator[Finding | None]:
    """The red zones around every object hold, and no freed object was written to."""
    if subject.slab is None:
        return
    for damage in subject.slab.corruptions(subject.memory):
        what = f"{damage.what}: {damage.tag}, {damage.size} bytes at {damage.object:#x}"
        yield Finding("heap_is_intact", what, damage.address)
    yield None


def tasks_are_settled(subject: Subject) -> Iterator[Finding | None]:
    """Between two transitions every task's patch_state is KLP_UNDEFINED and no func is in transition."""
    if subject.pointer("klp_transition_patch"):
        return
    head = subject.symbols["init_task"]
    first = subject.view("task_struct", head)
    task, offset = first, subject.layouts.offsetof("task_struct", "tasks")
    for _ in range(1 << 16):
        if task.patch_state != -1:
            name = task.comm.rstrip(b"\0").decode("ascii", "replace")
            what = f"patch_state of {name}:{task.pid} is {task.patch_state}, no transition is on"
            yield Finding("tasks_are_settled", what, task.address_)
        else:
            yield None
        task = subject.view("task_struct", task.tasks.next - offset)
        if task.address_ == head:
            break
