"""The registered ftrace_ops: the list in guest memory, and which sites an ops wants (kernel/trace/ftrace.c).

An `ops` is a view of a `struct ftrace_ops`, a `hashes` one of a `struct ftrace_ops_hash`.
"""

import enum
import errno
from collections.abc import Iterator
from typing import Any

from emu.errno import KernelErrno
from emu.ftrace_hash import hash_is_empty, lookup_ip
from emu.memory import WritableMemory
from emu.view import GuestVariable, Layouts

__all__ = ["FtraceOpsFl", "FtraceOpsList"]


class FtraceOpsFl(enum.IntFlag):
    """FTRACE_OPS_FL_* (include/linux/ftrace.h)."""

    ENABLED = 1 << 0
    DYNAMIC = 1 << 1
    SAVE_REGS = 1 << 2
    SAVE_REGS_IF_SUPPORTED = 1 << 3
    RECURSION = 1 << 4
    STUB = 1 << 5
    INITIALIZED = 1 << 6
    DELETED = 1 << 7
    ADDING = 1 << 8
    REMOVING = 1 << 9
    MODIFYING = 1 << 10
    ALLOC_TRAMP = 1 << 11
    IPMODIFY = 1 << 12
    PID = 1 << 13
    RCU = 1 << 14
    TRACE_ARRAY = 1 << 15
    PERMANENT = 1 << 16
    DIRECT = 1 << 17


class FtraceOpsList:
    """`ftrace_ops_list`: newest first, ended by `ftrace_list_end`."""

    def __init__(self, layouts: Layouts, memory: WritableMemory, first: int, end: int) -> None:
        self._layouts = layouts
        self._memory = memory
        self.first = GuestVariable(memory, first)
        self.end = end
        # Who points to an ops: a guess that is checked in guest memory before it is used.
        self._before: dict[int, int] = {}

    def __iter__(self) -> Iterator[Any]:
        at = self.first.get()
        while at != self.end and at:
            ops = self.ops(at)
            yield ops
            at = ops.next

    def ops(self, address: int) -> Any:
        """The view of a `struct ftrace_ops`."""
        return self._layouts.view("ftrace_ops", self._memory, address)

    def add(self, ops: Any) -> None:
        """add_ftrace_ops(): a reader finds the list whole before and after."""
        first = self.first.get()
        ops.next = first
        self.first.set(ops)
        self._before[first] = ops.address_
        self._before[ops.address_] = 0

    def remove(self, ops: Any) -> None:
        """remove_ftrace_ops(); raises EINVAL for an ops that is not in the list."""
        before = self._find_before(ops)
        after = ops.next
        if before is None:
            self.first.set(after)
        else:
            before.next = after
        self._before.pop(ops.address_, None)
        self._before[after] = before.address_ if before is not None else 0

    def at(self, ip: int) -> Iterator[Any]:
        """The ops that want a site, newest first."""
        return (ops for ops in self if self.wants(ops, ip))

    def with_trampoline(self, ip: int) -> Iterator[Any]:
        """The ops with a trampoline that want a site (ftrace_find_tramp_ops_any() and _next())."""
        return (ops for ops in self.at(ip) if ops.trampoline)

    def wants(self, ops: Any, ip: int) -> bool:
        """The ops' own hashes select the site."""
        return self.hash_wants(self.hashes(ops), ip)

    def hash_wants(self, hashes: Any, ip: int) -> bool:
        """hash_contains_ip(): in the filter, or there is none; and not in notrace."""
        wanted = self.hash(hashes.filter_hash)
        if not hash_is_empty(wanted) and not lookup_ip(wanted, ip):
            return False
        return not lookup_ip(self.hash(hashes.notrace_hash), ip)

    def hashes(self, ops: Any) -> Any:
        """What `ops.func_hash` points to."""
        return self._layouts.view("ftrace_ops_hash", self._memory, ops.func_hash)

    def filter(self, ops: Any) -> Any:
        """The view of the ops' filter hash; None for NULL."""
        return self.hash(self.hashes(ops).filter_hash)

    def hash(self, address: int) -> Any:
        """The view of a `struct ftrace_hash`; None for NULL."""
        return self._layouts.view("ftrace_hash", self._memory, address) if address else None

    def _find_before(self, ops: Any) -> Any:
        """The ops whose `next` is `ops`; None if `ops` is the first of the list."""
        if self.first.get() == ops.address_:
            return None
        hint = self._before.get(ops.address_, 0)
        if hint and self.ops(hint).next == ops.address_:
            return self.ops(hint)
        for each in self:
            if each.next == ops.address_:
                return each
        raise KernelErrno(errno.EINVAL, "the ops are not in ftrace_ops_list", where=repr(ops))
