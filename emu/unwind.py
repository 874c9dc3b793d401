"""Walking a kernel stack reliably, or saying that it cannot be done: arch/x86/kernel/unwind_orc.c.

Rows come from ORC where an object has it, from its call frame information otherwise, and for entry code and
trampolines from the code itself.  Code that nothing describes makes the rest of the stack unreliable; the
walk never guesses on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elf.eh_frame import CallFrames, read_eh_frame
from elf.orc import OrcTable, read_orc
from elf.unwind_row import FrameBase, FrameKind, UnwindRow
from emu.frame_depth import frame_rows
from emu.ftrace_ops import FtraceOpsFl
from emu.memory import MemoryFault, read_u64
from emu.switch_to import INACTIVE_FRAME, INTERRUPT_STUB

if TYPE_CHECKING:
    from emu.machine import Machine
    from emu.module import LoadedObject

__all__ = ["StackTrace", "Unwinder"]

MAX_STACK_ENTRIES = 100  # kernel/livepatch/transition.c
# In an exit stub, from behind its first `hlt`: what the export calls returns behind this instruction.
STUB_CALLS = 1
# The frame of an export is that of a function which begins with push rbp; mov rbp, rsp (emu/switch_to.py).
CALLED_BY_EXPORT = UnwindRow(FrameBase.BP, 16, -16)
INTERRUPTED = UnwindRow(FrameBase.SP, 0, None, kind=FrameKind.REGS)
PARTIAL = 16 * 8  # a partial pt_regs begins where ip would be: fifteen registers and orig_ax come before


@dataclass(frozen=True, slots=True)
class StackTrace:
    """The addresses on a stack, innermost first, as stack_trace_save_tsk_reliable() collects them.

    `unreliable` says why the walk had to stop; it is empty if the outermost frame was reached.
    """

    entries: tuple[int, ...]
    unreliable: str = ""


@dataclass(slots=True)
class _Frame:
    """Where the walk is.  `signal`: ip is an interrupted instruction, not the one behind a call."""

    ip: int
    sp: int
    bp: int
    signal: bool
    registers: Mapping[str, int]


class Unwinder:
    """Unwinds the stacks of one machine.

    `recover_return_address(address, slot)` gives the real return address for what the stack holds at `slot`:
    whoever hooks returns replaces it (unwind_recover_ret_addr()).
    """

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self._tables: dict[str, OrcTable | CallFrames | None] = {}
        self._entry_rows: CallFrames | None = None
        self._thread_sp = machine.layouts.offsetof("task_struct", "thread.sp")
        self.recover_return_address: Callable[[int, int], int] = lambda address, slot: address

    def walk(self, registers: Mapping[str, int]) -> StackTrace:
        """Walk from a CPU's registers to the outermost frame."""
        return self._walk(_Frame(registers["rip"], registers["rsp"], registers["rbp"], True, registers))

    def walk_task(self, task_struct: int) -> StackTrace:
        """Walk the stack of a task that does not run, from its thread.sp: all of it is in guest memory."""
        memory = self._machine.space
        try:
            sp = read_u64(memory, task_struct + self._thread_sp)
            *_, bp, ip = INACTIVE_FRAME.unpack(memory.read(sp, INACTIVE_FRAME.size))
        except MemoryFault as fault:
            return StackTrace((), f"the stack is not readable at {fault.address:#x}")
        return self._walk(_Frame(ip, sp + INACTIVE_FRAME.size, bp, False, {}))

    def _walk(self, frame: _Frame) -> StackTrace:
        outermost = self._machine.return_address
        entries = [frame.ip]
        while len(entries) <= MAX_STACK_ENTRIES:
            if frame.ip == outermost:
                return StackTrace(tuple(entries[:-1]))
            problem = self._next_frame(frame)
            if problem == "end":
                return StackTrace(tuple(entries))
            if problem:
                return StackTrace(tuple(entries), problem)
            entries.append(frame.ip)
        return StackTrace(tuple(entries[:MAX_STACK_ENTRIES]), f"more than {MAX_STACK_ENTRIES} frames")

    def row_at(self, address: int) -> UnwindRow | None:
        """The row that holds while the instruction at `address` has not executed yet."""
        machine = self._machine
        entry = machine.vmlinux.entry
        if entry.start <= address < entry.start + entry.size:
            return self._rows_of_entry().row_at(address)
        symbol = machine.kallsyms.at(address)
        if symbol is None:
            return None
        if symbol.module == "__builtin__ftrace":
            return self._row_of_trampoline(symbol.address, address)
        if symbol.module not in self._tables:
            self._tables[symbol.module] = _read_table(machine.modules.objects[symbol.module])
        table = self._tables[symbol.module]
        return None if table is None else table.row_at(address)

    def forget(self, module: str) -> None:
        """A module of that name was unloaded: its tables are gone."""
        self._tables.pop(module, None)

    def _next_frame(self, frame: _Frame) -> str:
        """Step to the caller; "" if that worked, "end" at the outermost frame, else why it is unreliable."""
        machine = self._machine
        # Behind a call the layout may be another one than at it, so the call itself is looked up.
        row = self.row_at(frame.ip if frame.signal else frame.ip - 1)
        if row is None:
            return f"no unwind information for {machine.kallsyms.describe(frame.ip)}"
        if row.kind is FrameKind.END:
            return "end"
        try:
            caller = self._caller_sp(frame, row)
            if caller is None:
                return f"{row.base.value} is not known at {machine.kallsyms.describe(frame.ip)}"
            if caller <= frame.sp and row.kind is FrameKind.CALL:
                return f"the stack goes in the wrong direction at {machine.kallsyms.describe(frame.ip)}"
            self._step(frame, row, caller)
        except MemoryFault as fault:
            return f"the stack is not readable at {fault.address:#x}"
        return ""

    def _caller_sp(self, frame: _Frame, row: UnwindRow) -> int | None:
        match row.base:
            case FrameBase.SP:
                return frame.sp + row.offset
            case FrameBase.BP:
                return frame.bp + row.offset
            case FrameBase.SP_INDIRECT:
                return read_u64(self._machine.space, frame.sp) + row.offset
            case FrameBase.BP_INDIRECT:
                return read_u64(self._machine.space, frame.bp + row.offset)
            case FrameBase.UNDEFINED:
                return None
        # Other registers are known only while nothing was called since they were saved.
        value = frame.registers.get(row.base.value)
        return None if value is None else value + row.offset

    def _step(self, frame: _Frame, row: UnwindRow, caller: int) -> None:
        memory = self._machine.space
        bp = frame.bp
        if row.bp_offset is not None:
            bp = read_u64(memory, (frame.bp if row.bp_from_bp else caller) + row.bp_offset)
        if row.kind is FrameKind.CALL:
            slot = caller - 8
            frame.ip = self.recover_return_address(read_u64(memory, slot), slot)
            frame.sp, frame.signal, frame.registers = caller, False, {}
        else:
            regs = caller if row.kind is FrameKind.REGS else caller - PARTIAL
            offset = self._machine.layouts.offsetof
            frame.ip = read_u64(memory, regs + offset("pt_regs", "ip"))
            frame.sp = read_u64(memory, regs + offset("pt_regs", "sp"))
            frame.signal = True
            frame.registers = {}
            if row.kind is FrameKind.REGS:
                bp = read_u64(memory, regs + offset("pt_regs", "bp"))
                names = {"r10": "r10", "r13": "r13", "rdi": "di", "rdx": "dx"}
                frame.registers = {
                    name: read_u64(memory, regs + offset("pt_regs", member)) for name, member in names.items()
                }
        frame.bp = bp

    def _rows_of_entry(self) -> CallFrames:
        if self._entry_rows is None:
            vmlinux = self._machine.vmlinux
            rows = frame_rows(vmlinux.entry_code, vmlinux.entry.start, vmlinux.labels.values())
            for address, name in vmlinux.exits.items():
                if name != "klpemu_return":
                    interrupt = name == INTERRUPT_STUB
                    rows[address + STUB_CALLS] = INTERRUPTED if interrupt else CALLED_BY_EXPORT
            addresses = sorted(rows)
            # A return address minus one lies inside the call, which is why this is a table of ranges.
            self._entry_rows = CallFrames(addresses, [rows[address] for address in addresses])
        return self._entry_rows

    def _row_of_trampoline(self, trampoline: int, address: int) -> UnwindRow | None:
        """A trampoline's layout is that of the code it is a copy of (orc_ftrace_find())."""
        machine = self._machine
        for ops in machine.ftrace.each_ops():
            if ops.trampoline == trampoline:
                name = "ftrace_regs_caller" if ops.flags & FtraceOpsFl.SAVE_REGS else "ftrace_caller"
                return self._rows_of_entry().row_at(machine.symbol(name) + address - trampoline)
        return None


def _read_table(loaded: "LoadedObject") -> OrcTable | CallFrames | None:
    """The unwind table of an object, relocated as it was loaded."""
    placement = loaded.placement
    sections = {section.name: section.index for section in placement.image.sections}
    if ".orc_unwind" in sections and ".orc_unwind_ip" in sections:
        ips, entries = sections[".orc_unwind_ip"], sections[".orc_unwind"]
        if ips in placement.contents and entries in placement.contents:
            return read_orc(
                bytes(placement.contents[ips]), bytes(placement.contents[entries]), placement.addresses[ips]
            )
    index = sections.get(".eh_frame")
    if index is None or index not in placement.contents:
        return None
    return read_eh_frame(bytes(placement.contents[index]), placement.addresses[index])
