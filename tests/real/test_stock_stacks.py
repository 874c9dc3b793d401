"""The ORC tables of stock modules against a shadow call stack, frame for frame."""

from collections.abc import Callable

import pytest
from shadow_stack import execute_with_shadow

from klpemu import Kernel
from klpemu.stock_kernel import StockKernel

POINTS = 2500
ROOM = 1 << 16


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("libarc4", "arc4_crypt"),
        ("libdes", "des_expand_key"),
        ("lz4_compress", "LZ4_compress_default"),
        ("libcurve25519-generic", "curve25519_generic"),
        ("crct10dif_common", "crc_t10dif_generic"),
    ],
)
def test_every_frame_in_a_stock_module_is_found(
    stock_kernel: StockKernel, module: str, function: str, record_property: Callable[[str, object], None]
) -> None:
    """arch/x86/include/asm/orc_types.h: where the caller's frame is at each instruction."""
    kernel = Kernel.load()
    kernel.load_module(stock_kernel.module(module))
    machine = kernel.machine
    room = machine.slab.kzalloc(ROOM, "arguments")
    arguments = {
        "arc4_crypt": (room, room + 4096, room + 8192, 200),
        "des_expand_key": (room, room + 4096, 8),
        "LZ4_compress_default": (room, room + 4096, 300, 2000, room + 20000),
        "curve25519_generic": (room, room + 64, room + 128),
        "crc_t10dif_generic": (0, room, 300),
    }[function]
    points, unreliable, deepest = 0, 0, 0
    for registers, expected in execute_with_shadow(machine, kernel.address_of(function), *arguments):
        trace = machine.unwinder.walk(registers)
        points += 1
        deepest = max(deepest, len(expected))
        if trace.unreliable:
            unreliable += 1
        else:
            assert list(trace.entries) == expected, machine.kallsyms.describe(registers["rip"])
        if points == POINTS:
            break
    record_property("points", points)
    record_property("unreliable", unreliable)
    assert unreliable == 0
    assert points > 400
