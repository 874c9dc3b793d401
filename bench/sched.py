"""What the scheduler costs, operation by operation, beside Unicorn's own single step.

Unicorn's own step is `emu_start` with a count of one, and the read of RIP that the next one needs.  Ours is
the same instruction of the same code, entered by the hub: with two vCPUs, full preemption and a seeded
schedule, so that after each instruction anybody may be next.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import unicorn.x86_const as x86

from bench.measure import Result, Rounds, interleave
from emu import schedules
from emu.cpu import VCpu
from emu.schedules import RoundRobin, Seeded
from emu.task import Task
from emu.unwind import StackTrace
from klpemu import stock_kernel
from klpemu.kernel import Kernel

__all__ = ["run"]

STEPS = 2_000  # of a side in a round
ROUNDS = 25
SEED = 20231
DEPTH = 5  # nap_below() calls itself so often: with nap() two frames more
FOREVER = 1 << 40
OF_SINGLE_STEP = 2.0
# A stock module's function that calls others, and how many instructions in its stack is the deepest.
ORC_MODULE, ORC_FUNCTION = "libcurve25519-generic", "curve25519_generic"
ORC_INSTRUCTIONS = 3_000


class Alternating(Seeded):
    """One instruction each, and then another task than before."""

    _last: Task | None = None

    def pick(self, tasks: Sequence[Task], finishing: Task) -> tuple[Task, int | None]:
        self._last = next((task for task in tasks if task is not self._last), tasks[0])
        return self._last, 1


def run() -> Iterator[Result]:
    """Medians, and ratios to Unicorn's single step of the same round."""
    sides: dict[str, Callable[[], float]] = {
        "unicorn": _unicorn(),
        "step": _preempted(Seeded(SEED), cpus=2),
        "involuntary": _preempted(Alternating(SEED), cpus=1),
        "voluntary": _yielding(),
    }
    frames = {}
    for name, walk in _walks().items():
        sides[name] = functools.partial(_per_operation, walk, STEPS // 10)
        frames[name] = len(walk().entries)
    with patch.object(schedules, "MAX_STRIDE", 1):
        interleave(sides, 2)  # translates everything
        rounds = interleave(sides, ROUNDS)
    yield _result("Unicorn's own single step (emu_start, count=1)", rounds, "unicorn")
    yield _result("one instruction, and who is next (2 vCPUs, full preemption)", rounds, "step")
    yield _ratio("that / Unicorn's own single step", rounds, "step", OF_SINGLE_STEP)
    yield _result("the same with a switch to another task (involuntary)", rounds, "involuntary")
    yield _ratio("that / Unicorn's own single step", rounds, "involuntary")
    yield _result("a round of guest code that ends in schedule() (voluntary)", rounds, "voluntary")
    yield _ratio("that / Unicorn's own single step", rounds, "voluntary")
    for name, count in frames.items():
        yield _result(f"walk a stack of {count} frames ({name})", rounds, name)
        yield _ratio("one frame of it / Unicorn's own single step", rounds, name, per=count)


def _result(what: str, rounds: Rounds, side: str) -> Result:
    return Result("sched", what, rounds.median(side) * 1e6, "us")


def _ratio(what: str, rounds: Rounds, side: str, goal: float | None = None, per: int = 1) -> Result:
    return Result("sched", what, rounds.ratio(side, "unicorn") / per, "times", goal)


def _per_operation(operation: Callable[[], Any], times: int) -> float:
    start = time.process_time()
    for _ in range(times):
        operation()
    return (time.process_time() - start) / times


def _unicorn() -> Callable[[], float]:
    """Single steps of `crunch`, on a vCPU of its own."""
    kernel = Kernel.load()
    machine = kernel.machine
    cpu = VCpu(machine.space, 0, machine.cpus[0].gs_base)
    rsp = machine.init_task.stack_base - 8
    machine.space.write(rsp, machine.return_address.to_bytes(8, "little"))
    cpu.set_registers({"rip": kernel.address_of("crunch"), "rsp": rsp, "rdi": FOREVER, "eflags": 2})
    uc = cpu._uc

    def step() -> None:
        uc.emu_start(uc.reg_read(x86.UC_X86_REG_RIP), 0, count=1)

    return functools.partial(_per_operation, step, STEPS)


def _preempted(schedule: Seeded, cpus: int) -> Callable[[], float]:
    """Steps of two tasks that compute, any of which may be taken off its vCPU anywhere."""
    kernel = Kernel.load(cpus=cpus)
    machine = kernel.machine
    for number in range(2):
        kernel.tasks.spawn(f"task {number}", [f"crunch({FOREVER})"], kthread=True, cpu=number % cpus)
    machine.hub.schedule = schedule
    machine.sched.full_preemption = True

    def seconds() -> float:
        enough = functools.partial(next, iter([False] * STEPS), True)
        start = time.process_time()
        machine.run(enough)
        return (time.process_time() - start) / STEPS

    return seconds


def _yielding() -> Callable[[], float]:
    """Two tasks on one vCPU that give it to each other."""
    kernel = Kernel.load()
    machine = kernel.machine
    for number in range(2):
        kernel.tasks.spawn(f"task {number}", [f"work({FOREVER})"], kthread=True)
    machine.hub.schedule = RoundRobin()
    rq = machine.sched.runqueues[0]

    def seconds() -> float:
        before = rq.nr_switches
        start = time.process_time()
        machine.run(lambda: rq.nr_switches >= before + STEPS // 4)
        return (time.process_time() - start) / (rq.nr_switches - before)

    return seconds


def _walks() -> dict[str, Callable[[], StackTrace]]:
    """Walks by each kind of table; ORC only where the stock kernel is."""
    kernel = Kernel.load()
    task = kernel.tasks.spawn("sleeper", [f"nap_below({DEPTH}, {1 << 30})"], kthread=True)
    kernel.tasks.run(100)
    walk = functools.partial(kernel.machine.unwinder.walk_task, task.struct)
    walks: dict[str, Callable[[], StackTrace]] = {".eh_frame": walk}
    stock = stock_kernel.find()
    if stock is not None:
        walks["ORC"] = _walk_in_stock_module(stock)
    return walks


def _walk_in_stock_module(stock: stock_kernel.StockKernel) -> Callable[[], StackTrace]:
    """The deepest stack that a stock module's function has within its first instructions."""
    kernel = Kernel.load()
    kernel.load_module(stock.module(ORC_MODULE))
    machine = kernel.machine
    room = machine.slab.kzalloc(4096, "bench: arguments")
    call = f"{ORC_FUNCTION}({room}, {room + 64}, {room + 128})"
    task = kernel.tasks.spawn("computes", [call], kthread=True)
    deepest, memory, depth = task.cpu.registers(), machine.space.arena.checkpoint(), 0
    for _ in range(ORC_INSTRUCTIONS):
        machine.hub.advance(task, 1)
        registers = task.cpu.registers()
        entries = machine.unwinder.walk(registers).entries
        if len(entries) > depth:
            deepest, memory, depth = registers, machine.space.arena.checkpoint(), len(entries)
    machine.space.arena.restore(memory)
    return functools.partial(machine.unwinder.walk, deepest)
