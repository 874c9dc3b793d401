"""The small costs that everything else is made of: starting, entering the guest, one call, one check."""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

from bench.guest import driver, seconds_of
from bench.many import kernel_with_many, patch_of
from bench.measure import Result, timed
from emu.cpu import VCpu
from klpemu.fixtures import fixture
from klpemu.kernel import Kernel
from patches.livepatch import Func, Patch

__all__ = ["run"]

CALLS = 200_000
ROUNDS = 9
VERIFIED = (1, 100)


def run() -> Iterator[Result]:
    """Medians."""
    yield Result("basic", "boot the built-in kernel", _median(Kernel.load, 5) * 1e3, "ms")
    kernel = Kernel.load()
    machine = kernel.machine
    cpu = VCpu(machine.space, 0, machine.cpus[0].gs_base)
    function = kernel.address_of("notrace_add")
    entry = driver(machine, [function], CALLS)
    seconds_of(machine, cpu, entry)
    calls = statistics.median(seconds_of(machine, cpu, entry) / CALLS for _ in range(ROUNDS))
    yield Result("basic", "call and ret of a function of two instructions, in the guest", calls * 1e9, "ns")
    into = statistics.median(seconds_of(machine, cpu, function) for _ in range(1_000))
    yield Result("basic", "into the guest and out again (emu_start)", into * 1e6, "us")
    yield Result("basic", "Kernel.call", _median(lambda: kernel.call("notrace_add", 1, 2), 200) * 1e6, "us")
    patch = Patch("fix_area", {"vmlinux": [Func("area_of", "fixed_area_of")]}, fixture("fix_area.o"))
    yield Result(
        "basic",
        "Kernel.enable and disable, one function",
        _median(lambda: _cycle(kernel, patch), 20) * 1e3,
        "ms",
    )
    for count in VERIFIED:
        many = kernel_with_many()
        many.enable(patch_of(count))
        yield Result(
            "basic", f"Kernel.verify, {count} patched functions", _median(many.verify, 5) * 1e3, "ms"
        )


def _cycle(kernel: Kernel, patch: Patch) -> None:
    kernel.enable(patch)
    kernel.disable(patch)


def _median(body: Callable[[], Any], times: int) -> float:
    return statistics.median(timed(body) for _ in range(times))
