"""ftrace: kernel/trace/ftrace.c of 6.1, registering ops and changing their filters.

The functions have the kernel's names and do the kernel's stores in the kernel's order.  Errors are raised,
not returned (`KernelErrno`).  The parts: `emu.ftrace_ops` (the list of ops), `emu.dyn_ftrace` and
`emu.ftrace_rec` (the records), `emu.ftrace_code` (the text), `emu.trampoline`, `emu.ftrace_hash`.

Direct callers, ops that trace by pid and ops that ask for recursion protection are not here yet.
"""

import errno
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from emu.dyn_ftrace import DynFtrace, FtraceFl, ftrace_rec_count
from emu.errno import KernelErrno
from emu.ftrace_code import FtraceCode
from emu.ftrace_hash import alloc_ftrace_hash, entries, free_ftrace_hash, hash_is_empty
from emu.ftrace_ops import FtraceOpsFl, FtraceOpsList
from emu.ftrace_rec import Accounting, FtraceBug
from emu.kallsyms import Kallsyms
from emu.list import list_add_rcu, list_del_rcu
from emu.memory import WritableMemory
from emu.printk import Printk
from emu.slab import Slab
from emu.text_poke import CALL_OPCODE, INSN_SIZE, TextPoker, text_gen_insn
from emu.trampoline import Trampolines
from emu.view import GuestVariable, Layouts

__all__ = ["Ftrace", "FtraceBug", "FtraceOpsFl"]


