"""Loading all modules of the stock kernel: parse, place, relocate, convert the sites, make the records.

Growth is told by loading and unloading the same hundred modules beside nothing, beside a thousand others and
beside all others: the work is the same, so that any difference is what the number of loaded modules costs.
"""

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from bench.measure import Result
from bench.stock import bind_missing_to_a_stub, shuffled_modules
from elf.image import Image
from emu.machine import Machine
from emu.module import LoadedObject
from klpemu.kernel import Kernel

__all__ = ["run"]

SAMPLE = 100
STAGES = (0, 1_000, 3_900)
REPEATS = 5
LINEAR = 1.2


def run() -> Iterator[Result]:
    """Sites per second for all modules, and the growth of the sample's time."""
    modules = shuffled_modules()
    sample, others = modules[:SAMPLE], modules[SAMPLE:]
    machine = Kernel.load().machine
    bind_missing_to_a_stub(machine)
    seconds: dict[int, tuple[float, float]] = {}
    spent, sites, count = 0.0, 0, 0
    for stage in (*STAGES, len(others)):
        part = others[count:stage]
        took, found = _load(machine, part)
        spent, sites, count = spent + took, sites + found, stage
        if stage in STAGES:
            seconds[stage] = _load_and_unload(machine, sample)
    took, found = _load(machine, sample)
    spent, sites, count = spent + took, sites + found, count + len(sample)

    yield Result("load", "modules loaded", count, "modules")
    yield Result("load", "their fentry sites", sites, "sites")
    yield Result("load", "all of them", spent, "s")
    yield Result("load", "rate", sites / spent, "sites/s")
    for stage, (loading, unloading) in seconds.items():
        yield Result("load", f"load a hundred modules beside {stage:,} others", loading, "s")
        yield Result("load", "unload them", unloading, "s")
    first, last = seconds[STAGES[0]], seconds[STAGES[-1]]
    yield Result(
        "load", f"loading beside {STAGES[-1]:,} others / beside none", last[0] / first[0], "times", LINEAR
    )
    yield Result("load", f"unloading beside {STAGES[-1]:,} others / beside none", last[1] / first[1], "times")


def _load(machine: Machine, modules: Sequence[Path]) -> tuple[float, int]:
    """CPU seconds and number of sites."""
    gc.collect()
    start = time.process_time()
    sites = sum(len(_insmod(machine, path).sites) for path in modules)
    return time.process_time() - start, sites


def _load_and_unload(machine: Machine, modules: Sequence[Path]) -> tuple[float, float]:
    """Medians of the CPU seconds for loading and for unloading."""
    loading, unloading = [], []
    for _ in range(REPEATS):
        gc.collect()
        start = time.process_time()
        names = [_insmod(machine, path).name for path in modules]
        middle = time.process_time()
        for name in reversed(names):
            machine.service("rmmod", partial(machine.modules.unload_module, name))
        loading.append(middle - start)
        unloading.append(time.process_time() - middle)
    return statistics.median(loading), statistics.median(unloading)


def _insmod(machine: Machine, path: Path) -> LoadedObject:
    image = Image.open(str(path))
    loaded: LoadedObject = machine.service("insmod", partial(machine.modules.load_module, image))
    return loaded
