"""What the records say: how many ops want a site, and what it shall call (kernel/trace/ftrace.c).

Where the kernel walks all records of all objects, the records of the ops' hash are looked up instead: the
result is the same, and enabling 10,000 functions stays linear.
"""

import enum
import errno
from collections.abc import Callable, Iterable
from typing import Any

from emu.dyn_ftrace import FTRACE_REF_MAX, DynFtrace, FtraceFl, ftrace_rec_count
from emu.errno import KernelErrno
from emu.ftrace_hash import entries, hash_is_empty, lookup_ip
from emu.ftrace_ops import FtraceOpsFl, FtraceOpsList
from emu.kallsyms import Kallsyms

__all__ = ["Accounting", "FtraceBug", "Update", "ftrace_check_record"]


_EN_FLAGS = FtraceFl.ENABLED | FtraceFl.REGS_EN | FtraceFl.TRAMP_EN | FtraceFl.DIRECT_EN


class Update(enum.Enum):
    """What a site needs (FTRACE_UPDATE_*), and what ftrace_bug() says it was doing then."""

    IGNORE = ""
    MAKE_CALL = "Setting ftrace call site to call ftrace function"
    MODIFY_CALL = "Updating ftrace call site to call a different ftrace function"
    MAKE_NOP = "Setting ftrace call site to NOP"


class FtraceBug(KernelErrno):
    """What ftrace keeps contradicts itself or the text; ftrace is off from here on, as in the kernel."""


class Accounting:
    """Keeps the records of all sites in step with the registered ops; `kill` turns ftrace off."""

    def __init__(
        self, records: DynFtrace, ops_list: FtraceOpsList, kallsyms: Kallsyms, kill: Callable[[], None]
    ) -> None:
        self._kill = kill
        self._records = records
        self._ops_list = ops_list
        self._kallsyms = kallsyms

    def wanted(self, ops: Any) -> list[Any]:
        """The records that the hashes of `ops` select, in address order; disabled ones are left out."""
        hashes = self._ops_list.hashes(ops)
        wanted = self._ops_list.hash(hashes.filter_hash)
        notrace = self._ops_list.hash(hashes.notrace_hash)
        if hash_is_empty(wanted):
            found = list(self._records)
        else:
            ips = sorted(entry.ip for entry in entries(wanted))
            found = [record for ip in ips if (record := self._records.lookup_rec(ip, ip)) is not None]
        return [
            record for record in found if not skip_record(record.flags) and not lookup_ip(notrace, record.ip)
        ]

    def hash_rec_update(self, ops: Any, *, increment: bool) -> bool:
        """__ftrace_hash_rec_update(): adjust the records of the ops' filter; True if text must change.

        Raises FtraceBug where a count would leave its range.
        """
        if not ops.flags & FtraceOpsFl.ENABLED:
            return False
        update = False
        for record in self.wanted(ops):
            flags = record.flags
            count = ftrace_rec_count(flags)
            if count == (FTRACE_REF_MAX - 1 if increment else 0):
                what = "counts more ops than fit" if increment else "counts no ops, and one more goes"
                self._kill()
                raise FtraceBug(errno.ENODEV, f"the record {what}", where=self.where(record))
            record.flags = self._with(ops, flags + 1) if increment else self._without(ops, record, flags - 1)
            update |= ftrace_check_record(record, update=False) is not Update.IGNORE
        return update

    def ipmodify_enable(self, ops: Any) -> None:
        """ftrace_hash_ipmodify_enable(): claim every record of the filter, or none of them (EBUSY)."""
        if ops.flags & FtraceOpsFl.IPMODIFY:
            if hash_is_empty(self._ops_list.filter(ops)):
                raise KernelErrno(errno.EINVAL, "an IPMODIFY ops needs a filter")
            self._claim(self.wanted(ops))

    def ipmodify_disable(self, ops: Any) -> None:
        """ftrace_hash_ipmodify_disable()."""
        if ops.flags & FtraceOpsFl.IPMODIFY:
            for record in self.wanted(ops):
                record.flags = record.flags & ~FtraceFl.IPMODIFY

    def ipmodify_update(self, ops: Any, before: set[int], wanted: set[int]) -> None:
        """ftrace_hash_ipmodify_update(): the filter of a registered ops is about to become `wanted`."""
        if not ops.flags & FtraceOpsFl.ENABLED or not ops.flags & FtraceOpsFl.IPMODIFY:
            return
        if not wanted:
            raise KernelErrno(errno.EINVAL, "an IPMODIFY ops needs a filter")
        self._claim(self._lookup(wanted - before))
        for record in self._lookup(before - wanted):
            record.flags = record.flags & ~FtraceFl.IPMODIFY

    def where(self, record: Any) -> str:
        """Symbol and offset of a record's site."""
        return self._kallsyms.describe(record.ip)

    def _lookup(self, ips: Iterable[int]) -> list[Any]:
        found = (self._records.lookup_rec(ip, ip) for ip in sorted(ips))
        return [record for record in found if record is not None and not skip_record(record.flags)]

    def _claim(self, records: list[Any]) -> None:
        claimed: list[Any] = []
        for record in records:
            if record.flags & FtraceFl.IPMODIFY:
                for each in claimed:
                    each.flags = each.flags & ~FtraceFl.IPMODIFY
                raise KernelErrno(
                    errno.EBUSY,
                    "another ops already changes where this function goes",
                    where=self.where(record),
                )
            record.flags = record.flags | FtraceFl.IPMODIFY
            claimed.append(record)

    def _with(self, ops: Any, flags: int) -> int:
        """A record's flags once `ops` is counted in `flags`."""
        if ops.flags & FtraceOpsFl.DIRECT:
            flags |= FtraceFl.DIRECT
        if ftrace_rec_count(flags) == 1 and ops.trampoline:
            flags |= FtraceFl.TRAMP
        else:
            flags &= ~FtraceFl.TRAMP
        if ops.flags & FtraceOpsFl.SAVE_REGS:
            flags |= FtraceFl.REGS
        return flags

    def _without(self, ops: Any, record: Any, flags: int) -> int:
        """A record's flags once `ops` is no more counted in `flags`."""
        count = ftrace_rec_count(flags)
        registered = list(self._ops_list.at(record.ip)) if count else []
        if ops.flags & FtraceOpsFl.DIRECT:
            flags &= ~FtraceFl.DIRECT
        # An ops whose filter changes is still registered and still wants the site: then REGS stays, as it
        # does in the kernel (test_rec_ops_needs_regs() leaves nobody out).
        needs_regs = any(each.flags & FtraceOpsFl.SAVE_REGS for each in registered)
        if count and ops.flags & FtraceOpsFl.SAVE_REGS and not needs_regs:
            flags &= ~FtraceFl.REGS
        if count == 1 and any(each.trampoline for each in registered if each != ops):
            flags |= FtraceFl.TRAMP
        else:
            flags &= ~FtraceFl.TRAMP
        return flags


