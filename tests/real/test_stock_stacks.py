"""The ORC tables of stock modules against a shadow call stack, frame for frame."""

from collections.abc import Callable

import pytest
from preemption import Preemption, UnwinderPoints
from shadow_stack import execute_with_shadow

from klpemu import Func, Kernel, Patch
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


PREEMPTED = {
    "libarc4": ["arc4_crypt"],
    "libdes": ["des_expand_key"],
    "libpoly1305": ["poly1305_core_blocks"],
    "libcurve25519-generic": ["curve25519_generic"],
    "crct10dif_common": ["crc_t10dif_generic"],
    "cordic": ["cordic_calc_iq"],
    "chacha-x86_64": ["chacha_block_xor_ssse3", "chacha_4block_xor_ssse3"],
}


@pytest.mark.parametrize("module", PREEMPTED)
def test_a_task_preempted_in_a_stock_module_is_walked_right(
    stock_kernel: StockKernel, points: UnwinderPoints, module: str
) -> None:
    """At random instructions, from thread.sp; below a patched caller, too."""
    kernel = Kernel.load()
    machine = kernel.machine
    machine.modules.missing = lambda symbol, name: machine.symbol("klpemu_return")
    kernel.load_module(stock_kernel.module(module))
    kernel.enable(
        Patch("fix_all", {"vmlinux": [Func("call_pointer", "fixed_call_pointer")]}, "builtin:fix_all.o")
    )
    room = machine.slab.kzalloc(ROOM, "arguments")
    preemption = Preemption(machine, points, module, modules="stock modules")
    random = preemption.random
    # Curve25519 is one long block of code, which costs a millisecond an instruction to step through.
    enough = 200 if module == "libcurve25519-generic" else 450
    while preemption.total < enough:
        function = random.choice(PREEMPTED[module])
        size = random.randint(1, 500)
        arguments = {
            "arc4_crypt": (room, room + 4096, room + 8192, size),
            "des_expand_key": (room, room + 4096, 8),
            "poly1305_core_blocks": (room, room + 4096, room + 8192, size % 9 + 1, 1),
            "curve25519_generic": (room, room + 64, room + 128),
            "crc_t10dif_generic": (0, room, size),
            "cordic_calc_iq": (size,),
            "chacha_block_xor_ssse3": (room, room + 4096, room + 8192, 64, 20),
            "chacha_4block_xor_ssse3": (room, room + 4096, room + 8192, 256, 20),
        }[function]
        entry = kernel.address_of(function)
        if function == "cordic_calc_iq":
            preemption.call("call_pointer", entry, size)
        else:
            preemption.call(entry, *arguments, until=enough)
    assert preemption.counts["stock modules"] > 100
