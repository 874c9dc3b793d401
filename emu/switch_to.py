"""What a task leaves on its stack, so that others can walk it while it does not run.

A service has no machine code of its own; what stands for it on the stack is the frame that its export's stub
would have made: the return address that the caller pushed, the saved rbp, rbp pointing at it.  Guest code
that the service calls returns into the stub.  A task that gives its vCPU up pushes a struct
inactive_task_frame below and stores its address in thread.sp, as __switch_to_asm does
(arch/x86/entry/entry_64.S); a task that is interrupted gets a struct pt_regs below its own frames first, as
the CPU and idtentry make it (SDM Vol. 3A, 6.14.2: RSP is aligned to 16 before the push).
"""

import struct
from typing import TYPE_CHECKING

from emu.memory import read_u64
from emu.task import GuestCall, Service, Task

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["INACTIVE_FRAME", "INTERRUPT_STUB", "StackFrames"]

# The stub whose frame is a whole pt_regs; its name is the entry of the interrupt that preempts.
INTERRUPT_STUB = "asm_sysvec_apic_timer_interrupt"
STUB_RETURN = 3  # offset in a stub of the `hlt` that what it calls returns to
KERNEL_CS, KERNEL_DS, USER_CS, USER_DS = 0x10, 0x18, 0x33, 0x2B  # arch/x86/include/asm/segment.h
USER_RIP, USER_RSP = 0x40_1000, 0x7FFF_FFFF_F000
CALLEE_SAVED = ("r15", "r14", "r13", "r12", "rbx")
PT_REGS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8"),
    *("rax", "rcx", "rdx", "rsi", "rdi"),
)
PT_REGS_SIZE = 21 * 8
INACTIVE_FRAME = struct.Struct("<7Q")


class StackFrames:
    """Builds the frames on the stacks of one machine's tasks."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self._space = machine.space
        self._sp = machine.layouts.offsetof("task_struct", "thread.sp")
        self._interrupted = machine.symbol(INTERRUPT_STUB) + STUB_RETURN

    def prepare(self, task: Task) -> None:
        """Put the pt_regs of the entry from user space on top of a new task's stack (task_pt_regs())."""
        task.stack_base = task.stack_top - PT_REGS_SIZE
        words = [0] * 21
        if not task.kthread and not task.idle:
            words[15:] = [0xFFFF_FFFF_FFFF_FFFF, USER_RIP, USER_CS, 0x202, USER_RSP, USER_DS]
        self._space.write(task.stack_base, struct.pack("<21Q", *words))
        self.rest(task)

    def rest(self, task: Task) -> None:
        """The task executes no kernel code: nothing is on its stack but where it will begin."""
        self._push_inactive(task, task.stack_base & ~15, 0, (0,) * 5, self._machine.return_address)

    def frame_of(self, task: Task, service: Service) -> Service:
        """Make the stack frame of a service, which is what the running task is doing."""
        if not service.returns_to:
            below = task.activities[: task.activities.index(service)]
            if any(isinstance(each, GuestCall) for each in below):
                registers = task.cpu.registers()
                service.frame_pointer = service.stack = registers["rsp"] - 8
                self._space.write(service.stack, registers["rbp"].to_bytes(8, "little"))
                service.returns_to = registers["rip"] - 1 + STUB_RETURN
            else:
                service.stack = task.stack_base
                service.returns_to = self._machine.return_address
        return service

    def allocate(self, task: Task, service: Service, size: int) -> int:
        """Address of `size` bytes of the service's frame; they are gone when it ends."""
        self.frame_of(task, service)
        service.stack = (service.stack - size) & ~15
        return service.stack

    def sleep(self, task: Task) -> None:
        """The task gives its vCPU up of its own accord, in a service."""
        service = task.top
        assert isinstance(service, Service)
        self.frame_of(task, service)
        saved: tuple[int, ...] = (0,) * 5
        if service.frame_pointer:
            registers = task.cpu.registers()
            saved = tuple(registers[name] for name in CALLEE_SAVED)
        self._push_inactive(task, service.stack & ~15, service.frame_pointer, saved, service.returns_to)

    def interrupt(self, task: Task, registers: dict[str, int]) -> None:
        """The task is taken off its vCPU between two instructions of guest code."""
        values = [registers[name] for name in PT_REGS]
        values += [0xFFFF_FFFF_FFFF_FFFF, registers["rip"], KERNEL_CS]
        values += [registers["eflags"], registers["rsp"], KERNEL_DS]
        regs = (registers["rsp"] & ~15) - PT_REGS_SIZE
        self._space.write(regs, struct.pack("<21Q", *values))
        self._push_inactive(task, regs, 0, (0,) * 5, self._interrupted)

    def resumed(self, task: Task) -> dict[str, int]:
        """The registers with which a task goes on that has run guest code: from its stack, not from memory of
        ours, as far as they are kept there.
        """
        assert task.context is not None
        registers = task.context.registers
        sp = read_u64(self._space, task.struct + self._sp)
        if task.preempted:
            regs = sp + INACTIVE_FRAME.size
            words = struct.unpack("<21Q", self._space.read(regs, PT_REGS_SIZE))
            found = dict(zip(PT_REGS, words, strict=False))
            return registers | found | {"rip": words[16], "eflags": words[18], "rsp": words[19]}
        words = INACTIVE_FRAME.unpack(self._space.read(sp, INACTIVE_FRAME.size))
        bp = words[5]
        return registers | dict(zip(CALLEE_SAVED, words, strict=False)) | {"rbp": read_u64(self._space, bp)}

    def _push_inactive(
        self, task: Task, below: int, bp: int, saved: tuple[int, ...], returns_to: int
    ) -> None:
        sp = below - INACTIVE_FRAME.size
        self._space.write(sp, INACTIVE_FRAME.pack(*saved, bp, returns_to))
        self._space.write(task.struct + self._sp, sp.to_bytes(8, "little"))
