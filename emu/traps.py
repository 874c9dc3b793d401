"""What happens when guest code leaves the guest: exports, breakpoints, WARNs, faults and returns."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from elf.errors import KlpemuError
from emu.assembly import disassemble
from emu.cpu import REGISTERS, Stop, StopKind
from emu.entry import exit_to_user_mode_loop
from emu.events import EventKind
from emu.fork import release_task, replace_stack
from emu.memory import PAGE_SIZE, MemoryFault
from emu.task import GuestCall, Service, Task

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["ARGUMENTS", "BreakpointHandler", "Export", "GuestFault", "GuestTraps"]

# An export answers for a guest function: it reads its arguments from the registers and returns RAX.
Export = Callable[["Machine", dict[str, int]], int | None]
# Gets the registers of the CPU that executed the int3, and a function that pushes on its stack.
BreakpointHandler = Callable[[dict[str, int], Callable[[int], None]], bool]

ARGUMENTS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")  # psABI 3.2.3, figure 3.4
UD2 = b"\x0f\x0b"
PAGE_FAULT = 14
CALLERS_SHOWN = 16


class GuestFault(KlpemuError):  # noqa: N818
    """Guest code could not go on.

    `registers`, `last` (the last instructions) and `stack` (callers, innermost first) say how it got there.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str,
        advice: str,
        registers: dict[str, int],
        last: list[str],
        address: int,
        stack: Sequence[str] = (),
    ) -> None:
        self.registers = registers
        self.last = last
        self.stack = stack
        self.address = address
        super().__init__(what, where=where, advice=advice)

    def report(self) -> str:
        """The one-line error, the registers, the callers, and the last instructions executed."""
        names = [*REGISTERS]
        rows = [names[index : index + 3] for index in range(0, len(names), 3)]
        registers = "\n".join(
            "  ".join(f"{name:>6} {self.registers[name]:016x}" for name in row) for row in rows
        )
        lines = [
            str(self),
            registers,
            "call trace:",
            *self.stack,
            f"last {len(self.last)} instructions:",
            *self.last,
        ]
        return "\n".join(lines)


