"""A child could have the flag of one moment and the state of another.

fork() copies the parent's thread flags first, with TIF_PATCH_PENDING among them, and much later its
patch_state. When a transition begins or ends for the parent in between, the two do not belong together: the
child is to switch and is not asked to, or is asked to when there is nothing to switch to, which the end of
a transition warned of now and then. Since then both are copied from the parent at once, under
tasklist_lock.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from patches import transition
from patches.klp import Klp
from patches.museum import Bug, Kind
from patches.variants import replaced

__all__ = ["BUG", "fork_between"]


@contextmanager
def fork_between() -> Iterator[None]:
    """Leave the child the flag that dup_task_struct() has copied."""

    def klp_copy_process(klp: Klp, child: int, parent: int) -> None:
        view = klp.machine.view
        view("task_struct", child).patch_state = view("task_struct", parent).patch_state

    with replaced(transition, "klp_copy_process", klp_copy_process):
        yield


BUG = Bug(
    title="A fork between TIF_PATCH_PENDING and patch_state",
    kind=Kind.SHIPPED,
    commit='747f7a290117 ("livepatch: fix race between fork and KLP transition") (in v6.1)',
    invariant="tasks_are_settled",
    breaks="klp_copy_process() copies patch_state only",
    bug=fork_between,
)
