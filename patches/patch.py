"""Patching and unpatching functions: kernel/livepatch/patch.c.

One `klp_ops` with one `ftrace_ops` serves all patches of a function.  Its func_stack holds their funcs,
newest on top; going from one version to another is a list operation, and the bytes of the site change only
when the stack becomes non-empty or empty.
"""

import contextlib
import errno
from typing import Any

from emu.dyn_ftrace import FtraceFl
from emu.errno import KernelErrno
from emu.ftrace import FtraceOpsFl
from emu.list import init_list_head, list_add, list_add_rcu, list_del, list_del_rcu, list_is_singular
from patches.klp import Klp, klp_for_each_func, klp_for_each_object

__all__ = [
    "klp_find_ops",
    "klp_patch_object",
    "klp_unpatch_object",
    "klp_unpatch_objects",
    "klp_unpatch_objects_dynamic",
]


def klp_find_ops(klp: Klp, old_func: int) -> Any:
    """The klp_ops of the function at `old_func`; None if nothing patches it.

    The kernel walks all of klp_ops.  Here a remembered address is tried first, if guest memory says that it
    is what the walk would find; then the site's record (without FTRACE_FL_IPMODIFY nobody redirects it); and
    only then is the list walked.
    """
    machine = klp.machine
    hint = klp.ops_hints.get(old_func, 0)
    if hint in machine.slab.live:
        ops = machine.view("klp_ops", hint)
        linked = machine.view("list_head", ops.node.prev).next == ops.node.address_
        if linked and _top(ops).old_func == old_func:
            return ops
    location = machine.ftrace.ftrace_location(old_func)
    record = machine.ftrace.records.lookup_rec(location, location) if location else None
    if record is None or not record.flags & FtraceFl.IPMODIFY:
        return None
    return next((ops for ops in klp.ops() if _top(ops).old_func == old_func), None)


def klp_patch_object(klp: Klp, obj: Any) -> None:
    """Put every func of an object on its func_stack; on failure none of them stays there."""
    if obj.patched:
        klp.warn("klp_patch_object", "obj->patched")
        raise KernelErrno(errno.EINVAL, "the object is patched already")
    for func in klp_for_each_func(obj):
        try:
            _klp_patch_func(klp, func)
        except KernelErrno:
            klp_unpatch_object(klp, obj)
            raise
    obj.patched = True


def klp_unpatch_object(klp: Klp, obj: Any) -> None:
    """Take every func of an object off its func_stack."""
    _unpatch_object(klp, obj, nops_only=False)


def klp_unpatch_objects(klp: Klp, patch: Any) -> None:
    """Unpatch all patched objects of a patch."""
    for obj in klp_for_each_object(patch):
        if obj.patched:
            klp_unpatch_object(klp, obj)


def klp_unpatch_objects_dynamic(klp: Klp, patch: Any) -> None:
    """Take the nop funcs of a patch off their func_stacks."""
    for obj in klp_for_each_object(patch):
        if obj.patched:
            _unpatch_object(klp, obj, nops_only=True)


def _unpatch_object(klp: Klp, obj: Any, *, nops_only: bool) -> None:
    for func in klp_for_each_func(obj):
        if func.patched and (func.nop or not nops_only):
            _klp_unpatch_func(klp, func)
    if obj.dynamic or not nops_only:
        obj.patched = False


def _klp_patch_func(klp: Klp, func: Any) -> None:
    machine = klp.machine
    old_func = func.old_func
    for wrong, condition in ((not old_func, "!func->old_func"), (func.patched, "func->patched")):
        if wrong:
            klp.warn("klp_patch_func", condition)
            raise KernelErrno(errno.EINVAL, f"a func cannot be patched: {condition}")
    ops = klp_find_ops(klp, old_func)
    if ops is not None:
        list_add_rcu(func.stack_node, ops.func_stack)
        func.patched = True
        return
    name = klp.string(func.old_name)
    location = machine.ftrace.ftrace_location(old_func)
    if not location:
        raise _no_location(klp, old_func, name)
    ops = machine.view(
        "klp_ops", machine.slab.kzalloc(machine.layouts.sizeof("klp_ops"), f"klp_ops of {name}")
    )
    ops.fops.func = machine.symbol("klp_ftrace_handler")
    ops.fops.flags = FtraceOpsFl.DYNAMIC | FtraceOpsFl.IPMODIFY | FtraceOpsFl.PERMANENT
    list_add(ops.node, klp.klp_ops)
    init_list_head(ops.func_stack)
    list_add_rcu(func.stack_node, ops.func_stack)
    try:
        _register(klp, ops, location, name)
    except KernelErrno:
        list_del_rcu(func.stack_node)
        list_del(ops.node)
        machine.slab.kfree(ops.address_)
        raise
    klp.ops_hints[old_func] = ops.address_
    func.patched = True
    if old_func in machine.vmlinux.answered:
        # The site is the kernel's own; what is behind it leaves no frame for the stack check to find.
        klp.log.pr_warn(f"klpemu: '{name}' is answered in Python: who sleeps in it cannot be judged here")


