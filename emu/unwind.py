"""Walking a kernel stack reliably, or saying that it cannot be done: arch/x86/kernel/unwind_orc.c.

Rows come from ORC where an object has it, from its call frame information otherwise, and from the code itself
for an object that has neither but keeps frame pointers, for entry code and for trampolines.  Code that
nothing describes makes the rest of the stack unreliable; the walk never guesses on.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from elf.eh_frame import CallFrames, read_eh_frame
from elf.errors import ElfError
from elf.orc import OrcTable, read_orc
from elf.unwind_row import FrameBase, FrameKind, UnwindRow
from emu.fork import THREAD_SIZE
from emu.frame_depth import frame_rows
from emu.frame_pointer import frame_pointer_rows
from emu.ftrace_ops import FtraceOpsFl
from emu.memory import PAGE_SIZE, MemoryFault, read_u64
from emu.paging import Access, AddressSpace
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
TABLES = (".orc_unwind_ip", ".orc_unwind", ".eh_frame")
COLD = re.compile(r"\.cold(\.\d+)?$")  # as gcc names it
TABLES_KEPT = 64
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
    """Where the walk is.  `signal`: ip is an interrupted instruction, not the one behind a call.

    `entered`: ip is a function's first instruction, which a trampoline is about to return to.
    """

    ip: int
    sp: int
    bp: int
    signal: bool
    registers: Mapping[str, int]
    entered: bool = False


class _Stack:
    """The stack from `sp` up to the guard page above it: a frame anywhere else is none (stack_access_ok()).

    A stack pointer in the guard page below has overflowed a stack, which begins at the next page.
    """

    def __init__(self, space: AddressSpace, sp: int) -> None:
        if space.access(sp) is not Access.WRITE:
            sp = (sp | (PAGE_SIZE - 1)) + 1
        self.start = end = sp
        while end - sp < THREAD_SIZE and space.access(end) is Access.WRITE:
            end = (end | (PAGE_SIZE - 1)) + 1
        self.data = space.read(sp, end - sp) if end > sp else b""

    def word(self, address: int) -> int:
        """The 64-bit word at a guest virtual address; raises MemoryFault if it is not on the stack."""
        at = address - self.start
        if at < 0 or at + 8 > len(self.data):
            raise MemoryFault(address, 8, "a walk of the stack")
        return int.from_bytes(self.data[at : at + 8], "little")


class Unwinder:
    """Unwinds the stacks of one machine.

    `recover_return_address(address, slot)` gives the real return address for what the stack holds at `slot`:
    whoever hooks returns replaces it (unwind_recover_ret_addr()).
    """

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self._tables: dict[str, OrcTable | CallFrames | None] = {}
        self._rows: dict[int, UnwindRow] = {}
        self._entry_rows: CallFrames | None = None
        offsetof = machine.layouts.offsetof
        self._thread_sp = offsetof("task_struct", "thread.sp")
        self._stack = offsetof("task_struct", "stack")
        members = {"ip": "ip", "sp": "sp", "bp": "bp", "r10": "r10", "r13": "r13", "rdi": "di", "rdx": "dx"}
        self._regs = {name: offsetof("pt_regs", member) for name, member in members.items()}
        # Both common trampolines; their copies are found by the ops that own them.
        (last,) = machine.kallsyms.named("ftrace_regs_caller_end")
        self._callers = range(machine.symbol("ftrace_caller"), last.address + last.size)
        self.recover_return_address: Callable[[int, int], int] = lambda address, slot: address

    def walk(self, registers: Mapping[str, int]) -> StackTrace:
        """Walk from a CPU's registers to the outermost frame."""
        frame = _Frame(registers["rip"], registers["rsp"], registers["rbp"], True, registers)
        return self._walk(frame, _Stack(self._machine.space, frame.sp))

    def walk_task(self, task_struct: int) -> StackTrace:
        """Walk the stack of a task that does not run, from its thread.sp: all of it is in guest memory."""
        memory = self._machine.space
        try:
            sp = read_u64(memory, task_struct + self._thread_sp)
            bottom = read_u64(memory, task_struct + self._stack)
            if not bottom <= sp < bottom + THREAD_SIZE:
                return StackTrace((), f"thread.sp is {sp:#x}, which is not on the task's stack")
            stack = _Stack(memory, sp)
            above = sp + INACTIVE_FRAME.size
            bp, ip = stack.word(above - 16), stack.word(above - 8)
        except MemoryFault as fault:
            return StackTrace((), f"the stack is not readable at {fault.address:#x}")
        return self._walk(_Frame(ip, above, bp, False, {}), stack)

    def _walk(self, frame: _Frame, stack: _Stack) -> StackTrace:
        outermost = self._machine.return_address
        entries = [frame.ip]
        while len(entries) <= MAX_STACK_ENTRIES:
            if frame.ip == outermost:
                return StackTrace(tuple(entries[:-1]))
            problem = self._next_frame(frame, stack)
            if problem == "end":
                return StackTrace(tuple(entries))
            if problem:
                return StackTrace(tuple(entries), problem)
            entries.append(frame.ip)
        return StackTrace(tuple(entries[:MAX_STACK_ENTRIES]), f"more than {MAX_STACK_ENTRIES} frames")

    def row_at(self, address: int) -> UnwindRow | None:
        """The row that holds while the instruction at `address` has not executed yet."""
        row = self._rows.get(address)
        if row is not None:
            return row
        machine = self._machine
        entry = machine.vmlinux.entry
        if entry.start <= address < entry.start + entry.size:
            return self._rows_of_entry().row_at(address)
        module = machine.kallsyms.module_of(address)
        if module is None:
            return self._row_of_trampoline(address)
        if module not in self._tables:
            self._tables[module] = _read_table(machine.modules.objects[module])
        table = self._tables[module]
        row = None if table is None else table.row_at(address)
        if row is not None:
            self._rows[address] = row
        return row

    def forget(self, module: str) -> None:
        """A module of that name was unloaded: its tables are gone."""
        self._tables.pop(module, None)
        self._rows.clear()

    def _next_frame(self, frame: _Frame, stack: _Stack) -> str:
        """Step to the caller; "" if that worked, "end" at the outermost frame, else why it is unreliable."""
        describe = self._machine.kallsyms.describe
        if frame.entered:
            return f"{describe(frame.ip)} is about to be entered from a trampoline"
        # Behind a call the layout may be another one than at it, so the call itself is looked up.
        row = self.row_at(frame.ip if frame.signal else frame.ip - 1)
        if row is None:
            return f"no unwind information for {describe(frame.ip)}"
        if row.kind is FrameKind.END:
            return "end"
        if row.calls_only and frame.signal:
            return f"interrupted in {describe(frame.ip)}, which has nothing but a frame pointer"
        try:
            caller = _caller_sp(frame, row, stack)
            if caller is None:
                return f"{row.base.value} is not known at {describe(frame.ip)}"
            ip, sp = frame.ip, frame.sp
            self._step(frame, row, caller, stack)
        except MemoryFault as fault:
            return f"the stack is not readable at {fault.address:#x}"
        if frame.sp <= sp:
            return f"the stack goes in the wrong direction at {describe(ip)}"
        frame.entered = self._is_redirected(ip, frame.ip)
        return ""

    def _step(self, frame: _Frame, row: UnwindRow, caller: int, stack: _Stack) -> None:
        bp = frame.bp
        if row.bp_offset is not None:
            bp = stack.word((frame.bp if row.bp_from_bp else caller) + row.bp_offset)
        if row.kind is FrameKind.CALL:
            slot = caller - 8
            frame.ip = self.recover_return_address(stack.word(slot), slot)
            frame.sp, frame.signal, frame.registers = caller, False, {}
        else:
            regs = caller if row.kind is FrameKind.REGS else caller - PARTIAL
            frame.ip, frame.sp = stack.word(regs + self._regs["ip"]), stack.word(regs + self._regs["sp"])
            frame.signal, frame.registers = True, {}
            if row.kind is FrameKind.REGS:
                frame.registers = {name: stack.word(regs + at) for name, at in self._regs.items()}
                bp = frame.registers["bp"]
        frame.bp = bp

    def _is_redirected(self, ip: int, back: int) -> bool:
        """The return address of a trampoline's frame has been replaced: no call stands before it.

        What lies there is the end of another function.  The kernel looks that up, and calls the stack
        unreliable if it finds nothing, which is so where filling lies between the two functions.
        """
        machine = self._machine
        if ip not in self._callers and machine.kallsyms.module_of(ip) is not None:
            return False
        symbol = machine.kallsyms.at(back)
        return symbol is not None and symbol.address == back

    def _rows_of_entry(self) -> CallFrames:
        if self._entry_rows is None:
            vmlinux = self._machine.vmlinux
            self._entry_rows = _rows_of_entry(
                vmlinux.entry_code,
                vmlinux.entry.start,
                tuple(vmlinux.labels.values()),
                tuple(vmlinux.exits.items()),
            )
        return self._entry_rows

    def _row_of_trampoline(self, address: int) -> UnwindRow | None:
        """A trampoline's layout is that of the code it is a copy of (orc_ftrace_find())."""
        machine = self._machine
        for ops in machine.ftrace.each_ops():
            trampoline = ops.trampoline
            if trampoline and 0 <= address - trampoline < ops.trampoline_size:
                name = "ftrace_regs_caller" if ops.flags & FtraceOpsFl.SAVE_REGS else "ftrace_caller"
                return self.row_at(machine.symbol(name) + address - trampoline)
        return None


