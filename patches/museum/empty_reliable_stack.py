"""The stack of every task was reliable, and had no entries.

25e39e32b0a3 had klp_check_stack() use the new stack_trace_save_tsk_reliable(), whose value is the number of
entries or an errno.  On architectures of the older kind it gave back the 0 for success instead: nothing to
look at, so every sleeping task could be switched. livepatch's own selftest of a busy module found it before
the release.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from emu.task import Task
from emu.unwind import StackTrace
from patches import transition
from patches.klp import Klp
from patches.museum import Bug, Kind
from patches.stack_check import stack_of
from patches.variants import replaced

__all__ = ["BUG", "empty_reliable_stack"]


@contextmanager
def empty_reliable_stack() -> Iterator[None]:
    """Give back a reliable stack without its entries."""

    def without_entries(klp: Klp, task: Task) -> StackTrace:
        stack = stack_of(klp, task)
        return stack if stack.unreliable else replace(stack, entries=())

    with replaced(transition, "stack_of", without_entries):
        yield


BUG = Bug(
    title="A reliable stack trace of zero entries",
    kind=Kind.SHIPPED,
    commit='25e39e32b0a3 ("livepatch: Simplify stack trace retrieval"), '
    'fixed by 7eaf51a2e094 ("stacktrace: Unbreak stack_trace_save_tsk_reliable()") (both in v5.2)',
    invariant="switched_tasks_have_left_what_changes",
    breaks="stack_trace_save_tsk_reliable() gives 0 for success",
    bug=empty_reliable_stack,
)
