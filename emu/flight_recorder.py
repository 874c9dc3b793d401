"""The last instructions before something went wrong.

Recording every executed address all the time would cost thirty times what execution costs.  Instead the
writable memory and the registers are copied when guest code is entered, and if it ends in a fault, that run
is repeated: in strides on the vCPU itself until the stride is found in which it ends, and that one on the
tracing vCPU, which records.  The machine is deterministic, so the repetition goes the same way to the end.

Of the kernel stacks only the one that the vCPU runs on is copied, or a thousand tasks would make every entry
a thousand times as dear.  Guest code that writes to another task's stack, and reads there what it wrote,
could go another way the second time; if it does not end as it did, there is no record.

An entry of one instruction needs no copy: where it begins is the record.

What is known begins where guest code was entered last: an export or a breakpoint cuts the record.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emu.cpu import Stop, StopKind, VCpu
from emu.fork import THREAD_SIZE

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["LAST_INSTRUCTIONS", "FlightRecorder"]

LAST_INSTRUCTIONS = 16
STRIDE = 100_000


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """A vCPU about to execute: what the guest can change, and how many instructions it may execute.

    `contents` begins with what lay in `spans`, physical addresses from the first to behind the last.
    """

    spans: list[tuple[int, int]]
    contents: mmap.mmap
    registers: dict[str, int]
    vectors: bytes
    count: int


class FlightRecorder:
    """Keeps the newest checkpoint of each vCPU; without one (`enabled` is False) there is no record."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self.enabled = True
        self._entered: dict[VCpu, _Checkpoint] = {}
        self._single: dict[VCpu, int] = {}  # how many entries of one instruction were made since

    def checkpoint(self, cpu: VCpu, count: int) -> None:
        """Remember memory and registers, as at most `count` instructions are about to run on `cpu`."""
        if count == 1:
            self._single[cpu] = self._single.get(cpu, 0) + 1
            return
        self._single[cpu] = 0
        if self.enabled:
            last = self._entered.get(cpu)
            self._entered[cpu] = self._take(cpu, count, None if last is None else last.contents)
        else:
            self._entered.pop(cpu, None)

    def last_instructions(self, cpu: VCpu, stop: Stop) -> list[int]:
        """Addresses of the last instructions that `cpu` executed before `stop`, oldest first.

        The instruction that faulted is the last one.  Leaves memory and registers as they are at the stop.
        """
        tracer = self._machine.tracer
        if cpu is tracer:
            return cpu.executed[-LAST_INSTRUCTIONS:]
        if self.enabled and (single := self._single.get(cpu)):
            return [*cpu.began_at][-single:]
        if cpu not in self._entered:
            return []
        everything = self._machine.space.arena.in_use()[0]
        now = self._copy([(0, everything.stop)], cpu, 0, None)
        start = self._last_stride(cpu, self._entered[cpu])
        tracer.set_gs_base(cpu.gs_base)
        tracer.executed.clear()
        tracer.stop_at = None
        self._put(tracer, start)
        tracer.run(start.count)
        last = tracer.executed[-LAST_INSTRUCTIONS:] if tracer.registers() == now.registers else []
        tracer.executed.clear()
        self._put(cpu, now)
        return last

    def _last_stride(self, cpu: VCpu, entered: _Checkpoint) -> _Checkpoint:
        """The checkpoint one to two strides before the end of the run that began at `entered`."""
        self._put(cpu, entered)
        before = here = entered
        while here.count > STRIDE and cpu.run(STRIDE).kind is StopKind.BUDGET:
            before, here = here, self._take(cpu, here.count - STRIDE, None)
        return before

    def _take(self, cpu: VCpu, count: int, room: mmap.mmap | None) -> _Checkpoint:
        return self._copy(list(self._spans(cpu.stack_pointer())), cpu, count, room)

    def _copy(
        self, spans: list[tuple[int, int]], cpu: VCpu, count: int, room: mmap.mmap | None
    ) -> _Checkpoint:
        """A checkpoint in `room` if that is large enough: memory that was just got from the host is slow."""
        size = sum(end - start for start, end in spans)
        if room is None or len(room) < size:
            # Whole pages, not a bytearray: where the copy begins 16 bytes further into a page than the
            # original, as malloc() would have it, some CPUs' `rep movsb` takes ten times as long.
            room = mmap.mmap(-1, 2 * size)
        source, target, at = memoryview(self._machine.space.arena.bytes), memoryview(room), 0
        for start, end in spans:
            target[at : at + end - start] = source[start:end]
            at += end - start
        return _Checkpoint(spans, room, cpu.registers(), cpu.vectors(), count)

    def _spans(self, rsp: int) -> Iterator[tuple[int, int]]:
        """The writable memory without the stacks, but with the one that `rsp` lies in: start and end."""
        stacks = self._machine.stacks
        at, end = 0, self._machine.space.arena.in_use()[0].stop
        for block in stacks.blocks:
            yield at, block.start
            at = block.stop
        yield at, end
        own = stacks.frame_of(rsp)
        if own is not None:
            yield own, own + THREAD_SIZE

    def _put(self, cpu: VCpu, checkpoint: _Checkpoint) -> None:
        target, source, at = self._machine.space.arena.bytes, memoryview(checkpoint.contents), 0
        for start, end in checkpoint.spans:
            target[start:end] = source[at : at + end - start]
            at += end - start
        cpu.set_registers(checkpoint.registers)
        cpu.set_vectors(checkpoint.vectors)