def _caller_sp(frame: _Frame, row: UnwindRow, stack: _Stack) -> int | None:
    match row.base:
        case FrameBase.SP:
            return frame.sp + row.offset
        case FrameBase.BP:
            return frame.bp + row.offset
        case FrameBase.SP_INDIRECT:
            return stack.word(frame.sp) + row.offset
        case FrameBase.BP_INDIRECT:
            return stack.word(frame.bp + row.offset)
        case FrameBase.UNDEFINED:
            return None
    # Other registers are known only while nothing was called since they were saved.
    value = frame.registers.get(row.base.value)
    return None if value is None else value + row.offset


# What follows is a function of bytes and of where they lie, and asked for again and again by those who put a
# machine back to a restore point.


@lru_cache(maxsize=4)
def _rows_of_entry(
    code: bytes, start: int, labels: tuple[int, ...], exits: tuple[tuple[int, str], ...]
) -> CallFrames:
    rows = frame_rows(code, start, labels)
    for address, name in exits:
        if name != "klpemu_return":
            rows[address + STUB_CALLS] = INTERRUPTED if name == INTERRUPT_STUB else CALLED_BY_EXPORT
    addresses = sorted(rows)
    # A return address minus one lies inside the call, which is why this is a table of ranges.
    return CallFrames(addresses, [rows[address] for address in addresses])


