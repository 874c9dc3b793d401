"""ftrace's changes of text: arch/x86/kernel/ftrace.c, ftrace_modify_all_code() and ftrace_bug() of 6.1.

All sites of a change are verified against what their records say before the first of them is poked.
"""

import errno
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from emu.dyn_ftrace import FtraceFl, ftrace_rec_count
from emu.ftrace_ops import FtraceOpsFl, FtraceOpsList
from emu.ftrace_rec import FtraceBug, Update, ftrace_check_record
from emu.kallsyms import Kallsyms
from emu.memory import WritableMemory
from emu.printk import Printk
from emu.text_poke import CALL_OPCODE, INSN_SIZE, NOP5, TextPoker, text_gen_insn
from emu.view import GuestVariable

__all__ = ["FtraceCode"]


class FtraceCode:
    """Brings the sites and the common trampolines in step with the records and the ops."""

    def __init__(
        self,
        memory: WritableMemory,
        kallsyms: Kallsyms,
        poker: TextPoker,
        log: Printk,
        synchronize: Callable[[str], None],
        ops_list: FtraceOpsList,
    ) -> None:
        self._ops_list = ops_list
        self._memory = memory
        self._kallsyms = kallsyms
        self._poker = poker
        self._log = log
        self._synchronize = synchronize
        address_of = kallsyms.address_of
        self.trace_function = GuestVariable(memory, address_of("ftrace_trace_function"))
        self.function_trace_op = GuestVariable(memory, address_of("function_trace_op"))
        self.enabled = GuestVariable(memory, address_of("ftrace_enabled"), "<i")
        self.disabled = GuestVariable(memory, address_of("ftrace_disabled"), "<i")
        self.stub = address_of("ftrace_stub")
        self.list_func = address_of("arch_ftrace_ops_list_func")
        self._callers = address_of("ftrace_caller"), address_of("ftrace_regs_caller")
        self._calls = address_of("ftrace_call"), address_of("ftrace_regs_call")
        # set_function_trace_op, saved_ftrace_func and removed_ops of the kernel.
        self._set_function_trace_op = 0
        self._saved_func = self.stub
        self._removed: Any = None

    def kill(self) -> None:
        """ftrace_kill(): nothing registers, and no text changes, from here on."""
        self.disabled.set(1)
        self.enabled.set(0)
        self.trace_function.set(self.stub)

    def update_ftrace_function(self) -> None:
        """update_ftrace_function(): decide what the common trampolines shall call."""
        if not self.enabled.get():
            return
        ops_list = self._ops_list
        first = ops_list.first.get()
        self._set_function_trace_op = first
        if first == ops_list.end:
            func = self.stub
        elif (only := ops_list.ops(first)).next == ops_list.end:
            dynamic = only.flags & (FtraceOpsFl.DYNAMIC | FtraceOpsFl.RCU)
            func = self.list_func if dynamic else only.func
        else:
            self._set_function_trace_op = ops_list.end
            func = self.list_func
        if self.trace_function.get() != func:
            self.trace_function.set(func)

    def startup_enable(self, records: Sequence[Any]) -> None:
        """ftrace_startup_enable(): what has to change because of an ops that is on the list now.

        `records` are those whose sites may have to change, in address order.
        """
        update = self._trace_func_changed()
        if self.enabled.get() and (update or records):
            self._modify_all_code(records, update=update)

    def shutdown_disable(self, ops: Any, records: Sequence[Any]) -> None:
        """The text's part of ftrace_shutdown(): `ops` is off the list, old_hash says where it was."""
        update = self._trace_func_changed()
        if not self.enabled.get() or not (update or records):
            return
        ops.flags = ops.flags | FtraceOpsFl.REMOVING
        self._removed = ops
        hashes = self._ops_list.hashes(ops)
        ops.old_hash.filter_hash = hashes.filter_hash
        ops.old_hash.notrace_hash = hashes.notrace_hash
        try:
            self._modify_all_code(records, update=update)
        finally:
            ops.old_hash.filter_hash = 0
            ops.old_hash.notrace_hash = 0
            self._removed = None
        ops.flags = ops.flags & ~FtraceOpsFl.REMOVING

    def startup_sysctl(self, records: Sequence[Any]) -> None:
        """ftrace_startup_sysctl(): ftrace is enabled again; the sites of all `records` follow."""
        self._saved_func = 0  # the common trampolines follow, too
        self.startup_enable(records)

    def shutdown_sysctl(self, records: Sequence[Any]) -> None:
        """ftrace_shutdown_sysctl(): every site becomes a NOP; the common trampolines keep their calls."""
        self._replace_code(records, enable=False)

    def modify(self, ops: Any, old_hash: tuple[int, int], records: Sequence[Any]) -> None:
        """ftrace_run_modify_code(): (filter, notrace) `old_hash` is what a registered ops had until now."""
        if not self.enabled.get():
            return
        ops.flags = ops.flags | FtraceOpsFl.MODIFYING
        ops.old_hash.filter_hash, ops.old_hash.notrace_hash = old_hash
        try:
            self._modify_all_code(records, update=False)
        finally:
            ops.old_hash.filter_hash = ops.old_hash.notrace_hash = 0
        ops.flags = ops.flags & ~FtraceOpsFl.MODIFYING

    def _modify_all_code(self, records: Sequence[Any], *, update: bool) -> None:
        """ftrace_modify_all_code(): the common trampolines go through the list function while sites change.

        Raises FtraceBug when the trampolines are done with, too.
        """
        if update:
            self._update_ftrace_func(self.list_func)
        try:
            if records:
                self._replace_code(records)
        finally:
            if update and self.trace_function.get() != self.list_func:
                self.function_trace_op.set(self._set_function_trace_op)
                self._synchronize("ftrace_sync_ipi")
                self._update_ftrace_func(self.trace_function.get())

    def _trace_func_changed(self) -> bool:
        func = self.trace_function.get()
        changed, self._saved_func = self._saved_func != func, func
        return changed

    def _update_ftrace_func(self, func: int) -> None:
        """Re-poke the call inside both common trampolines, even if the bytes stay the same."""
        for ip in self._calls:
            self._poker.text_poke_bp(ip, text_gen_insn(CALL_OPCODE, ip, func))

    def _replace_code(self, records: Sequence[Any], *, enable: bool = True) -> None:
        """ftrace_replace_code(): verify every site first, then poke them as batches."""
        needed = []
        for record in records:
            need = ftrace_check_record(record, update=False, enable=enable)
            if need is Update.IGNORE:
                continue
            ip = record.ip
            make_call = need is Update.MAKE_CALL
            old = NOP5 if make_call else text_gen_insn(CALL_OPCODE, ip, self._addr_curr(record))
            actual = self._memory.read(ip, INSN_SIZE)
            if actual != old:
                self._ftrace_bug(record, actual, old, need)
            needed.append((record, ip, need))
        # Computed before the first is queued: if one cannot be, nothing is left in the queue.
        new = [
            NOP5 if need is Update.MAKE_NOP else text_gen_insn(CALL_OPCODE, ip, self._addr_new(record))
            for record, ip, need in needed
        ]
        for (record, ip, _), text in zip(needed, new, strict=True):
            self._poker.text_poke_queue(ip, text)
            ftrace_check_record(record, update=True, enable=enable)
        self._poker.text_poke_finish()

    def _addr_new(self, record: Any) -> int:
        """ftrace_get_addr_new(): what the site shall call."""
        if not record.flags & FtraceFl.TRAMP:
            return self._callers[bool(record.flags & FtraceFl.REGS)]
        ops = next(self._ops_list.at(record.ip), None)
        if ops is None or not ops.trampoline:
            self._bad_accounting(record, f" ({record.flags:x})")
        return int(ops.trampoline)

    def _addr_curr(self, record: Any) -> int:
        """ftrace_get_addr_curr(): what the site calls now."""
        if not record.flags & FtraceFl.TRAMP_EN:
            return self._callers[bool(record.flags & FtraceFl.REGS_EN)]
        ops = self._tramp_ops_curr(record.ip)
        if ops is None:
            self._bad_accounting(record, "")
        return int(ops.trampoline)

    def _tramp_ops_curr(self, ip: int) -> Any:
        """ftrace_find_tramp_ops_curr(): the ops whose trampoline the site calls, even if it is changing."""
        ops_list = self._ops_list
        if self._removed is not None and ops_list.hash_wants(self._removed.old_hash, ip):
            return self._removed
        for ops in ops_list:
            if not ops.trampoline or ops.flags & FtraceOpsFl.ADDING:
                continue
            hashes = ops.old_hash if ops.flags & FtraceOpsFl.MODIFYING else ops_list.hashes(ops)
            if ops_list.hash_wants(hashes, ip):
                return ops
        return None

    def _ftrace_bug(self, record: Any, actual: bytes, expected: bytes, need: Update) -> NoReturn:
        """ftrace_bug(): report the site, and turn ftrace off for good (FTRACE_WARN_ON_ONCE)."""
        flags, describe = record.flags, self._kallsyms.describe
        counted = f" ({ftrace_rec_count(flags)})" + (" R" if flags & FtraceFl.REGS else "  ")
        if flags & FtraceFl.TRAMP_EN:
            owners = [
                f"\ttramp: {describe(ops.trampoline)} ({describe(ops.func)})"
                for ops in self._ops_list.with_trampoline(record.ip)
            ]
            counted += "".join(owners) or "\ttramp: ERROR!"
        self._log.pr_info("------------[ ftrace bug ]------------")
        self._log.pr_info("ftrace failed to modify ")
        self._log.pr_info(f"[<{record.ip:016x}>] {describe(record.ip)}")
        self._log.pr_info(f" actual:   {actual.hex(':')}")
        self._log.pr_info(f" expected: {expected.hex(':')}")
        self._log.pr_info(need.value)
        self._log.pr_info(f"ftrace record flags: {flags:x}")
        self._log.pr_info(counted)
        self._log.pr_info(f" expected tramp: {self._addr_curr(record):x}")
        self.kill()
        raise FtraceBug(
            errno.ENODEV,
            f"ftrace bug: the site holds {actual.hex(' ')}, its record says {expected.hex(' ')}",
            where=describe(record.ip),
            advice="ftrace is off for good now",
        )

    def _bad_accounting(self, record: Any, flags: str) -> NoReturn:
        where = self._kallsyms.describe(record.ip)
        self._log.pr_warn(f"Bad trampoline accounting at: {record.ip:#x} ({where}){flags}")
        self.kill()
        raise FtraceBug(errno.ENODEV, "bad trampoline accounting", where=where)
