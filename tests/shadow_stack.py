"""The truth about a stack: a shadow of it, kept from the calls and returns that were really executed."""

from collections.abc import Iterator

from emu.assembly import disassemble
from emu.machine import Machine
from emu.memory import read_u64
from emu.task import GuestCall

__all__ = ["execute_with_shadow"]


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
