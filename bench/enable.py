"""Enabling and disabling a patch of n functions: time per function, and how it grows.

What is timed is what klp_enable_patch(), or a write of 0 to sysfs `enabled`, does: from the kernel's lock to
the end of the transition.  Loading the patch's code, the same ten thousand functions each time, stays
outside.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import truediv
from statistics import median
from time import process_time
from typing import Any

from bench.many import kernel_with_many, patch_of
from bench.measure import Result
from klpemu.kernel import Kernel
from patches import core

__all__ = ["run"]

# How often a size is measured in a round, of which the round keeps the median.
COUNTS = {10: 9, 100: 5, 1_000: 3, 10_000: 1}
BESIDE = 100
ROUNDS = 3
FLAT = 1.3


def run() -> Iterator[Result]:
    """Microseconds per function at each size, and the largest median over the smallest."""
    kernel = kernel_with_many()
    seconds: dict[str, dict[int, list[float]]] = {
        verb: {count: [] for count in COUNTS} for verb in ("enable", "disable")
    }
    for _ in range(ROUNDS):
        for count, times in COUNTS.items():
            pairs = [_enable_and_disable(kernel, count) for _ in range(times)]
            for verb, taken in zip(seconds, zip(*pairs, strict=True), strict=True):
                seconds[verb][count].append(median(taken) / count)
    for verb, by_count in seconds.items():
        for count, found in by_count.items():
            yield Result(
                "enable", f"{verb} a patch of {count:,} functions", median(found) * 1e6, "us a function"
            )
        growth = max(median(map(truediv, found, by_count[BESIDE])) for found in by_count.values())
        yield Result(
            "enable",
            f"{verb}, the slowest size / {BESIDE:,} functions",
            growth,
            "times",
            FLAT if verb == "enable" else None,
        )


def _enable_and_disable(kernel: Kernel, count: int) -> tuple[float, float]:
    """CPU seconds of the one and of the other."""
    patch = patch_of(count)
    with _timed(core, "klp_enable_patch") as enabling:
        kernel.enable(patch)
    with _timed(core, "enabled_store") as disabling:
        kernel.disable(patch)
    return enabling[0], disabling[0]


@contextmanager
def _timed(module: Any, name: str) -> Iterator[list[float]]:
    """Time the calls of one function, the garbage collector kept out."""
    function: Callable[..., Any] = getattr(module, name)
    seconds: list[float] = []

    def measured(*arguments: Any) -> Any:
        gc.collect()
        gc.disable()
        start = process_time()
        try:
            return function(*arguments)
        finally:
            seconds.append(process_time() - start)
            gc.enable()

    setattr(module, name, measured)
    try:
        yield seconds
    finally:
        setattr(module, name, function)
