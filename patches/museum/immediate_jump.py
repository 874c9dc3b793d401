"""An immediate patch waits for nobody, so a task could sleep in a function that two newer patches had
replaced.

Let patches 1i, 2i and 3 change one function, the first two of them immediately.  When 3 comes, the stack
check looks for the function that it takes over from, which is that of 2i.  A task that still sleeps in that
of 1i passes, and jumps two versions at once, in the middle of something.  It could not be repaired without
keeping a history of all patches, and so the immediate flag went.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from patches.museum import Bug, Kind
from patches.variants.immediate import patches_immediate

__all__ = ["BUG", "immediate_jump"]


@contextmanager
def immediate_jump() -> Iterator[None]:
    """Have the first two patches of the scenario immediate."""
    with patches_immediate("nap_1", "nap_2"):
        yield


BUG = Bug(
    title="Behind an immediate patch a task jumps two versions",
    kind=Kind.SHIPPED,
    commit='d0807da78e11 ("livepatch: Remove immediate feature") (in v4.16)',
    invariant="switched_tasks_have_left_what_changes",
    breaks="klp_patch.immediate: no transition, no task is waited for (patches/variants/immediate.py)",
    bug=immediate_jump,
)