def _no_location(klp: Klp, old_func: int, name: str) -> KernelErrno:
    """The error for a function without an fentry site.

    A kernel may well have one in a function that klpemu answers in Python.
    """
    where = klp.machine.kallsyms.describe(old_func)
    klp.log.pr_err(f"livepatch: failed to find location for function '{name}'")
    if old_func in klp.machine.vmlinux.answered:
        klp.log.pr_err(f"klpemu: '{name}' is answered in Python: a patch of it cannot be judged here")
        return KernelErrno(
            errno.EINVAL,
            f"klpemu answers '{name}' in Python, so it has neither code nor a fentry site to patch",
            where=where,
            advice="a kernel may accept this patch; check it with an image that has the function's code",
        )
    return KernelErrno(
        errno.EINVAL,
        f"failed to find location for function '{name}'",
        where=where,
        advice="it has no fentry site; patch its callers instead",
    )


def _register(klp: Klp, ops: Any, location: int, name: str) -> None:
    ftrace = klp.machine.ftrace
    try:
        ftrace.ftrace_set_filter_ip(ops.fops, location, remove=False)
    except KernelErrno as error:
        klp.log.pr_err(f"livepatch: failed to set ftrace filter for function '{name}' (-{error.number})")
        raise
    try:
        ftrace.register_ftrace_function(ops.fops)
    except KernelErrno as error:
        klp.log.pr_err(
            f"livepatch: failed to register ftrace handler for function '{name}' (-{error.number})"
        )
        with contextlib.suppress(KernelErrno):  # the kernel ignores what this returns
            ftrace.ftrace_set_filter_ip(ops.fops, location, remove=True)
        raise


def _klp_unpatch_func(klp: Klp, func: Any) -> None:
    """Take a func off its func_stack, and with the last one the klp_ops away.

    What fails is a WARN_ON, as in the kernel: with ftrace off for good the site keeps its call, and the
    klp_ops behind it is freed nevertheless.
    """
    machine = klp.machine
    old_func = func.old_func
    if not old_func:
        klp.warn("klp_unpatch_func", "!func->old_func")
        return
    ops = klp_find_ops(klp, old_func)
    if ops is None:
        klp.warn("klp_unpatch_func", "!ops")
        return
    if list_is_singular(ops.func_stack):
        location = machine.ftrace.ftrace_location(old_func)
        if not location:
            klp.warn("klp_unpatch_func", "!ftrace_loc")
            return
        try:
            machine.ftrace.unregister_ftrace_function(ops.fops)
        except KernelErrno:
            klp.warn("klp_unpatch_func", "unregister_ftrace_function(&ops->fops)")
        try:
            machine.ftrace.ftrace_set_filter_ip(ops.fops, location, remove=True)
        except KernelErrno:
            klp.warn("klp_unpatch_func", "ftrace_set_filter_ip(&ops->fops, ftrace_loc, 1, 0)")
        list_del_rcu(func.stack_node)
        list_del(ops.node)
        klp.ops_hints.pop(old_func, None)
        machine.slab.kfree(ops.address_)
    else:
        list_del_rcu(func.stack_node)
    func.patched = False


def _top(ops: Any) -> Any:
    """The func that wins (list_first_entry)."""
    layouts = ops.layouts_
    node = layouts.offsetof("klp_func", "stack_node")
    return layouts.view("klp_func", ops.memory_, ops.func_stack.next - node)
