"""The truth about a stack: a shadow of it, kept from the calls and returns that were really executed."""

from collections.abc import Iterator

from emu.assembly import disassemble
from emu.machine import Machine
from emu.memory import read_u64
from emu.switch_to import INTERRUPT_STUB, STUB_RETURN
from emu.task import GuestCall, Service, Task

__all__ = ["ShadowedTask", "execute_with_shadow"]


class ShadowedTask:
    """A task that executes one instruction at a time, and the calls of it that have not returned.

    `slots` are the stack addresses that the calls pushed to and what they pushed, outermost first, those of
    calls that kernel services make among them; `exports` are the stubs whose services are not done; `last` is
    the mnemonic executed last, or what was done instead of an instruction.
    """

    def __init__(self, machine: Machine, task: Task) -> None:
        self.machine = machine
        self.task = task
        self.slots: list[tuple[int, int]] = []
        self.exports: list[int] = []
        self.last = ""
        self._mnemonics: dict[bytes, str] = {}
        self._enter = machine.traps.enter
        # What the emulator itself pushes, before the first instruction of a call from outside.
        machine.traps.enter = self._entered

    def step(self) -> None:
        """One instruction, the emulation of a breakpoint, or a service up to where it stops."""
        hub, task = self.machine.hub, self.task
        self.machine.sched.switch_to(task)
        top = task.top
        if not isinstance(top, GuestCall):
            self.last = "service"
            hub.advance(task)
            return
        before = task.cpu.registers()
        if top.breakpoint is not None:
            self.last = "emulated"
            hub.advance(task)
            if task.cpu.registers()["rsp"] != before["rsp"]:
                self._pushed()
            return
        rip = before["rip"] if top.started else top.entry
        self.last = self._mnemonic(rip)
        hub.advance(task, 1)
        match self.last:
            case "call":
                self._pushed()
            case "ret":
                self.slots.pop()
                if self.exports and rip == self.exports[-1] + 1:  # the stub itself returns
                    self.exports.pop()
            case "hlt" if isinstance(task.top, Service):
                self.exports.append(rip)

    @property
    def returns(self) -> list[int]:
        """Where calls will return to, innermost first, as it now stands in their slots: a handler may have
        changed one.  Without the outermost, which returns to the emulator.
        """
        return [read_u64(self.machine.space, slot) for slot, _ in reversed(self.slots)][:-1]

    @property
    def redirected(self) -> bool:
        """Somebody has changed where a call returns to: what lies there has not made it."""
        return any(read_u64(self.machine.space, slot) != pushed for slot, pushed in self.slots)

    @property
    def frames(self) -> list[int]:
        """What a right walk finds now: from thread.sp if the task does not run, else from the registers."""
        rip = self.next_instruction
        if rip is None:
            return [self.exports[-1] + STUB_RETURN, *self.returns] if self.exports else []
        found = [] if rip == self.machine.return_address else [rip, *self.returns]
        if self.task.context is None:
            return found
        return [self.machine.symbol(INTERRUPT_STUB) + STUB_RETURN, *found]

    @property
    def next_instruction(self) -> int | None:
        """Where guest code goes on; None in a service."""
        if not isinstance(self.task.top, GuestCall):
            return None
        context = self.task.context
        return (self.task.cpu.registers() if context is None else context.registers)["rip"]

    def _entered(self, task: Task, call: GuestCall) -> None:
        self._enter(task, call)
        if task is self.task:
            self._pushed()

    def _pushed(self) -> None:
        slot = self.task.cpu.registers()["rsp"]
        self.slots.append((slot, read_u64(self.machine.space, slot)))

    def _mnemonic(self, rip: int) -> str:
        code = self.machine.space.read(rip, min(15, 4096 - rip % 4096))
        found = self._mnemonics.get(code)
        if found is None:
            found = self._mnemonics[code] = next(disassemble(code, rip)).mnemonic
        return found


def execute_with_shadow(
    machine: Machine, entry: int, *arguments: int
) -> Iterator[tuple[dict[str, int], list[int]]]:
    """Call guest code one instruction at a time.

    Before each, yields the registers and what a right unwinder must find: the interrupted address, then the
    return addresses, innermost first.  They are read from the slots that calls pushed to, since a handler
    may have changed one.
    """
    cpu = machine.tracer
    cpu.set_gs_base(machine.cpus[0].gs_base)
    cpu.stop_at = None
    call = GuestCall(entry=entry, arguments=arguments)
    cpu.set_registers(machine.traps.frame(call, machine.init_task.stack_top))
    slots = [cpu.registers()["rsp"]]
    while True:
        registers = cpu.registers()
        returns = [read_u64(machine.space, slot) for slot in reversed(slots)]
        yield registers, [registers["rip"], *returns[:-1]]
        code = machine.space.read(registers["rip"], 15)
        mnemonic = next(disassemble(code, registers["rip"])).mnemonic
        cpu.run(1)
        cpu.executed.clear()
        if mnemonic == "call":
            slots.append(cpu.registers()["rsp"])
        elif mnemonic == "ret":
            # Only a return through the newest slot leaves its frame; a return thunk's jump does not push.
            slots.pop()
            if not slots:
                return