_orc_of_module = lru_cache(maxsize=TABLES_KEPT)(read_orc)
_eh_frame_of_module = lru_cache(maxsize=TABLES_KEPT)(read_eh_frame)


@lru_cache(maxsize=TABLES_KEPT)
def _frame_pointers_of(texts: tuple[tuple[int, bytes], ...], functions: tuple[int, ...]) -> CallFrames:
    return frame_pointer_rows(dict(texts), functions)


def _read_table(loaded: "LoadedObject") -> OrcTable | CallFrames | None:
    """What says how to unwind an object, relocated as it was loaded; None if that is damaged."""
    placement = loaded.placement
    found = {
        section.name: (bytes(placement.contents[section.index]), placement.addresses[section.index])
        for section in placement.image.sections
        if section.name in TABLES and section.index in placement.contents
    }
    try:
        if ".orc_unwind" in found and ".orc_unwind_ip" in found:
            ips, address = found[".orc_unwind_ip"]
            # A whole kernel's table is megabytes, and read once.
            read = read_orc if placement.is_linked else _orc_of_module
            return read(ips, found[".orc_unwind"][0], address)
        if ".eh_frame" in found:
            return _eh_frame_of_module(*found[".eh_frame"])
    except ElfError:
        return None
    return _read_frame_pointers(loaded)


def _read_frame_pointers(loaded: "LoadedObject") -> CallFrames:
    """The code of an object without any table.  A function's cold part is jumped to, not called."""
    placement = loaded.placement
    texts = tuple(
        (placement.addresses[section.index], bytes(placement.contents[section.index]))
        for section in placement.image.sections
        if section.is_exec and section.index in placement.contents
    )
    functions = tuple(
        value
        for symbol in placement.image.symbols
        if symbol.is_function and not COLD.search(symbol.name)
        if symbol.is_defined and (value := placement.value(symbol)) is not None
    )
    return _frame_pointers_of(texts, functions)