class GuestTraps:
    """Answers the hub for one machine; see `emu.hub.Traps`."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self.exports: dict[str, Export] = {}
        self.breakpoint_handlers: list[BreakpointHandler] = [machine.poker.poke_int3_handler]
        self.warned: set[int] = set()

    def export_at(self, rip: int) -> Callable[[Task], Any] | None:
        name = self._machine.vmlinux.exits.get(rip)
        if name is None:
            return None
        return lambda task: self._serve(name, task)

    def is_return(self, rip: int) -> bool:
        return bool(self._machine.vmlinux.exits.get(rip) == "klpemu_return")

    def trapped(self, task: Task, address: int) -> None:
        self._machine.events.record(EventKind.TRAP, address, note=task.name)

    def breakpoint(self, task: Task, address: int) -> bool:
        registers = task.cpu.registers()

        def push(value: int) -> None:
            registers["rsp"] -= 8
            self._machine.space.write(registers["rsp"], value.to_bytes(8, "little"))

        for handler in self.breakpoint_handlers:
            if handler(registers, push):
                task.cpu.set_registers(registers)
                self._machine.events.record(EventKind.EMULATE, registers["rip"], note=task.name)
                return True
        return False

    def undefined(self, task: Task, address: int) -> bool:
        """WARN of guest code: log it and go on behind the `ud2`, as handle_bug() does."""
        machine = self._machine
        try:
            if machine.space.read(address, 2) != UD2:
                return False
            entry = machine.bugs.find_bug(address)
        except MemoryFault:
            return False
        if entry is not None and entry.is_warning:
            said = machine.bugs.report_bug(task, entry)
            machine.warnings += [said] if said else []
            task.cpu.set_registers({"rip": address + 2})
            return True
        if address not in machine.vmlinux.warn_sites:
            return False
        if address not in self.warned:
            self.warned.add(address)
            where = machine.kallsyms.describe(address)
            machine.log.pr_warn(f"WARNING: CPU: {task.cpu.number} PID: {machine.pid_of(task)} at {where}")
            machine.warnings.append(f"WARNING at {where}: {machine.vmlinux.warn_sites[address]}")
        task.cpu.set_registers({"rip": address + 2})
        return True

    def enter(self, task: Task, call: GuestCall) -> None:
        below = task.activities[-2] if len(task.activities) > 1 else None
        if isinstance(below, Service):
            frame = self._machine.frames.frame_of(task, below)
            if frame.frame_pointer:
                call.saved = task.cpu.registers()
            registers = self.frame(call, frame.stack, frame.returns_to, frame.frame_pointer)
        else:
            registers = self.frame(call, task.stack_base)
        task.cpu.set_registers(registers)

    def frame(
        self, call: GuestCall, stack: int, returns_to: int = 0, frame_pointer: int = 0
    ) -> dict[str, int]:
        """Build the stack frame of a call below `stack`; returns the registers to enter it with.

        psABI 3.2.2: at the first instruction RSP + 8 is a multiple of 16: the seventh argument.
        """
        rest = call.arguments[len(ARGUMENTS) :]
        rsp = ((stack - 8 * len(rest)) & ~15) - 8
        words = (returns_to or self._machine.return_address, *rest)
        data = b"".join((word & 0xFFFF_FFFF_FFFF_FFFF).to_bytes(8, "little") for word in words)
        self._machine.space.write(rsp, data)
        registers = dict.fromkeys(REGISTERS, 0) | {"eflags": 2, "rsp": rsp, "rip": call.entry}
        registers |= {"rbp": frame_pointer} | dict(zip(ARGUMENTS, call.arguments, strict=False))
        return registers | call.registers

    def exit_to_user_mode(self, task: Task) -> None:
        exit_to_user_mode_loop(self._machine, task)

    def exited(self, task: Task) -> None:
        release_task(self._machine, task)

    def abandoned(self, task: Task) -> None:
        replace_stack(self._machine, task)

    def entering(self, task: Task, instructions: int) -> None:
        self._machine.recorder.checkpoint(task.cpu, instructions)

    def fault(self, task: Task, call: GuestCall, stop: Stop) -> KlpemuError:
        machine, cpu = self._machine, task.cpu
        registers = cpu.registers()
        last = machine.recorder.last_instructions(task.cpu, stop)
        describe = machine.kallsyms.describe
        where = describe(stop.rip)
        if where == f"{stop.rip:#x}" and last:
            where = f"{where}, reached from {describe(last[-1])}"
        return GuestFault(
            self._explain(stop),
            where=where,
            advice=f"called was {describe(call.entry)}",
            registers=registers,
            last=[self._show(address) for address in last],
            address=stop.rip,
            stack=self._callers(registers),
        )

    def _callers(self, registers: dict[str, int]) -> list[str]:
        """The stack as far as it can be walked reliably; after a jump to nowhere, from the caller on."""
        machine = self._machine
        if machine.kallsyms.at(registers["rip"]) is None:
            try:
                back = int.from_bytes(machine.space.read(registers["rsp"], 8), "little")
            except MemoryFault:
                return ["  (the stack is not readable)"]
            registers = registers | {"rip": back, "rsp": registers["rsp"] + 8}
        trace = machine.unwinder.walk(registers)
        lines = [f"  {machine.kallsyms.describe(address)}" for address in trace.entries[:CALLERS_SHOWN]]
        if len(trace.entries) > CALLERS_SHOWN:
            return [*lines, f"  ... and {len(trace.entries) - CALLERS_SHOWN} more"]
        return [*lines, f"  ({trace.unreliable})"] if trace.unreliable else lines

    def _serve(self, name: str, task: Task) -> int:
        export = self.exports.get(name)
        if export is None:
            raise KlpemuError(
                f"guest code called {name}, which exists but cannot run here",
                where=self._machine.caller(),
            )
        return export(self._machine, task.cpu.registers()) or 0

    def _explain(self, stop: Stop) -> str:
        match stop.kind:
            case StopKind.BUDGET:
                return (
                    f"the guest did not return within {self._machine.hub.instruction_budget:,} instructions"
                )
            case StopKind.BREAKPOINT:
                return "an int3 that no breakpoint handler claims"
            case StopKind.UNDEFINED:
                return "undefined instruction"
        if stop.vector != PAGE_FAULT:
            return {8: "double fault", 13: "general protection fault"}.get(
                stop.vector, f"exception {stop.vector}"
            )
        access = self._machine.space.access(stop.address)
        if stop.address == stop.rip and access is None:
            return f"jump to unmapped address {stop.address:#x}"
        if stop.address == stop.rip:
            return f"jump to {stop.address:#x}, which is no text"
        if access is None:
            return f"access to unmapped address {stop.address:#x}"
        return (
            f"write to read-only address {stop.address:#x} ({self._machine.kallsyms.describe(stop.address)})"
        )

    def _show(self, address: int) -> str:
        try:
            # The last instruction of a page may be followed by a page that is not there.
            code = self._machine.space.read(address, min(15, PAGE_SIZE - address % PAGE_SIZE))
        except MemoryFault:
            return f"  {address:#018x} (unmapped)"
        instruction = next(iter(disassemble(code, address)))
        return f"  {address:#018x} {self._machine.kallsyms.describe(address):40} {instruction}"
