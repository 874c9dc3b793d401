"""The last instructions before something went wrong.

Recording every executed address all the time would cost thirty times what execution costs.  Instead the
writable memory and the registers are copied when guest code is entered, and if it ends in a fault, that run
is repeated: in strides on the vCPU itself until the stride is found in which it ends, and that one on the
tracing vCPU, which records.  The machine is deterministic, so the repetition goes the same way to the end.

What is known begins where guest code was entered last: an export or a breakpoint cuts the record.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from emu.cpu import Stop, StopKind, VCpu

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["LAST_INSTRUCTIONS", "FlightRecorder"]

LAST_INSTRUCTIONS = 16
STRIDE = 100_000


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """A vCPU about to execute: all that the guest can change, and how many instructions it may execute."""

    memory: bytes
    registers: dict[str, int]
    vectors: bytes
    count: int


class FlightRecorder:
    """Keeps the newest checkpoint of one machine; without one (`enabled` is False) there is no record."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self.enabled = True
        self._entered: _Checkpoint | None = None

    def checkpoint(self, cpu: VCpu, count: int) -> None:
        """Remember memory and registers, as at most `count` instructions are about to run on `cpu`."""
        self._entered = self._take(cpu, count) if self.enabled else None

    def last_instructions(self, cpu: VCpu, stop: Stop) -> list[int]:
        """Addresses of the last instructions that `cpu` executed before `stop`, oldest first.

        The instruction that faulted is the last one.  Leaves memory and registers as they are at the stop.
        """
        tracer = self._machine.tracer
        if cpu is tracer:
            return cpu.executed[-LAST_INSTRUCTIONS:]
        if self._entered is None:
            return []
        now = self._take(cpu, 0)
        start = self._last_stride(cpu, self._entered)
        tracer.set_gs_base(cpu.gs_base)
        tracer.executed.clear()
        tracer.stop_at = None
        self._put(tracer, start)
        tracer.run(start.count)
        last = tracer.executed[-LAST_INSTRUCTIONS:]
        tracer.executed.clear()
        self._put(cpu, now)
        return last

    def _last_stride(self, cpu: VCpu, entered: _Checkpoint) -> _Checkpoint:
        """The checkpoint one to two strides before the end of the run that began at `entered`."""
        self._put(cpu, entered)
        before = here = entered
        while here.count > STRIDE and cpu.run(STRIDE).kind is StopKind.BUDGET:
            before, here = here, self._take(cpu, here.count - STRIDE)
        return before

    def _take(self, cpu: VCpu, count: int) -> _Checkpoint:
        return _Checkpoint(self._machine.space.arena.checkpoint(), cpu.registers(), cpu.vectors(), count)

    def _put(self, cpu: VCpu, checkpoint: _Checkpoint) -> None:
        self._machine.space.arena.restore(checkpoint.memory)
        cpu.set_registers(checkpoint.registers)
        cpu.set_vectors(checkpoint.vectors)