class Ftrace:
    """The ftrace of one machine.  An `ops` is a view of a `struct ftrace_ops` in guest memory."""

    def __init__(
        self,
        layouts: Layouts,
        memory: WritableMemory,
        slab: Slab,
        kallsyms: Kallsyms,
        poker: TextPoker,
        trampolines: Trampolines,
        log: Printk,
        synchronize: Callable[[str], None],
    ) -> None:
        self._layouts = layouts
        self._memory = memory
        self._slab = slab
        self._kallsyms = kallsyms
        self._poker = poker
        self._trampolines = trampolines
        self._synchronize = synchronize
        address_of = kallsyms.address_of
        self.start_up = GuestVariable(memory, address_of("ftrace_start_up"), "<i")
        self.ops_list = FtraceOpsList(
            layouts, memory, address_of("ftrace_ops_list"), address_of("ftrace_list_end")
        )
        pages = (GuestVariable(memory, address_of(name)) for name in ("ftrace_pages_start", "ftrace_pages"))
        self.records = DynFtrace(layouts, memory, slab, *pages)
        self._code = FtraceCode(memory, kallsyms, poker, log, synchronize, self.ops_list)
        self.disabled, self.enabled = self._code.disabled, self._code.enabled
        self._last_enabled = True  # last_ftrace_enabled
        self._accounting = Accounting(self.records, self.ops_list, kallsyms, self._code.kill)

    # Registration.

    def register_ftrace_function(self, ops: Any) -> None:
        """Enable `ops` on the sites of its filter; EBUSY if one of them has an IPMODIFY ops already.

        An ops without a filter is enabled on all sites.
        """
        self._ops_init(ops)
        self._check_alive()
        self._ftrace_startup(ops)

    def unregister_ftrace_function(self, ops: Any) -> None:
        """Disable `ops`; on return nobody executes its trampoline or its function any more.

        Where a site turns out not to hold what it should, FtraceBug ends this half done.  The kernel goes on
        there and frees the trampoline that sites may still call.
        """
        self._check_alive()
        self._ftrace_shutdown(ops)

    def ftrace_set_filter_ip(self, ops: Any, ip: int, *, remove: bool) -> None:
        """Add an address to the filter of `ops`, or take it out; ip is a site or the start of a function.

        Without the last address a registered ops is enabled on all sites, which an IPMODIFY ops refuses
        (EINVAL).
        """
        self._ops_init(ops)
        self._check_alive()
        location = self.ftrace_location(ip)
        if not location:
            raise KernelErrno(errno.EINVAL, "no fentry site here", where=self._kallsyms.describe(ip))
        old = self.ops_list.filter(ops)
        wanted = set() if hash_is_empty(old) else {entry.ip for entry in entries(old)}
        if not remove:
            wanted.add(location)
        elif location in wanted:
            wanted.discard(location)
        else:
            raise KernelErrno(errno.ENOENT, "not in the filter", where=self._kallsyms.describe(ip))
        self._move_hash(ops, old, wanted)

    def ftrace_location(self, ip: int) -> int:
        """The site `ip` lies in, or that of the function starting at `ip`; 0 if there is none."""
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

    # kernel.ftrace_enabled.

    def ftrace_enabled(self) -> int:
        """What the sysctl shows; ENODEV after an ftrace bug."""
        self._check_alive()
        return self.enabled.get()

    def ftrace_enable_sysctl(self, value: int) -> None:
        """Switch all calls on (not 0) or off (0); EBUSY for off while an ops is PERMANENT, as all of
        livepatch are.

        Off, no such ops can be registered; others can be, and are called once it is on again.
        """
        self._check_alive()
        self.enabled.set(value)
        if self._last_enabled == bool(value):
            return
        if value:
            if self.ops_list.first.get() != self.ops_list.end:
                self._code.update_ftrace_function()
            if self.start_up.get():
                self._code.startup_sysctl(list(self.records))
        else:
            if any(ops.flags & FtraceOpsFl.PERMANENT for ops in self.ops_list):
                self.enabled.set(1)
                raise KernelErrno(
                    errno.EBUSY, "ftrace has a permanent user", advice="disable the livepatches first"
                )
            self._code.trace_function.set(self._code.stub)
            if self.start_up.get():
                self._code.shutdown_sysctl(list(self.records))
        self._last_enabled = bool(value)

    # enabled_functions.

    def enabled_functions(self) -> list[str]:
        """The lines of tracefs' enabled_functions, in record order (t_show())."""
        return [self._show(record) for record in self.records if record.flags & FtraceFl.ENABLED]

    def enabled_function(self, ip: int) -> str:
        """The line of enabled_functions about the site at `ip`; empty if it has none."""
        record = self.records.lookup_rec(ip, ip)
        return self._show(record) if record is not None and record.flags & FtraceFl.ENABLED else ""

    def _show(self, record: Any) -> str:
        flags, describe = record.flags, self._kallsyms.describe
        symbol = self._kallsyms.at(record.ip)
        line = f"{record.ip:#x}" if symbol is None else symbol.name
        if symbol is not None and symbol.module:
            line += f" [{symbol.module}]"
        line += f" ({ftrace_rec_count(flags)})"
        letters = ((FtraceFl.REGS, "R"), (FtraceFl.IPMODIFY, "I"), (FtraceFl.DIRECT, "D"))
        line += "".join(f" {letter}" if flags & flag else "  " for flag, letter in letters)
        if flags & FtraceFl.TRAMP_EN:
            owners = [
                f"\ttramp: {ops.trampoline:#018x} ({describe(ops.func)})"
                f" ->{describe(self._called_at(ops.trampoline + self._call_offset(ops)))}"
                for ops in self.ops_list.with_trampoline(record.ip)
            ]
            return line + ("".join(owners) or "\ttramp: ERROR!")
        call = self._kallsyms.address_of("ftrace_regs_call" if flags & FtraceFl.REGS_EN else "ftrace_call")
        return f"{line} ->{describe(self._called_at(call))}"

    def _called_at(self, ip: int) -> int:
        """Where the 5-byte call at `ip` goes (addr_from_call())."""
        code = self._memory.read(ip, INSN_SIZE)
        return ip + INSN_SIZE + int.from_bytes(code[1:], "little", signed=True)

    def each_ops(self) -> Iterator[Any]:
        """Views of the registered ops, newest first."""
        return iter(self.ops_list)

    # Startup and shutdown.

    def _ftrace_startup(self, ops: Any) -> None:
        self._register(ops)
        self.start_up.set(self.start_up.get() + 1)
        ops.flags = ops.flags | FtraceOpsFl.ENABLED | FtraceOpsFl.ADDING
        try:
            self._accounting.ipmodify_enable(ops)
        except KernelErrno:
            self._unregister(ops)
            self.start_up.set(self.start_up.get() - 1)
            ops.flags = ops.flags & ~FtraceOpsFl.ENABLED
            if ops.flags & FtraceOpsFl.DYNAMIC:
                self._trampoline_free(ops)
            raise
        try:
            calls = self._accounting.hash_rec_update(ops, increment=True)
            self._code.startup_enable(self._accounting.wanted(ops) if calls else ())
        except FtraceBug:
            # What is half done stays: undoing it could do more harm.
            self._unregister(ops)
            raise
        ops.flags = ops.flags & ~FtraceOpsFl.ADDING

    def _ftrace_shutdown(self, ops: Any) -> None:
        self._unregister(ops)
        self.start_up.set(self.start_up.get() - 1)
        self._accounting.ipmodify_disable(ops)
        calls = self._accounting.hash_rec_update(ops, increment=False)
        ops.flags = ops.flags & ~FtraceOpsFl.ENABLED
        self._code.shutdown_disable(ops, self._accounting.wanted(ops) if calls else ())
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
        if not self._code.enabled.get() and flags & FtraceOpsFl.PERMANENT:
            raise KernelErrno(errno.EBUSY, "ftrace_enabled is 0")
        if self._kallsyms.module_of(ops.address_) != "":  # not core kernel data: it may be freed
            ops.flags = flags | FtraceOpsFl.DYNAMIC
        self.ops_list.add(ops)
        ops.saved_func = ops.func
        self._update_trampoline(ops)
        self._code.update_ftrace_function()

    def _unregister(self, ops: Any) -> None:
        """__unregister_ftrace_function()."""
        if not ops.flags & FtraceOpsFl.ENABLED:
            raise KernelErrno(errno.EBUSY, "the ops are not registered")
        self.ops_list.remove(ops)
        self._code.update_ftrace_function()
        ops.func = ops.saved_func

    def _ops_init(self, ops: Any) -> None:
        if not ops.flags & FtraceOpsFl.INITIALIZED:
            ops.func_hash = ops.local_hash.address_
            ops.flags = ops.flags | FtraceOpsFl.INITIALIZED

    def _check_alive(self) -> None:
        if self.disabled.get():
            raise KernelErrno(errno.ENODEV, "ftrace is off after an ftrace bug")

    # Trampolines.

    def _update_trampoline(self, ops: Any) -> None:
        """ftrace_update_trampoline() and arch_ftrace_update_trampoline()."""
        if ops.trampoline:
            if ops.flags & FtraceOpsFl.ALLOC_TRAMP:
                ip = ops.trampoline + self._call_offset(ops)
                self._poker.text_poke_bp(ip, text_gen_insn(CALL_OPCODE, ip, ops.func))
            return
        address, size = self._trampolines.create(ops, ops.func)
        ops.flags = ops.flags | FtraceOpsFl.ALLOC_TRAMP
        ops.trampoline = address
        ops.trampoline_size = size
        head = self._kallsyms.address_of("ftrace_ops_trampoline_list")
        list_add_rcu(ops.list, self._layouts.view("list_head", self._memory, head))

    def _trampoline_free(self, ops: Any) -> None:
        if not ops.flags & FtraceOpsFl.ALLOC_TRAMP or not ops.trampoline:
            return
        list_del_rcu(ops.list)
        self._trampolines.free(ops.trampoline)
        ops.trampoline = 0
        ops.flags = ops.flags & ~FtraceOpsFl.ALLOC_TRAMP

    def _call_offset(self, ops: Any) -> int:
        return self._trampolines.call_offset(bool(ops.flags & FtraceOpsFl.SAVE_REGS))

    # Hashes.

    def _move_hash(self, ops: Any, old: Any, wanted: set[int]) -> None:
        """ftrace_hash_move_and_update_ops(): a new filter; a registered ops' records and text follow."""
        before = set() if hash_is_empty(old) else {entry.ip for entry in entries(old)}
        hashes = self.ops_list.hashes(ops)
        old_hash = hashes.filter_hash, hashes.notrace_hash
        empty = self._kallsyms.address_of("empty_hash")
        made = alloc_ftrace_hash(self._layouts, self._slab, self._memory, wanted) if wanted else None
        try:
            self._accounting.ipmodify_update(ops, before, wanted)
        except KernelErrno:
            if made is not None:
                free_ftrace_hash(self._slab, made)
            raise
        new = made.address_ if made is not None else empty
        registered = bool(ops.flags & FtraceOpsFl.ENABLED)
        sites = self._sites(ops) if registered else set()
        self._accounting.hash_rec_update(ops, increment=False)
        hashes.filter_hash = new
        self._accounting.hash_rec_update(ops, increment=True)
        if registered:
            sites |= self._sites(ops)
            self._code.modify(ops, old_hash, [self.records.lookup_rec(ip, ip) for ip in sorted(sites)])
        if old is not None and old.address_ != empty:
            self._synchronize("synchronize_rcu")
            free_ftrace_hash(self._slab, old)

    def _sites(self, ops: Any) -> set[int]:
        return {record.ip for record in self._accounting.wanted(ops)}
