"""ftrace's bookkeeping and its changes of text: kernel/trace/ftrace.c and arch/x86/kernel/ftrace.c of 6.1.

The functions have the kernel's names and do the kernel's stores in the kernel's order.  Where the kernel walks all
records of all objects, the records of the ops' hash are looked up instead: the result is the same, and enabling
10,000 functions stays linear.  Errors are raised, not returned (`KernelErrno`).
"""

import enum
import errno
from collections.abc import Iterable
from typing import Any, NoReturn

from emu.dyn_ftrace import FTRACE_REF_MAX, DynFtrace, FtraceFl, ftrace_rec_count
from emu.errno import KernelErrno
from emu.ftrace_hash import alloc_ftrace_hash, entries, free_ftrace_hash, hash_is_empty, lookup_ip
from emu.kallsyms import Kallsyms
from emu.list import list_add_rcu, list_del_rcu
from emu.printk import Printk
from emu.slab import Slab
from emu.text_poke import CALL_OPCODE, NOP5, TextPoker, text_gen_insn
from emu.trampoline import Trampolines
from emu.view import GuestVariable, Layouts

__all__ = ["Ftrace", "FtraceOpsFl"]

INSN_SIZE = 5


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


class Update(enum.Enum):
    """What a site needs (FTRACE_UPDATE_*), and what ftrace_bug() says it was doing then."""

    IGNORE = ""
    MAKE_CALL = "Setting ftrace call site to call ftrace function"
    MODIFY_CALL = "Updating ftrace call site to call a different ftrace function"
    MAKE_NOP = "Setting ftrace call site to NOP"


class FtraceBug(KernelErrno):
    """A site did not hold what its record says; ftrace is off from here on, as in the kernel."""


