"""A dynamic ftrace_ops was freed while a CPU was still walking the list that it had been on.

unregister_ftrace_function() waits for a grace period before it returns, so that the caller may free the
ops; but it returned early, without that, when no text had to change. Text stays as it is if two others
remain on the site: then ftrace_caller and the list function are used before and after, and the list
function may stand on the ops. It was seen with two events of perf that had the same filter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from emu.ftrace_code import FtraceCode
from emu.machine import Machine
from patches.museum import Bug, Kind
from patches.variants import replaced

__all__ = ["BUG", "ops_freed_early"]


@contextmanager
def ops_freed_early() -> Iterator[None]:
    """Do not wait if the unregistration has changed nothing (ftrace_shutdown(): `if (!command)`)."""
    disable, synchronize, unchanged = FtraceCode.shutdown_disable, Machine.synchronize, False

    def shutdown_disable(code: FtraceCode, ops: Any, records: Any) -> None:
        nonlocal unchanged
        before = code._poker._events.total
        disable(code, ops, records)
        unchanged = code._poker._events.total == before

    def synchronize_unless_unchanged(machine: Machine, what: str) -> None:
        if not (unchanged and what.startswith("synchronize_rcu_tasks")):
            synchronize(machine, what)

    with (
        replaced(FtraceCode, "shutdown_disable", shutdown_disable),
        replaced(Machine, "synchronize", synchronize_unless_unchanged),
    ):
        yield


BUG = Bug(
    title="Dynamic ops are freed without a grace period",
    kind=Kind.SHIPPED,
    commit='0e792b89e680 ("ftrace: Fix use-after-free for dynamic ftrace_ops") (in v6.1)',
    invariant="nothing_freed_is_in_use",
    breaks="ftrace_shutdown() returns without synchronize_rcu_tasks_rude() and synchronize_rcu_tasks()",
    bug=ops_freed_early,
)
