"""Executing one stream of instructions and keeping its addresses: for traces and for checks.

`trace_call` runs a whole call for real.  `execute_stream` runs from an address until another one is reached
and no further, on a stack of its own, with every register holding a known value; the caller puts memory back
afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emu.cpu import REGISTERS, Stop, StopKind
from emu.memory import read_u64

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["Stream", "execute_stream", "trace_call", "undone"]

STREAM_LIMIT = 20_000
TRACE_BUDGET = 1_000_000
EFLAGS_ARITHMETIC = 0x8D5  # CF, PF, AF, ZF, SF, OF: SDM Vol. 1, 3.4.3.1
STACK_WORDS = 32


@dataclass(frozen=True, slots=True)
class Stream:
    """Executed addresses in order, the registers before and after, and the stack around the call."""

    addresses: tuple[int, ...]
    before: dict[str, int]
    after: dict[str, int]
    vectors_before: bytes
    vectors_after: bytes
    stack_before: bytes
    stack_after: bytes
    reached: bool
    stop: Stop


def execute_stream(
    machine: "Machine", entry: int, stop_at: int, patch_state: int | None = None, limit: int = STREAM_LIMIT
) -> Stream:
    """Execute from `entry` as if it had just been called, until RIP is `stop_at`.

    With a `patch_state`, as a task that has this one.
    """
    cpu = machine.tracer
    cpu.reset()
    cpu.set_gs_base(machine.cpus[0].gs_base)
    if patch_state is not None:
        current = read_u64(machine.space, cpu.gs_base + machine.vmlinux.symbols["current_task"])
        at = current + machine.layouts.offsetof("task_struct", "patch_state")
        kept = machine.space.read(at, 4)
        machine.space.write(at, patch_state.to_bytes(4, "little", signed=True))
    before = {name: 0x0101_0101_0101_0101 * (index + 1) for index, name in enumerate(REGISTERS)}
    rsp = machine.stream_stack - 8 * STACK_WORDS - 8
    before |= {"rip": entry, "rsp": rsp, "eflags": 2 | EFLAGS_ARITHMETIC}
    stack = machine.return_address.to_bytes(8, "little") + b"".join(
        (0x5AFE_0000_0000_0000 + word).to_bytes(8, "little") for word in range(STACK_WORDS)
    )
    machine.space.write(rsp, stack)
    vectors = bytes(range(256))
    cpu.set_registers(before)
    cpu.set_vectors(vectors)
    cpu.executed.clear()
    cpu.stop_at = stop_at
    stop = cpu.run(limit)
    cpu.stop_at = None
    if patch_state is not None:
        machine.space.write(at, kept)
    after = cpu.registers()
    reached = stop.kind is StopKind.BUDGET and after["rip"] == stop_at
    addresses = tuple(cpu.executed)
    cpu.executed.clear()
    return Stream(
        addresses,
        before,
        after,
        vectors,
        cpu.vectors(),
        stack,
        machine.space.read(rsp, len(stack)),
        reached,
        stop,
    )


@contextmanager
def undone(machine: "Machine") -> Iterator[None]:
    """Put all writable memory back when the block ends: what was executed in it leaves no trace."""
    arena = machine.space.arena
    checkpoint = arena.checkpoint()
    try:
        yield
    finally:
        arena.restore(checkpoint)


@contextmanager
def traced(machine: "Machine") -> Iterator[list[int]]:
    """Let the first task run on the tracing vCPU; yields the list that executed addresses are appended to.

    Every address is kept, so the instruction budget is TRACE_BUDGET at most.
    """
    task, tracer, hub = machine.init_task, machine.tracer, machine.hub
    cpu, budget = task.cpu, hub.instruction_budget
    tracer.set_gs_base(cpu.gs_base)
    tracer.executed.clear()
    tracer.stop_at = None
    task.cpu = tracer
    hub.instruction_budget = min(budget, TRACE_BUDGET)
    try:
        yield tracer.executed
    finally:
        task.cpu = cpu
        hub.instruction_budget = budget
        tracer.executed = []


def trace_call(machine: "Machine", entry: int, *arguments: int) -> tuple[int, list[int]]:
    """Call guest code and return RAX and the address of every instruction executed."""
    with traced(machine) as executed:
        result = machine.call(entry, *arguments)
    return result, [address for address in executed if address != machine.return_address]
