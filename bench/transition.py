"""A transition of many tasks and many functions: how many tasks it switches a second, and how that grows.

Half of the tasks are kernel threads and half user tasks, on two vCPUs, and all sleep three calls deep in code
that nobody patches.  What is timed is what a write to a patch's `enabled`, or its init function, sets going:
from the kernel's lock to the end of the transition, whichever attempt that takes.  The first attempt finds an
idle task current on the other vCPU, as it mostly does in a kernel, and so there is a second one.  Loading the
patch's code stays outside.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import truediv
from statistics import median
from time import process_time
from typing import Any
from unittest.mock import patch

from bench.many import patch_of
from bench.measure import Result
from klpemu.fixtures import fixture
from klpemu.kernel import Kernel
from patches import core, transition

__all__ = ["run"]

# How often a size is measured in a round, of which the round keeps the median; from the smallest up.
TASKS, FUNCTIONS = {100: 7, 1_000: 3, 10_000: 1}, {10: 3, 100: 3, 1_000: 1}
BESIDE_FUNCTIONS, BESIDE_TASKS = 10, 1_000  # the one that stays the same while the other grows
STATED = (1_000, 100)
ROUNDS = 3
DEPTH, FOREVER = 2, (1 << 31) - 1  # milliseconds
FLAT = 1.3


@dataclass(frozen=True, slots=True)
class Taken:
    """CPU seconds: of the first attempt (the stack checks), and of all from enabling to completion."""

    attempt: float
    whole: float


def run() -> Iterator[Result]:
    """Tasks per second, and what a task and a function cost at each size."""
    kernels = {count: _kernel_with(count) for count in TASKS}
    sizes = {(tasks, BESIDE_FUNCTIONS): times for tasks, times in TASKS.items()}
    sizes |= {(BESIDE_TASKS, functions): times for functions, times in FUNCTIONS.items()}
    attempt: dict[tuple[int, int], list[float]] = {size: [] for size in sizes}
    whole: dict[tuple[int, int], list[float]] = {size: [] for size in sizes}
    for _ in range(ROUNDS):
        for (tasks, functions), times in sizes.items():
            taken = [_transition(kernels[tasks], functions) for _ in range(times)]
            attempt[tasks, functions].append(median(each.attempt for each in taken))
            whole[tasks, functions].append(median(each.whole for each in taken))

    tasks, functions = STATED
    of = f"{tasks:,} tasks, {functions:,} functions"
    yield Result("transition", f"the whole transition, {of}", tasks / median(whole[STATED]), "tasks/s")
    yield Result(
        "transition", f"one attempt with its stack checks, {of}", tasks / median(attempt[STATED]), "tasks/s"
    )
    yield from _per(
        "task",
        f"one attempt for each task, {BESIDE_FUNCTIONS} functions",
        {tasks: [each / tasks for each in attempt[tasks, BESIDE_FUNCTIONS]] for tasks in TASKS},
    )
    yield from _per(
        "task",
        f"each task beyond {min(TASKS)}, {BESIDE_FUNCTIONS} functions",
        _beyond_the_first({tasks: whole[tasks, BESIDE_FUNCTIONS] for tasks in TASKS}),
    )
    yield from _per(
        "function",
        f"each function beyond {min(FUNCTIONS)}, {BESIDE_TASKS:,} tasks",
        _beyond_the_first({functions: whole[BESIDE_TASKS, functions] for functions in FUNCTIONS}),
    )


def _beyond_the_first(seconds: Mapping[int, list[float]]) -> dict[int, list[float]]:
    """What each one costs that a size has more than the smallest: what any size costs is not in it."""
    least, *larger = seconds
    return {
        size: [(one - less) / (size - least) for one, less in zip(seconds[size], seconds[least], strict=True)]
        for size in larger
    }


def _per(unit: str, what: str, costs: Mapping[int, list[float]]) -> Iterator[Result]:
    """The cost at each size, and the dearest over the cheapest, both beside the first of their rounds."""
    for size, found in costs.items():
        yield Result("transition", f"{what}, {size:,} {unit}s", median(found) * 1e6, f"us a {unit}")
    first = next(iter(costs.values()))
    ratios = [median(map(truediv, found, first)) for found in costs.values()]
    yield Result("transition", f"{what}, dearest / cheapest size", max(ratios) / min(ratios), "times", FLAT)


def _kernel_with(tasks: int) -> Kernel:
    """A kernel on which so many tasks sleep."""
    kernel = Kernel.load(cpus=2)
    kernel.load_module(fixture("many.o"))
    for number in range(tasks):
        kernel.tasks.spawn(f"task {number}", [f"nap_below({DEPTH}, {FOREVER})"], kthread=number % 2 == 0)
    runqueues = kernel.machine.sched.runqueues
    kernel.machine.run(lambda: not any(rq.queue or rq.curr.running for rq in runqueues))
    return kernel


def _transition(kernel: Kernel, functions: int) -> Taken:
    """One transition to a patch of so many functions; afterwards the patch is removed again."""
    attempts: list[float] = []
    enabling: list[float] = []
    gc.collect()
    gc.disable()
    with (
        _timed(core, "klp_enable_patch", enabling),
        _timed(transition, "klp_try_complete_transition", attempts),
    ):
        kernel.enable(patch_of(functions))
        start = process_time()
        kernel.machine.run(lambda: not kernel.in_transition)
        waiting = process_time() - start
    gc.enable()
    assert len(attempts) == 2, "the tasks were not all switched by the first attempts"
    kernel.disable(f"fix_{functions}")
    kernel.tasks.wait_for_transition()
    return Taken(attempts[0], enabling[0] + waiting)


@contextmanager
def _timed(owner: Any, name: str, seconds: list[float]) -> Iterator[None]:
    """Append the CPU seconds of each call of one function."""
    function: Callable[..., Any] = getattr(owner, name)

    def measured(*arguments: Any) -> Any:
        start = process_time()
        try:
            return function(*arguments)
        finally:
            seconds.append(process_time() - start)

    with patch.object(owner, name, measured):
        yield
