"""Users of ftrace beside livepatch: tracers, each with an ftrace_ops of its own."""

import errno
from collections.abc import Sequence
from typing import Any

from emu.errno import KernelErrno
from emu.ftrace_64 import TRACE_COUNT
from emu.ftrace_hash import free_ftrace_hash
from emu.ftrace_rec import FtraceBug
from klpemu.kernel import Kernel

__all__ = ["FtraceUsers"]

# Guest code that adds one to what ops->private points to.  A linked image's `trace_count` is something else.
CALLBACKS = (TRACE_COUNT, "trace_count")


class FtraceUsers:
    """The tracers of one kernel by name.  Each has a dynamic ftrace_ops in guest memory and a counter."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._ops: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        """The tracers that are registered."""
        return list(self._ops)

    def register(self, name: str, functions: Sequence[str]) -> None:
        """Have a tracer of that name called for every call of the functions; EEXIST if there is one."""
        if name in self._ops:
            raise KernelErrno(errno.EEXIST, f"there is a tracer '{name}' already")
        sites = [self._kernel.address_of(each) for each in functions]
        machine, patches = self._kernel.machine, self._kernel.patches
        symbols = machine.vmlinux.symbols

        def register() -> None:
            before = patches.live()
            size = machine.layouts.sizeof("ftrace_ops")
            ops = machine.view("ftrace_ops", machine.slab.kzalloc(size, f"ftrace_ops of {name}"))
            try:
                ops.func = next(symbols[each] for each in CALLBACKS if each in symbols)
                ops.private = machine.slab.kzalloc(8, f"counter of {name}")
                for site in sites:
                    machine.ftrace.ftrace_set_filter_ip(ops, site, remove=False)
                machine.ftrace.register_ftrace_function(ops)
            except KernelErrno as error:
                if not isinstance(error, FtraceBug):  # after one the ops may still be called
                    self._free(ops)
                raise
            self._ops[name] = ops
            # They are no patch's, and no leak.
            patches.baseline |= patches.live() - before

        self._kernel.system_call(f"ftrace {name}", register)

    def unregister(self, name: str) -> None:
        """Unregister a tracer and free its ops at once; ENOENT if there is none of that name."""
        ops = self._ops.pop(name, None)
        if ops is None:
            raise KernelErrno(errno.ENOENT, f"there is no tracer '{name}'", advice="register it first")
        machine = self._kernel.machine

        def unregister() -> None:
            machine.ftrace.unregister_ftrace_function(ops)
            self._free(ops)

        self._kernel.system_call(f"unftrace {name}", unregister)

    def _free(self, ops: Any) -> None:
        """Free an ops that is not registered, and what belongs to it."""
        machine = self._kernel.machine
        filter_hash, counter = machine.ftrace.ops_list.filter(ops), ops.private
        machine.slab.kfree(ops.address_)
        if filter_hash is not None:
            free_ftrace_hash(machine.slab, filter_hash)
        machine.slab.kfree(counter)