def skip_record(flags: int) -> bool:
    """At least one ops has seen the site fail, and it calls nothing (skip_record())."""
    return bool(flags & FtraceFl.DISABLED) and not flags & FtraceFl.ENABLED


def ftrace_check_record(record: Any, *, update: bool, enable: bool = True) -> Update:
    """What the site needs; with `update` the record's _EN flags follow.

    Without `enable` all calls are being switched off (kernel.ftrace_enabled); who wants the site stays
    counted.
    """
    flags = record.flags
    if skip_record(flags):
        return Update.IGNORE
    count = ftrace_rec_count(flags)
    change = _changed(flags, count) if enable and count else 0
    if (flags & FtraceFl.ENABLED) == change:
        return Update.IGNORE
    if change:
        change ^= flags & FtraceFl.ENABLED
        if update:
            record.flags = _enabled_flags(flags, change, count)
        return Update.MAKE_CALL if change & FtraceFl.ENABLED else Update.MODIFY_CALL
    if update:
        record.flags = flags & ~_EN_FLAGS if count else flags & FtraceFl.DISABLED
    return Update.MAKE_NOP


def _changed(flags: int, count: int) -> int:
    """ENABLED, and each of REGS, TRAMP and DIRECT that is not as its _EN flag says."""
    change = int(FtraceFl.ENABLED)
    for wanted, actual in ((FtraceFl.REGS, FtraceFl.REGS_EN), (FtraceFl.TRAMP, FtraceFl.TRAMP_EN)):
        if bool(flags & wanted) != bool(flags & actual):
            change |= wanted
    # Only a site with a single user calls a direct trampoline itself.
    direct = bool(flags & FtraceFl.DIRECT) and count == 1
    if direct != bool(flags & FtraceFl.DIRECT_EN):
        change |= FtraceFl.DIRECT
    return change


def _enabled_flags(flags: int, change: int, count: int) -> int:
    """The flags of a record whose call is put in place or changed: each _EN flag takes its wanted value."""
    flags |= FtraceFl.ENABLED
    for wanted, actual in ((FtraceFl.REGS, FtraceFl.REGS_EN), (FtraceFl.TRAMP, FtraceFl.TRAMP_EN)):
        if change & wanted:
            flags = flags | actual if flags & wanted else flags & ~actual
    if change & FtraceFl.DIRECT:
        direct = count == 1 and flags & FtraceFl.DIRECT
        flags = flags | FtraceFl.DIRECT_EN if direct else flags & ~FtraceFl.DIRECT_EN
    return flags
