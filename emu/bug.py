"""WARN and BUG: what the kernel makes of a `ud2` that its __bug_table knows (lib/bug.c, handle_bug()).

A warning is logged as a block with file, line and the callers, and execution goes on behind the `ud2`.  BUG
ends what the task was doing.
"""

from typing import TYPE_CHECKING

from elf.bug_table import BUG_ENTRY_BYTES, BUGFLAG_DONE, BugEntry, read_bug_table
from emu.memory import read_string
from emu.task import Task

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["Bugs"]

SECTION = "__bug_table"
CUT_HERE = "------------[ cut here ]------------"
END_TRACE = "---[ end trace 0000000000000000 ]---"
CALLERS_SHOWN = 16


class Bugs:
    """The bug tables of vmlinux and of the modules that are loaded."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self._tables: dict[str, dict[int, BugEntry]] = {}

    def find_bug(self, address: int) -> BugEntry | None:
        """The entry of the `ud2` at a guest virtual address; None if no table has one."""
        module = self._machine.kallsyms.module_of(address)
        if module is None:
            return None
        if module not in self._tables:
            self._tables[module] = self._read(module)
        return self._tables[module].get(address)

    def forget(self, module: str) -> None:
        """A module of that name was unloaded (module_bug_cleanup())."""
        self._tables.pop(module, None)

    def report_bug(self, task: Task, entry: BugEntry) -> str:
        """Log a warning as the kernel does; returns one line about it, "" if it had warned once already."""
        machine, space = self._machine, self._machine.space
        flags = int.from_bytes(space.read(entry.flags_address, 2), "little")
        if entry.is_once and flags & BUGFLAG_DONE:
            return ""
        if entry.is_once:
            space.write(entry.flags_address, (flags | BUGFLAG_DONE).to_bytes(2, "little"))
        registers = task.cpu.registers()
        where = f"{self.file_of(entry)}:{entry.line}"
        place = machine.kallsyms.describe(entry.address)
        log = machine.log.pr_warn
        if entry.says_cut_here:
            log(CUT_HERE)
        log(f"WARNING: CPU: {task.cpu.number} PID: {machine.pid_of(task)} at {where} {place}")
        log(f"CPU: {task.cpu.number} PID: {machine.pid_of(task)} Comm: {task.name}")
        log(f"RIP: 0010:{place}")
        log(f"RSP: 0018:{registers['rsp']:016x} EFLAGS: {registers['eflags']:08x}")
        log("Call Trace:")
        log(" <TASK>")
        for address in machine.unwinder.walk(registers).entries[1:CALLERS_SHOWN]:
            log(f" {machine.kallsyms.describe(address)}")
        log(" </TASK>")
        log(END_TRACE)
        return f"WARNING at {where}: {place}"

    def file_of(self, entry: BugEntry) -> str:
        """The name of the source file that an entry is about."""
        return read_string(self._machine.space, entry.file)

    def _read(self, module: str) -> dict[int, BugEntry]:
        found: dict[int, BugEntry] = {}
        placement = self._machine.modules.objects[module].placement
        for section in placement.image.sections:
            if section.name == SECTION and section.index in placement.addresses:
                address = placement.addresses[section.index]
                size = section.size - section.size % BUG_ENTRY_BYTES
                for entry in read_bug_table(self._machine.space.read(address, size), address):
                    found.setdefault(entry.address, entry)
        return found
