"""Executing one stream of instructions and keeping its addresses: for traces and for checks.

`trace_call` runs a whole call for real.  `execute_stream` runs from an address until another one is reached
and no further, on a stack of its own, with every register holding a known value; the caller puts memory back
afterwards.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emu.cpu import REGISTERS, Stop, StopKind

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["Stream", "execute_and_undo", "execute_stream", "trace_call", "undone"]

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
    loads: tuple[tuple[int, int], ...] = ()  # physical address and size, of what it had not stored itself
    stores: tuple[tuple[int, bytes], ...] = ()  # physical address, and what was there before


def execute_stream(
    machine: "Machine", entry: int, stop_at: int, patch_state: int | None = None, limit: int = STREAM_LIMIT
) -> Stream:
    """Execute from `entry` as if it had just been called, until RIP is `stop_at`.

    With a `patch_state`, as if the machine's first task, on whose behalf it is, had this one.
    """
    cpu = machine.tracer
    cpu.reset()
    cpu.set_gs_base(machine.cpus[0].gs_base)
    prepared = [
        _Word(machine, cpu.gs_base + machine.vmlinux.symbols["current_task"], 8, machine.init_task.struct)
    ]
    if patch_state is not None:
        at = machine.init_task.struct + machine.layouts.offsetof("task_struct", "patch_state")
        prepared.append(_Word(machine, at, 4, patch_state))
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
    cpu.accesses = []
    try:
        stop = cpu.run(limit)
    finally:
        cpu.stop_at = None
        accesses, cpu.accesses = tuple(cpu.accesses), None
    for word in prepared:
        word.put_back()
    loads, stores = _apart(accesses, {(word.place, word.size) for word in prepared})
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
        loads,
        stores,
    )


class _Word:
    """A word of memory with another value for a while; `place` is its physical address."""

    def __init__(self, machine: "Machine", address: int, size: int, value: int) -> None:
        self._space, self._address, self.size = machine.space, address, size
        self.place = machine.space.physical(address)
        self._kept = machine.space.read(address, size)
        machine.space.write(address, (value % (1 << 8 * size)).to_bytes(size, "little"))

    def put_back(self) -> None:
        self._space.write(self._address, self._kept)


def _apart(
    accesses: Iterable[tuple[bool, int, bytes]], own: set[tuple[int, int]]
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, bytes], ...]]:
    """What was loaded and is not the stream's `own`, and what was stored."""
    loads: dict[tuple[int, int], None] = {}
    stores: list[tuple[int, bytes]] = []
    for is_store, at, before in accesses:
        place = at, len(before)
        if is_store:
            own.add(place)
            stores.append((at, before))
        elif place not in own:
            loads[place] = None
    return tuple(loads), tuple(stores)


def execute_and_undo(
    machine: "Machine", entry: int, stop_at: int, patch_state: int | None = None, limit: int = STREAM_LIMIT
) -> Stream:
    """Execute a stream, and put back what it has stored: it leaves no trace in memory."""
    rsp, size = machine.stream_stack - 8 * STACK_WORDS - 8, 8 * STACK_WORDS + 8
    stack, memory = machine.space.read(rsp, size), machine.space.arena.bytes
    stream = execute_stream(machine, entry, stop_at, patch_state, limit)
    for at, before in reversed(stream.stores):
        memory[at : at + len(before)] = before
    machine.space.write(rsp, stack)
    return stream


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
