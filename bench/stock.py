"""The stock kernel's modules in an order of the benchmarks' own, loaded whether or not all is there."""

import random
from pathlib import Path

from bench.guest import place
from elf.symbols import Symbol
from emu.machine import Machine
from klpemu import stock_kernel

__all__ = ["bind_missing_to_a_stub", "shuffled_modules"]

SEED = 20231
UD2 = bytes.fromhex("0f0b")


def shuffled_modules() -> list[Path]:
    """All modules, in a seeded order: any part of it is the same mix."""
    kernel = stock_kernel.find()
    assert kernel is not None, "the benchmark is not run without the stock kernel"
    modules = list(kernel.modules)
    random.Random(SEED).shuffle(modules)
    return modules


def bind_missing_to_a_stub(machine: Machine) -> None:
    """Bind what neither the kernel nor a module exports to a `ud2`: it loads, and fails when called."""
    stub = place(machine, len(UD2), "bench: missing symbols")
    machine.space.write(stub, UD2)

    def missing(symbol: Symbol, module: str) -> int:
        return stub

    machine.modules.missing = missing
