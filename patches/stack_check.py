"""May a task be switched where it sleeps?  klp_check_stack() of kernel/livepatch/transition.c.

A task may be switched if none of the functions that change is on its stack.  Which version must not be there
follows direction and stack position: when patching, the one that the patch takes over from (the original or
the func below it on the func_stack), when unpatching, the patch's own.
"""

import bisect
import errno
from dataclasses import dataclass
from typing import Any

from emu.errno import KernelErrno
from emu.list import list_is_singular
from emu.task import Task
from emu.unwind import StackTrace
from patches import patch
from patches.handler import KLP_UNPATCHED
from patches.klp import Klp, klp_for_each_func, klp_for_each_object

__all__ = ["CheckedFunction", "StackCheck", "checked_function", "stack_of"]


@dataclass(frozen=True, slots=True)
class CheckedFunction:
    """Guest virtual addresses [start, end) that must not be on a stack, and the func's old_name."""

    start: int
    end: int
    old_name: str


class StackCheck:
    """The functions that must not be on a stack in the present transition.

    The kernel works them out again for each task and each entry; klp_mutex keeps the func_stacks as they are
    for as long as an attempt lasts, so once is enough.
    """

    def __init__(self, klp: Klp) -> None:
        self.functions = [
            checked_function(klp, func)
            for obj in klp_for_each_object(klp.transition_patch)
            if obj.patched
            for func in klp_for_each_func(obj)
        ]
        self._order = sorted(range(len(self.functions)), key=lambda index: self.functions[index].start)
        self._starts = [self.functions[index].start for index in self._order]

    def first_on(self, entries: tuple[int, ...]) -> CheckedFunction | None:
        """The first function, in the patch's order, that one of the addresses lies in."""
        found: int | None = None
        for address in entries:
            at = bisect.bisect_right(self._starts, address) - 1
            # Two funcs can begin at one address (two names of a function); those further down cannot reach.
            while at >= 0 and address < self.functions[self._order[at]].end:
                found = self._order[at] if found is None else min(found, self._order[at])
                at -= 1
        return None if found is None else self.functions[found]


def stack_of(klp: Klp, task: Task) -> StackTrace:
    """The stack of a task that does not run, or of the current one (stack_trace_save_tsk_reliable())."""
    machine = klp.machine
    if task is machine.hub.current:
        machine.frames.sleep(task)  # a frame below all others, to begin the walk at
    return machine.unwinder.walk_task(task.struct)


def checked_function(klp: Klp, func: Any) -> CheckedFunction:
    """What must not be on a stack for one func of the patch in transition (klp_check_stack_func())."""
    name = klp.string(func.old_name)
    if klp.klp_target_state.get() == KLP_UNPATCHED:
        return CheckedFunction(func.new_func, func.new_func + func.new_size, name)
    ops = patch.klp_find_ops(klp, func.old_func)
    if ops is None:
        raise KernelErrno(errno.ENOENT, f"no klp_ops of '{name}' while its patch is in transition")
    if list_is_singular(ops.func_stack):
        return CheckedFunction(func.old_func, func.old_func + func.old_size, name)
    node = func.layouts_.offsetof("klp_func", "stack_node")
    prev = func.layouts_.view("klp_func", func.memory_, func.stack_node.next - node)
    return CheckedFunction(prev.new_func, prev.new_func + prev.new_size, name)
