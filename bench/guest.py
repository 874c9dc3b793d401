"""Guest code of the benchmarks' own: a place for it, a driver that calls functions in turn, a timed run."""

import time
from collections.abc import Sequence

from elf.errors import KlpemuError
from emu.cpu import StopKind, VCpu
from emu.machine import Machine
from emu.paging import Access
from emu.text_poke import CALL_OPCODE, text_gen_insn

__all__ = ["driver", "place", "seconds_of"]

UNLIMITED = 1 << 40


def place(machine: Machine, size: int, tag: str) -> int:
    """Address of `size` executable bytes in the module space, which the caller still writes."""
    address = machine.area.module_alloc(size, tag)
    machine.space.protect(address, machine.area.live[address][0], Access.EXECUTE)
    return address


def driver(machine: Machine, targets: Sequence[int], rounds: int) -> int:
    """Address of a function that calls all `targets` in turn, `rounds` times."""
    head = bytes.fromhex("53bb") + rounds.to_bytes(4, "little")  # push rbx; mov ebx, rounds
    address = place(machine, len(head) + 5 * len(targets) + 10, "bench driver")
    code = bytearray(head)
    for target in targets:
        code += text_gen_insn(CALL_OPCODE, address + len(code), target)
    code += bytes.fromhex("ffcb0f85")  # dec ebx; jnz to the first call
    code += (len(head) - (len(code) + 4)).to_bytes(4, "little", signed=True)
    code += bytes.fromhex("5bc3")  # pop rbx; ret
    machine.space.write(address, bytes(code))
    return address


def seconds_of(machine: Machine, cpu: VCpu, entry: int) -> float:
    """CPU seconds of one entry into the guest, which calls `entry` and leaves when it returns."""
    rsp = machine.init_task.stack_top - 8
    machine.space.write(rsp, machine.return_address.to_bytes(8, "little"))
    cpu.set_registers({"rip": entry, "rsp": rsp, "rdi": 1, "eflags": 2})
    start = time.process_time()
    stop = cpu.run(UNLIMITED)
    seconds = time.process_time() - start
    if stop.kind is not StopKind.BUDGET or not machine.traps.is_return(stop.rip):
        raise KlpemuError(f"the benchmark's guest code ended with {stop}")
    return seconds