class Ftrace:
    """The ftrace of one machine.  An `ops` is a view of a `struct ftrace_ops` in guest memory."""

    def __init__(
        self,
        layouts: Layouts,
        memory: Any,
        slab: Slab,
        kallsyms: Kallsyms,
        poker: TextPoker,
        trampolines: Trampolines,
        log: Printk,
        synchronize: Any,
    ) -> None:
        self._layouts = layouts
        self._memory = memory
        self._slab = slab
        self._kallsyms = kallsyms
        self._poker = poker
        self._trampolines = trampolines
        self._log = log
        self._synchronize = synchronize
        self.ops_list = self._pointer("ftrace_ops_list")
        self.trace_function = self._pointer("ftrace_trace_function")
        self.function_trace_op = self._pointer("function_trace_op")
        self.enabled = self._int("ftrace_enabled")
        self.disabled = self._int("ftrace_disabled")
        self.start_up = self._int("ftrace_start_up")
        self.list_end = self._symbol("ftrace_list_end")
        self.stub = self._symbol("ftrace_stub")
        self.list_func = self._symbol("arch_ftrace_ops_list_func")
        self.records = DynFtrace(
            layouts, memory, slab, self._pointer("ftrace_pages_start"), self._pointer("ftrace_pages")
        )
        self._set_function_trace_op = self.list_end
        self._saved_func = self.stub
        self._removed: Any = None
        # Who points to an ops: a guess that is checked in guest memory before it is used.
        self._before: dict[int, int] = {}

    # Registration.

    def register_ftrace_function(self, ops: Any) -> None:
        """Enable `ops` on the sites of its filter; EBUSY if one of them has an IPMODIFY ops already."""
        if self.disabled.get():
            raise KernelErrno(errno.ENODEV, "ftrace is off after an ftrace bug")
        self._ops_init(ops)
        self._ftrace_startup(ops)

    def unregister_ftrace_function(self, ops: Any) -> None:
        """Disable `ops`; on return nobody executes its trampoline or its function any more."""
        if self.disabled.get():
            raise KernelErrno(errno.ENODEV, "ftrace is off after an ftrace bug")
        self._ftrace_shutdown(ops)

    def ftrace_set_filter_ip(self, ops: Any, ip: int, *, remove: bool) -> None:
        """Add an address to the filter of `ops`, or take it out; ip is a site or the start of a function."""
        self._ops_init(ops)
        location = self.ftrace_location(ip)
        if not location:
            raise KernelErrno(errno.EINVAL, "no fentry site here", where=self._kallsyms.describe(ip))
        old = self._filter(ops)
        wanted = {entry.ip for entry in entries(old)} if not hash_is_empty(old) else set()
        if remove:
            if location not in wanted:
                raise KernelErrno(errno.ENOENT, "not in the filter", where=self._kallsyms.describe(ip))
            wanted.discard(location)
        else:
            wanted.add(location)
        self._move_hash(ops, old, wanted)

    def ftrace_location(self, ip: int) -> int:
        """The site that `ip` lies in, or that belongs to the function starting at `ip`; 0 if there is none."""
        record = self.records.lookup_rec(ip, ip)
        if record is None:
            found = self._kallsyms.lookup_size_offset(ip)
            if found is not None and found[1] == 0:
                record = self.records.lookup_rec(ip, ip + found[0] - 1)
        return record.ip if record is not None else 0

    # Loading and unloading text.

    def ftrace_module_init(self, addresses: Iterable[int]) -> None:
        """Records for the sites of an object whose calls are NOPs already."""
        self.records.process_locs(list(addresses))

    def ftrace_release_mod(self, addresses: Iterable[int]) -> None:
        """Forget the sites of an object that goes."""
        self.records.release(list(addresses))

    # enabled_functions.

    def enabled_functions(self) -> list[str]:
        """The lines of tracefs' enabled_functions, in record order (t_show())."""
        lines = []
        for record in self.records:
            flags = record.flags
            if flags & FtraceFl.ENABLED:
                lines.append(self._show(record, flags))
        return lines

    def _show(self, record: Any, flags: int) -> str:
        symbol = self._kallsyms.at(record.ip)
        name = f"{record.ip:#x}" if symbol is None else symbol.name
        if symbol is not None and symbol.module:
            name += f" [{symbol.module}]"
        letters = ((FtraceFl.REGS, "R"), (FtraceFl.IPMODIFY, "I"), (FtraceFl.DIRECT, "D"))
        line = f"{name} ({ftrace_rec_count(flags)})"
        line += "".join(f" {letter}" if flags & flag else "  " for flag, letter in letters)
        describe = self._kallsyms.describe
        if flags & FtraceFl.TRAMP_EN:
            owners = [ops for ops in self.each_ops() if ops.trampoline and self._ops_wants(ops, record.ip)]
            for ops in owners:
                line += f"\ttramp: {ops.trampoline:#018x} ({describe(ops.func)}) ->{describe(ops.func)}"
            return line if owners else line + "\ttramp: ERROR!"
        caller = "ftrace_regs_caller" if flags & FtraceFl.REGS_EN else "ftrace_caller"
        call = self._symbol(caller) + self._trampolines.call_offset(bool(flags & FtraceFl.REGS_EN))
        code = self._memory.read(call, INSN_SIZE)
        return line + f" ->{describe(call + INSN_SIZE + int.from_bytes(code[1:], 'little', signed=True))}"

    def each_ops(self) -> Iterable[Any]:
        """Views of the registered ops, newest first."""
        at = self.ops_list.get()
        while at != self.list_end and at:
            ops = self._ops(at)
            yield ops
            at = ops.next

    # Startup and shutdown.

    def _ftrace_startup(self, ops: Any) -> None:
        self._register(ops)
        self.start_up.set(self.start_up.get() + 1)
        ops.flags = ops.flags | FtraceOpsFl.ENABLED | FtraceOpsFl.ADDING
        try:
            self._hash_ipmodify_enable(ops)
        except KernelErrno:
            self._unregister(ops)
            self.start_up.set(self.start_up.get() - 1)
            ops.flags = ops.flags & ~FtraceOpsFl.ENABLED
            if ops.flags & FtraceOpsFl.DYNAMIC:
                self._trampoline_free(ops)
            raise
        update = self._hash_rec_update(ops, increment=True)
        try:
            self._run_update_code(ops, calls=update)
        except FtraceBug:
            # What is half done stays: undoing it could do more harm.
            self._unregister(ops)
            raise
        ops.flags = ops.flags & ~FtraceOpsFl.ADDING

    def _ftrace_shutdown(self, ops: Any) -> None:
        self._unregister(ops)
        self.start_up.set(self.start_up.get() - 1)
        self._hash_ipmodify_disable(ops)
        update = self._hash_rec_update(ops, increment=False)
        ops.flags = ops.flags & ~FtraceOpsFl.ENABLED
        ops.flags = ops.flags | FtraceOpsFl.REMOVING
        self._removed = ops
        ops.old_hash.filter_hash = self._hash_of(ops).filter_hash
        ops.old_hash.notrace_hash = self._hash_of(ops).notrace_hash
        try:
            self._run_update_code(ops, calls=update)
        finally:
            ops.old_hash.filter_hash = 0
            ops.old_hash.notrace_hash = 0
            self._removed = None
        ops.flags = ops.flags & ~FtraceOpsFl.REMOVING
        if ops.flags & FtraceOpsFl.DYNAMIC:
            self._synchronize("synchronize_rcu_tasks_rude")
            self._synchronize("synchronize_rcu_tasks")
            self._trampoline_free(ops)

    def _register(self, ops: Any) -> None:
        """__register_ftrace_function()."""
        flags = ops.flags
        if flags & FtraceOpsFl.DELETED:
            raise KernelErrno(errno.EINVAL, "the ops are being deleted")
        if flags & FtraceOpsFl.ENABLED:
            raise KernelErrno(errno.EBUSY, "the ops are registered already")
        if not self.enabled.get() and flags & FtraceOpsFl.PERMANENT:
            raise KernelErrno(errno.EBUSY, "ftrace_enabled is 0")
        first = self.ops_list.get()
        ops.next = first
        self.ops_list.set(ops)
        self._before[first] = ops.address_
        self._before[ops.address_] = 0
        ops.saved_func = ops.func
        self._update_trampoline(ops)
        self._update_ftrace_function()

    def _unregister(self, ops: Any) -> None:
        """__unregister_ftrace_function()."""
        if not ops.flags & FtraceOpsFl.ENABLED:
            raise KernelErrno(errno.EBUSY, "the ops are not registered")
        before = self._find_before(ops)
        after = ops.next
        if before is None:
            self.ops_list.set(after)
        else:
            before.next = after
        self._before.pop(ops.address_, None)
        self._before[after] = before.address_ if before is not None else 0
        self._update_ftrace_function()
        ops.func = ops.saved_func

    def _find_before(self, ops: Any) -> Any:
        """The ops whose `next` is `ops`; None if `ops` is the first of the list."""
        if self.ops_list.get() == ops.address_:
            return None
        hint = self._before.get(ops.address_, 0)
        if hint and self._ops(hint).next == ops.address_:
            return self._ops(hint)
        for each in self.each_ops():
            if each.next == ops.address_:
                return each
        raise KernelErrno(errno.EINVAL, "the ops are not in ftrace_ops_list", where=repr(ops))

    def _update_ftrace_function(self) -> None:
        """update_ftrace_function(): what the common trampolines shall call."""
        first = self.ops_list.get()
        self._set_function_trace_op = first
        if first == self.list_end:
            func = self.stub
        elif self._ops(first).next == self.list_end:
            dynamic = self._ops(first).flags & (FtraceOpsFl.DYNAMIC | FtraceOpsFl.RCU)
            func = self.list_func if dynamic else self._ops(first).func
        else:
            self._set_function_trace_op = self.list_end
            func = self.list_func
        if self.trace_function.get() != func:
            self.trace_function.set(func)

    # Trampolines.

    def _update_trampoline(self, ops: Any) -> None:
        """ftrace_update_trampoline() and arch_ftrace_update_trampoline()."""
        if ops.trampoline:
            if ops.flags & FtraceOpsFl.ALLOC_TRAMP:
                ip = ops.trampoline + self._trampolines.call_offset(bool(ops.flags & FtraceOpsFl.SAVE_REGS))
                self._poker.text_poke_bp(ip, text_gen_insn(CALL_OPCODE, ip, ops.func))
            return
        address, size = self._trampolines.create(ops, ops.func)
        ops.flags = ops.flags | FtraceOpsFl.ALLOC_TRAMP
        ops.trampoline = address
        ops.trampoline_size = size
        list_add_rcu(ops.list, self._layouts.view("list_head", self._memory, self._symbol("ftrace_ops_trampoline_list")))

    def _trampoline_free(self, ops: Any) -> None:
        if not ops.flags & FtraceOpsFl.ALLOC_TRAMP or not ops.trampoline:
            return
        list_del_rcu(ops.list)
        self._trampolines.free(ops.trampoline)
        ops.trampoline = 0
        ops.flags = ops.flags & ~FtraceOpsFl.ALLOC_TRAMP

    # Records.

    def _hash_rec_update(self, ops: Any, *, increment: bool) -> bool:
        """__ftrace_hash_rec_update(): adjust the records of the ops' filter; True if text must change."""
        if not ops.flags & FtraceOpsFl.ENABLED:
            return False
        update = False
        for record in self._records_wanted(ops):
            if increment:
                self._add_to_record(ops, record)
            else:
                self._remove_from_record(ops, record)
            update |= self._check_record(record, update=False) is not Update.IGNORE
        return update

    def _add_to_record(self, ops: Any, record: Any) -> None:
        flags = record.flags + 1
        if ftrace_rec_count(flags) == FTRACE_REF_MAX:
            raise KernelErrno(errno.EINVAL, "a record counts more ops than fit", where=self._where(record))
        if ops.flags & FtraceOpsFl.DIRECT:
            flags |= FtraceFl.DIRECT
        if ftrace_rec_count(flags) == 1 and ops.trampoline:
            flags |= FtraceFl.TRAMP
        else:
            flags &= ~FtraceFl.TRAMP
        if ops.flags & FtraceOpsFl.SAVE_REGS:
            flags |= FtraceFl.REGS
        record.flags = flags

    def _remove_from_record(self, ops: Any, record: Any) -> None:
        flags = record.flags
        if ftrace_rec_count(flags) == 0:
            raise KernelErrno(errno.EINVAL, "a record counts no ops", where=self._where(record))
        flags -= 1
        if ops.flags & FtraceOpsFl.DIRECT:
            flags &= ~FtraceFl.DIRECT
        others = [each for each in self._ops_at(record.ip) if each != ops] if ftrace_rec_count(flags) else []
        if flags & FtraceFl.REGS and ops.flags & FtraceOpsFl.SAVE_REGS and ftrace_rec_count(flags):
            if not any(each.flags & FtraceOpsFl.SAVE_REGS for each in others):
                flags &= ~FtraceFl.REGS
        if ftrace_rec_count(flags) == 1 and any(each.trampoline for each in others):
            flags |= FtraceFl.TRAMP
        else:
            flags &= ~FtraceFl.TRAMP
        record.flags = flags

    def _check_record(self, record: Any, *, update: bool) -> Update:
        """ftrace_check_record() with `enable` set: what the site needs; with `update` its _EN flags follow."""
        flags = record.flags
        if flags & FtraceFl.DISABLED and not flags & FtraceFl.ENABLED:
            return Update.IGNORE
        count = ftrace_rec_count(flags)
        change = 0
        if count:
            change = int(FtraceFl.ENABLED)
            for wanted, actual in ((FtraceFl.REGS, FtraceFl.REGS_EN), (FtraceFl.TRAMP, FtraceFl.TRAMP_EN)):
                if bool(flags & wanted) != bool(flags & actual):
                    change |= wanted
            if count == 1:
                if bool(flags & FtraceFl.DIRECT) != bool(flags & FtraceFl.DIRECT_EN):
                    change |= FtraceFl.DIRECT
            elif flags & FtraceFl.DIRECT_EN:
                change |= FtraceFl.DIRECT
        if (flags & FtraceFl.ENABLED) == change:
            return Update.IGNORE
        if change:
            change ^= flags & FtraceFl.ENABLED
            if update:
                record.flags = _enabled_flags(flags, change, count)
            return Update.MAKE_CALL if change & FtraceFl.ENABLED else Update.MODIFY_CALL
        if update:
            record.flags = flags & FtraceFl.DISABLED
        return Update.MAKE_NOP

    def _hash_ipmodify_enable(self, ops: Any) -> None:
        """Claim the IPMODIFY flag of every record in the filter, or none of them."""
        if not ops.flags & FtraceOpsFl.IPMODIFY:
            return
        if hash_is_empty(self._filter(ops)):
            raise KernelErrno(errno.EINVAL, "an IPMODIFY ops needs a filter")
        claimed: list[Any] = []
        for record in self._records_wanted(ops):
            if record.flags & FtraceFl.IPMODIFY:
                for each in claimed:
                    each.flags = each.flags & ~FtraceFl.IPMODIFY
                raise KernelErrno(
                    errno.EBUSY, "another ops already changes where this function goes", where=self._where(record)
                )
            record.flags = record.flags | FtraceFl.IPMODIFY
            claimed.append(record)

    def _hash_ipmodify_disable(self, ops: Any) -> None:
        if ops.flags & FtraceOpsFl.IPMODIFY:
            for record in self._records_wanted(ops):
                record.flags = record.flags & ~FtraceFl.IPMODIFY

    # Changing text.

    def _run_update_code(self, ops: Any, *, calls: bool, more: Iterable[int] = ()) -> None:
        """ftrace_run_update_code(), for the records of `ops` and those at the addresses `more`."""
        update = self._saved_func != self.trace_function.get()
        self._saved_func = self.trace_function.get()
        if update:
            self._update_ftrace_func(self.list_func)
        if calls:
            self._replace_code(ops, more)
        if update and self.trace_function.get() != self.list_func:
            self.function_trace_op.set(self._set_function_trace_op)
            self._synchronize("ftrace_sync_ipi")
            self._update_ftrace_func(self.trace_function.get())

    def _update_ftrace_func(self, func: int) -> None:
        """Re-poke the call inside both common trampolines, even if the bytes stay the same."""
        for label in ("ftrace_call", "ftrace_regs_call"):
            ip = self._symbol(label)
            self._poker.text_poke_bp(ip, text_gen_insn(CALL_OPCODE, ip, func))

    def _replace_code(self, ops: Any, more: Iterable[int]) -> None:
        """ftrace_replace_code(): verify every site first, then poke them as batches."""
        records = self._records_wanted(ops)
        known = {record.ip for record in records}
        records += [record for ip in more if ip not in known and (record := self.records.lookup_rec(ip, ip))]
        records.sort(key=lambda record: record.ip)
        needed = [(record, self._check_record(record, update=False)) for record in records]
        for record, need in needed:
            if need is not Update.IGNORE:
                ip = record.ip
                old = NOP5 if need is Update.MAKE_CALL else text_gen_insn(CALL_OPCODE, ip, self._addr_curr(record))
                actual = self._memory.read(ip, INSN_SIZE)
                if actual != old:
                    self._ftrace_bug(record, actual, old, need)
        for record, need in needed:
            if need is Update.IGNORE:
                continue
            ip = record.ip
            new = NOP5 if need is Update.MAKE_NOP else text_gen_insn(CALL_OPCODE, ip, self._addr_new(record))
            self._poker.text_poke_queue(ip, new)
            self._check_record(record, update=True)
        self._poker.text_poke_finish()

    def _addr_new(self, record: Any) -> int:
        """ftrace_get_addr_new(): what the site shall call."""
        if record.flags & FtraceFl.TRAMP:
            ops = next(iter(self._ops_at(record.ip)), None)
            if ops is None or not ops.trampoline:
                self._bad_accounting(record)
            return int(ops.trampoline)
        return self._symbol("ftrace_regs_caller" if record.flags & FtraceFl.REGS else "ftrace_caller")

    def _addr_curr(self, record: Any) -> int:
        """ftrace_get_addr_curr(): what the site calls now."""
        if not record.flags & FtraceFl.TRAMP_EN:
            return self._symbol("ftrace_regs_caller" if record.flags & FtraceFl.REGS_EN else "ftrace_caller")
        ip = record.ip
        if self._removed is not None and self._hash_wants(self._removed.old_hash, ip):
            return int(self._removed.trampoline)
        for ops in self.each_ops():
            if not ops.trampoline or ops.flags & FtraceOpsFl.ADDING:
                continue
            hashes = ops.old_hash if ops.flags & FtraceOpsFl.MODIFYING else self._hash_of(ops)
            if self._hash_wants(hashes, ip):
                return int(ops.trampoline)
        self._bad_accounting(record)

    def _ftrace_bug(self, record: Any, actual: bytes, expected: bytes, need: Update) -> NoReturn:
        """ftrace_bug(): report the site, and turn ftrace off for good (FTRACE_WARN_ON_ONCE)."""
        flags = record.flags
        log, describe = self._log, self._kallsyms.describe
        log.pr_info("------------[ ftrace bug ]------------")
        log.pr_info(f"ftrace failed to modify [<{record.ip:016x}>] {describe(record.ip)}")
        log.pr_info(f" actual:   {actual.hex(':')}")
        log.pr_info(f" expected: {expected.hex(':')}")
        log.pr_info(need.value)
        current = self._addr_curr(record)
        log.pr_info(f"ftrace record flags: {flags:x}")
        letter = " R" if flags & FtraceFl.REGS else "  "
        tail = f" ({ftrace_rec_count(flags)}){letter}"
        if flags & FtraceFl.TRAMP_EN:
            owners = [ops for ops in self.each_ops() if ops.trampoline and self._ops_wants(ops, record.ip)]
            for ops in owners:
                tail += f"\ttramp: {describe(ops.trampoline)} ({describe(ops.func)})"
            if not owners:
                tail += "\ttramp: ERROR!"
        log.pr_info(tail)
        log.pr_info(f" expected tramp: {current:x}")
        self.disabled.set(1)
        self.enabled.set(0)
        raise FtraceBug(
            errno.ENODEV,
            f"ftrace bug: the site holds {actual.hex(' ')}, its record says {expected.hex(' ')}",
            where=self._where(record),
            advice="ftrace is off for good now",
        )

    def _bad_accounting(self, record: Any) -> NoReturn:
        self._log.pr_warn(
            f"Bad trampoline accounting at: {record.ip:#x} ({self._kallsyms.describe(record.ip)}) ({record.flags:x})"
        )
        self.disabled.set(1)
        self.enabled.set(0)
        raise FtraceBug(errno.ENODEV, "bad trampoline accounting", where=self._where(record))

    # Hashes.

    def _move_hash(self, ops: Any, old: Any, wanted: set[int]) -> None:
        """ftrace_hash_move_and_update_ops(): install a new filter, updating records and text of a registered ops."""
        before = {entry.ip for entry in entries(old)} if not hash_is_empty(old) else set()
        registered = bool(ops.flags & FtraceOpsFl.ENABLED)
        if registered and ops.flags & FtraceOpsFl.IPMODIFY:
            self._hash_ipmodify_update(before, wanted)
        new = alloc_ftrace_hash(self._layouts, self._slab, self._memory, wanted) if wanted else None
        hashes = self._hash_of(ops)
        if registered:
            self._hash_rec_update(ops, increment=False)
        hashes.filter_hash = new.address_ if new is not None else self._symbol("empty_hash")
        if registered:
            self._hash_rec_update(ops, increment=True)
            ops.flags = ops.flags | FtraceOpsFl.MODIFYING
            ops.old_hash.filter_hash = old.address_ if old is not None else 0
            self._run_update_code(ops, calls=True, more=before)
            ops.old_hash.filter_hash = 0
            ops.flags = ops.flags & ~FtraceOpsFl.MODIFYING
        if old is not None and old.address_ != self._symbol("empty_hash"):
            self._synchronize("synchronize_rcu")
            free_ftrace_hash(self._slab, old)

    def _hash_ipmodify_update(self, before: set[int], wanted: set[int]) -> None:
        added = [self.records.lookup_rec(ip, ip) for ip in sorted(wanted - before)]
        for record in added:
            if record.flags & FtraceFl.IPMODIFY:
                raise KernelErrno(
                    errno.EBUSY, "another ops already changes where this function goes", where=self._where(record)
                )
        for record in added:
            record.flags = record.flags | FtraceFl.IPMODIFY
        for ip in before - wanted:
            record = self.records.lookup_rec(ip, ip)
            record.flags = record.flags & ~FtraceFl.IPMODIFY

    def _records_wanted(self, ops: Any) -> list[Any]:
        """The records that the hashes of `ops` select, in address order."""
        hashes = self._hash_of(ops)
        wanted, notrace = self._hash(hashes.filter_hash), self._hash(hashes.notrace_hash)
        if hash_is_empty(wanted):
            return [record for record in self.records if not lookup_ip(notrace, record.ip)]
        ips = sorted(entry.ip for entry in entries(wanted))
        found = [self.records.lookup_rec(ip, ip) for ip in ips if not lookup_ip(notrace, ip)]
        return [record for record in found if record is not None]

    def _ops_at(self, ip: int) -> Iterable[Any]:
        """The registered ops that want a site, newest first."""
        return (ops for ops in self.each_ops() if self._ops_wants(ops, ip))

    def _ops_wants(self, ops: Any, ip: int) -> bool:
        return self._hash_wants(self._hash_of(ops), ip)

    def _hash_wants(self, hashes: Any, ip: int) -> bool:
        """hash_contains_ip(): in the filter, or there is none; and not in notrace."""
        wanted = self._hash(hashes.filter_hash)
        return (hash_is_empty(wanted) or lookup_ip(wanted, ip)) and not lookup_ip(self._hash(hashes.notrace_hash), ip)

    def _ops_init(self, ops: Any) -> None:
        if not ops.flags & FtraceOpsFl.INITIALIZED:
            ops.func_hash = ops.local_hash.address_
            ops.flags = ops.flags | FtraceOpsFl.INITIALIZED

    def _hash_of(self, ops: Any) -> Any:
        return self._layouts.view("ftrace_ops_hash", self._memory, ops.func_hash)

    def _filter(self, ops: Any) -> Any:
        return self._hash(self._hash_of(ops).filter_hash)

    def _hash(self, address: int) -> Any:
        return self._layouts.view("ftrace_hash", self._memory, address) if address else None

    def _ops(self, address: int) -> Any:
        return self._layouts.view("ftrace_ops", self._memory, address)

    def _where(self, record: Any) -> str:
        return self._kallsyms.describe(record.ip)

    def _symbol(self, name: str) -> int:
        return self._kallsyms.address_of(name)

    def _pointer(self, name: str) -> GuestVariable:
        return GuestVariable(self._memory, self._symbol(name))

    def _int(self, name: str) -> GuestVariable:
        return GuestVariable(self._memory, self._symbol(name), "<i")


def _enabled_flags(flags: int, change: int, count: int) -> int:
    """The flags of a record whose call is put in place or changed: each _EN flag takes its wanted value."""
    flags |= FtraceFl.ENABLED
    pairs = ((FtraceFl.REGS, FtraceFl.REGS_EN), (FtraceFl.TRAMP, FtraceFl.TRAMP_EN))
    for wanted, actual in pairs:
        if change & wanted:
            flags = flags | actual if flags & wanted else flags & ~actual
    if change & FtraceFl.DIRECT:
        flags = flags | FtraceFl.DIRECT_EN if count == 1 and flags & FtraceFl.DIRECT else flags & ~FtraceFl.DIRECT_EN
    return flags
