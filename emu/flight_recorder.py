"""The last instructions before something went wrong.

Recording every executed address all the time would cost thirty times what execution costs.  Instead the writable
memory and the registers are copied when guest code is entered, and if it ends in a fault, that run is repeated on
the tracing vCPU, which records.  The machine is deterministic, so the repetition goes the same way to the end.
"""

from typing import Any

from emu.cpu import Stop, StopKind, VCpu

__all__ = ["LAST_INSTRUCTIONS", "FlightRecorder"]

LAST_INSTRUCTIONS = 16
REPLAY_LIMIT = 5_000_000


class FlightRecorder:
    """Keeps the newest checkpoint of one machine."""

    def __init__(self, machine: Any) -> None:
        self._machine = machine
        self.enabled = True
        self._memory = b""
        self._registers: dict[str, int] = {}
        self._vectors = bytes(256)

    def checkpoint(self, cpu: VCpu) -> None:
        """Remember memory and registers, as guest code is about to run on `cpu`."""
        if self.enabled:
            self._memory = self._machine.space.arena.checkpoint()
            self._registers = cpu.registers()
            self._vectors = cpu.vectors()

    def last_instructions(self, cpu: VCpu, stop: Stop) -> list[int]:
        """Addresses of the last instructions that `cpu` executed before `stop`, oldest first.

        For a spent budget these are simply the next ones.  Leaves memory and registers as they are at the stop.
        """
        if stop.kind is StopKind.BUDGET:
            return self._step(cpu)
        if not self.enabled or cpu is self._machine.tracer:
            return cpu.executed[-LAST_INSTRUCTIONS:]
        arena, tracer = self._machine.space.arena, self._machine.tracer
        now = arena.checkpoint()
        arena.restore(self._memory)
        tracer.set_gs_base(cpu.gs_base)
        tracer.set_registers(self._registers)
        tracer.set_vectors(self._vectors)
        tracer.executed.clear()
        tracer.stop_at = None
        tracer.run(REPLAY_LIMIT)
        arena.restore(now)
        last: list[int] = tracer.executed[-LAST_INSTRUCTIONS:]
        tracer.executed.clear()
        return last

    def _step(self, cpu: VCpu) -> list[int]:
        last = []
        for _ in range(LAST_INSTRUCTIONS):
            last.append(cpu.registers()["rip"])
            if cpu.run(1).kind is not StopKind.BUDGET:
                break
        return last
