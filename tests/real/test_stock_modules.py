"""Functions of stock modules, called before, during and after a patch, and computed again in Python.

The references (libraries, or a few lines each) share no code with the kernel.  What each function and its
replacement give is in the table of fixtures/README.md.
"""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import lz4.block
import pytest
from Crypto.Cipher import ARC4, DES

from elf.errors import KlpemuError, SymbolError
from emu.errno import KernelErrno
from klpemu.kernel import Kernel
from klpemu.stock_kernel import StockKernel
from patches.livepatch import Func, Patch

CALLS = 4  # inputs a stage
MASK_128 = (1 << 128) - 1

# What a call gave, what the original gives, and what the replacement gives, in a form that compares.
Outcome = tuple[Any, Any, Any]


def run(kernel: Kernel, function: str, *arguments: int | bytes) -> tuple[int, list[bytes]]:
    """Call a guest function, bytes passed as a pointer to a copy; returns RAX and the copies' contents."""
    slab, space = kernel.machine.slab, kernel.machine.space
    copies = [
        (slab.kmalloc(len(each), "argument"), len(each)) for each in arguments if isinstance(each, bytes)
    ]
    addresses = iter(copies)
    passed = []
    for each in arguments:
        if isinstance(each, bytes):
            address, _ = next(addresses)
            space.write(address, each)
            passed.append(address)
        else:
            passed.append(each)
    result = kernel.call(function, *passed)
    contents = [space.read(address, size) for address, size in copies]
    for address, _ in copies:
        slab.kfree(address)
    return result, contents


def arc4_crypt(kernel: Kernel, random: Random) -> Outcome:
    key, data = random.randbytes(16), random.randbytes(random.randint(1, 300))
    _, (context, _) = run(kernel, "arc4_setkey", bytes(1032), key, len(key))
    _, (_, out, _) = run(kernel, "arc4_crypt", context, bytes(len(data)), data, len(data))
    original = ARC4.new(key).encrypt(data)
    return out, original, bytes(byte ^ 0xFF for byte in original)


def cordic_calc_iq(kernel: Kernel, random: Random) -> Outcome:
    theta = random.randint(-360, 360)
    pair, _ = run(kernel, "cordic_calc_iq", theta)
    got = _s32(pair), _s32(pair >> 32)
    angle = math.radians(theta)
    # The kernel's sixteen rounds in 16.16 fixed point are off by at most 5.
    original = pytest.approx((65536 * math.cos(angle), 65536 * math.sin(angle)), abs=5)
    return got, original, (-theta, theta >> 1)


def des_encrypt(kernel: Kernel, random: Random) -> Outcome:
    key, block = random.randbytes(8), random.randbytes(8)
    _, (context, _) = run(kernel, "des_expand_key", bytes(128), key, len(key))
    _, (_, out, _) = run(kernel, "des_encrypt", context, bytes(8), block)
    return out, DES.new(key, DES.MODE_ECB).encrypt(block), bytes(byte ^ 0x5A for byte in block[::-1])


def poly1305_core_blocks(kernel: Kernel, random: Random) -> Outcome:
    raw_key, nonce, count = random.randbytes(16), random.randbytes(16), random.randint(1, 6)
    blocks = [random.randbytes(16) for _ in range(count)]
    _, (key, _) = run(kernel, "poly1305_core_setkey", bytes(48), raw_key)
    _, (state, _, _) = run(kernel, "poly1305_core_blocks", bytes(24), key, b"".join(blocks), count, 1)
    _, (_, _, tag) = run(kernel, "poly1305_core_emit", state, nonce, bytes(16))

    r = int.from_bytes(raw_key, "little") & 0x0FFFFFFC_0FFFFFFC_0FFFFFFC_0FFFFFFF
    total = 0
    for block in blocks:
        total = (total + int.from_bytes(block, "little") + (1 << 128)) * r % ((1 << 130) - 5)
    sums = [0, 0, count]
    for block in blocks:
        sums[0] ^= int.from_bytes(block[:8], "little")
        sums[1] ^= int.from_bytes(block[8:], "little")
    expected = ((total + int.from_bytes(nonce, "little")) & MASK_128).to_bytes(16, "little")
    replaced = b"".join(word.to_bytes(8, "little") for word in sums)
    # The tag says what the original's state stands for; the replacement's state is compared as it is.
    return (state, tag), _Either(tag=expected), _Either(state=replaced)


def lz4_compress_default(kernel: Kernel, random: Random) -> Outcome:
    words = [random.randbytes(random.randint(3, 9)) for _ in range(12)]
    data = b"".join(random.choices(words, k=random.randint(40, 200)))
    room = len(data) + len(data) // 255 + 16
    size, (_, packed, _) = run(
        kernel, "LZ4_compress_default", data, bytes(room), len(data), room, bytes(16416)
    )
    packed = packed[:size]
    length = len(data) - 15
    literals = b"\xf0" + b"\xff" * (length // 255) + bytes([length % 255]) + data
    unpacked = lz4.block.decompress(packed, uncompressed_size=len(data))
    return (unpacked, size < len(data), packed == literals), (data, True, False), (data, False, True)


def crc_t10dif_generic(kernel: Kernel, random: Random) -> Outcome:
    data, start = random.randbytes(random.randint(1, 200)), random.getrandbits(16)
    result, _ = run(kernel, "crc_t10dif_generic", start, data, len(data))
    original = crc_t10dif(start, data)
    return result & 0xFFFF, original, original ^ 0xFFFF


def curve25519_generic(kernel: Kernel, random: Random) -> Outcome:
    scalar, point = random.randbytes(32), random.randbytes(32)
    _, (out, _, _) = run(kernel, "curve25519_generic", bytes(32), scalar, point)
    return out, x25519(scalar, point), bytes(x ^ y for x, y in zip(scalar, point, strict=True))


def gf128mul_lle(kernel: Kernel, random: Random) -> Outcome:
    a, b = random.randbytes(16), random.randbytes(16)
    _, (out, _) = run(kernel, "gf128mul_lle", a, b)
    product, shifted = 0, int.from_bytes(b, "big")
    for bit in range(127, -1, -1):
        if int.from_bytes(a, "big") >> bit & 1:
            product ^= shifted
        shifted = shifted >> 1 ^ (0xE1 << 120 if shifted & 1 else 0)
    return out, product.to_bytes(16, "big"), bytes(x ^ y for x, y in zip(a, b, strict=True))


def crc_t10dif(crc: int, data: bytes) -> int:
    """CRC-16 with polynomial 0x8bb7, most significant bit first."""
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ (0x8BB7 if crc & 0x8000 else 0)) & 0xFFFF
    return crc


def x25519(scalar: bytes, point: bytes) -> bytes:
    """The function of RFC 7748, section 5, as its pseudocode has it."""
    p = (1 << 255) - 19
    k = int.from_bytes(scalar, "little") & ~7 & ((1 << 255) - 1) | 1 << 254
    x1 = int.from_bytes(point, "little") & ((1 << 255) - 1)
    x2, z2, x3, z3 = 1, 0, x1, 1
    for bit in range(254, -1, -1):
        swap = k >> bit & 1
        if swap:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        x3, z3 = (d * a + c * b) ** 2 % p, x1 * (d * a - c * b) ** 2 % p
        e = a * a - b * b
        x2, z2 = a * a * b * b % p, e * (a * a + 121665 * e) % p
        if swap:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, p - 2, p) % p).to_bytes(32, "little")


@dataclass(frozen=True)
class _Either:
    """Equals a (state, tag) whose state, or whose tag, is the one given."""

    state: bytes | None = None
    tag: bytes | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple) and (self.state, self.tag) in ((other[0], None), (None, other[1]))


@dataclass(frozen=True)
class Stock:
    """A module, its function, the replacement, and the call that compares."""

    module: str
    function: str
    code: str
    call: Callable[[Kernel, Random], Outcome]

    def patch(self, fixtures_dir: Path) -> Patch:
        """The livepatch that replaces the function."""
        func = Func(self.function, f"fixed_{self.function}")
        return Patch(self.code, {self.module: [func]}, fixtures_dir / f"{self.code}.o")


STOCK = [
    Stock("libarc4", "arc4_crypt", "fix_libarc4", arc4_crypt),
    Stock("cordic", "cordic_calc_iq", "fix_cordic", cordic_calc_iq),
    Stock("libdes", "des_encrypt", "fix_libdes", des_encrypt),
    Stock("libpoly1305", "poly1305_core_blocks", "fix_libpoly1305", poly1305_core_blocks),
    Stock("lz4_compress", "LZ4_compress_default", "fix_lz4_compress", lz4_compress_default),
    Stock("crct10dif_common", "crc_t10dif_generic", "fix_crct10dif", crc_t10dif_generic),
    Stock("libcurve25519_generic", "curve25519_generic", "fix_curve25519", curve25519_generic),
    Stock("gf128mul", "gf128mul_lle", "fix_gf128mul", gf128mul_lle),
]
by_name = pytest.mark.parametrize("stock", STOCK, ids=lambda stock: stock.function)


@pytest.fixture
def kernel() -> Kernel:
    return Kernel.load()


@pytest.fixture
def loaded(kernel: Kernel, stock_kernel: StockKernel) -> Kernel:
    """A kernel with all eight modules."""
    for stock in STOCK:
        kernel.load_module(stock_kernel.module(stock.module))
    return kernel


def original(kernel: Kernel, stock: Stock, random: Random) -> Iterator[bool]:
    """Whether each of some calls gives what the original gives, and not what the replacement does."""
    for _ in range(CALLS):
        got, before, after = stock.call(kernel, random)
        assert got != after
        yield got == before


def replaced(kernel: Kernel, stock: Stock, random: Random) -> Iterator[bool]:
    """Whether each of some calls gives what the replacement gives, and not what the original does."""
    for _ in range(CALLS):
        got, before, after = stock.call(kernel, random)
        assert got != before
        yield got == after


def checked(kernel: Kernel) -> None:
    kernel.verify().raise_for_findings()


@by_name
def test_a_stock_function_is_called_before_during_and_after_its_patch(
    kernel: Kernel, stock_kernel: StockKernel, fixtures_dir: Path, stock: Stock
) -> None:
    random = Random(f"before, during, after {stock.function}")
    kernel.load_module(stock_kernel.module(stock.module))
    patch = stock.patch(fixtures_dir)
    assert all(original(kernel, stock, random))
    checked(kernel)
    kernel.enable(patch)
    checked(kernel)
    assert all(replaced(kernel, stock, random))
    checked(kernel)
    kernel.disable(patch)
    checked(kernel)
    assert all(original(kernel, stock, random))
    kernel.unload_module(stock.module)
    checked(kernel)


@by_name
def test_the_site_of_a_stock_function_is_back_to_its_nop(
    kernel: Kernel, stock_kernel: StockKernel, fixtures_dir: Path, stock: Stock
) -> None:
    kernel.load_module(stock_kernel.module(stock.module))
    patch = stock.patch(fixtures_dir)
    before = kernel.site_of(stock.function)
    kernel.enable(patch)
    address, code = kernel.site_of(stock.function)
    assert (address, code[0]) == (before[0], 0xE8)
    kernel.disable(patch)
    assert kernel.site_of(stock.function) == before
    assert before[1] == bytes.fromhex("0f1f440000")


def test_eight_patches_are_enabled_together_and_removed_one_by_one(
    loaded: Kernel, fixtures_dir: Path
) -> None:
    random = Random("eight at once")
    for number, stock in enumerate(STOCK):
        loaded.enable(stock.patch(fixtures_dir))
        for other in STOCK[: number + 1]:
            assert all(replaced(loaded, other, random)), other.function
    checked(loaded)
    removed = random.sample(STOCK, len(STOCK))
    for number, stock in enumerate(removed, 1):
        loaded.disable(stock.code)
        checked(loaded)
        assert all(original(loaded, each, random) for each in removed[:number])
        assert all(replaced(loaded, each, random) for each in removed[number:])


def test_a_patch_that_lacks_the_second_replacement_leaves_the_first_module_alone(
    kernel: Kernel, stock_kernel: StockKernel, fixtures_dir: Path
) -> None:
    for stock in STOCK[:2]:
        kernel.load_module(stock_kernel.module(stock.module))
    first, second = STOCK[:2]
    both = Patch(
        "fix_both",
        {
            first.module: [Func(first.function, f"fixed_{first.function}")],
            second.module: [Func(second.function, f"fixed_{second.function}")],
        },
        fixtures_dir / f"{first.code}.o",
    )
    with pytest.raises(SymbolError, match="fixed_cordic_calc_iq"):
        kernel.enable(both)
    checked(kernel)
    assert all(original(kernel, first, Random(0)))


def test_a_cipher_stream_goes_on_while_its_function_is_patched_and_restored(
    kernel: Kernel, stock_kernel: StockKernel, fixtures_dir: Path
) -> None:
    kernel.load_module(stock_kernel.module("libarc4"))
    random = Random("one stream")
    key = random.randbytes(16)
    parts = [random.randbytes(random.randint(1, 100)) for _ in range(9)]
    patch = STOCK[0].patch(fixtures_dir)
    cipher = ARC4.new(key)
    _, (context, _) = run(kernel, "arc4_setkey", bytes(1032), key, len(key))
    for number, part in enumerate(parts):
        patched = number % 3 == 1
        if patched:
            kernel.enable(patch)
        _, (context, out, _) = run(kernel, "arc4_crypt", context, bytes(len(part)), part, len(part))
        if patched:
            kernel.disable(patch)
        assert out == bytes(byte ^ (0xFF if patched else 0) for byte in cipher.encrypt(part))


def test_sixty_degrees_are_exact(kernel: Kernel, stock_kernel: StockKernel) -> None:
    kernel.load_module(stock_kernel.module("cordic"))
    pair, _ = run(kernel, "cordic_calc_iq", 60)
    assert (_s32(pair), _s32(pair >> 32)) == (32769, 56759)


def test_a_caller_in_another_stock_module_reaches_the_replacement(
    kernel: Kernel, stock_kernel: StockKernel, fixtures_dir: Path
) -> None:
    kernel.load_module(stock_kernel.module("crct10dif_common"))
    kernel.load_module(stock_kernel.module("crct10dif_generic"))
    patch = next(stock for stock in STOCK if stock.module == "crct10dif_common").patch(fixtures_dir)
    data = Random("two modules").randbytes(64)

    def update() -> int:
        # struct shash_desc: a pointer to the tfm, then the algorithm's context, here the 16-bit CRC.
        _, (desc, _) = run(kernel, "crct10dif_generic:chksum_update", bytes(16), data, len(data))
        return int.from_bytes(desc[8:10], "little")

    assert update() == crc_t10dif(0, data)
    kernel.enable(patch)
    checked(kernel)
    assert update() == crc_t10dif(0, data) ^ 0xFFFF
    kernel.disable(patch)
    checked(kernel)
    assert update() == crc_t10dif(0, data)


def test_a_module_that_another_uses_is_not_unloaded(kernel: Kernel, stock_kernel: StockKernel) -> None:
    kernel.load_module(stock_kernel.module("libdes"))
    kernel.load_module(stock_kernel.module("des_generic"))
    with pytest.raises(KernelErrno, match="module 'libdes' is in use by des_generic"):
        kernel.unload_module("libdes")
    kernel.unload_module("des_generic")
    kernel.unload_module("libdes")
    checked(kernel)


def test_a_module_before_the_one_it_needs_is_refused(kernel: Kernel, stock_kernel: StockKernel) -> None:
    with pytest.raises(SymbolError, match=r"crct10dif_generic.*Unknown symbol crc_t10dif_generic"):
        kernel.load_module(stock_kernel.module("crct10dif_generic"))
    checked(kernel)
    assert "crct10dif_generic" not in kernel.machine.modules.objects


def test_an_unknown_symbol_is_named_with_its_module(kernel: Kernel, stock_kernel: StockKernel) -> None:
    before = dict(kernel.machine.area.live)
    with pytest.raises(SymbolError, match=r"xt_length.*Unknown symbol xt_(un)?register_matches"):
        kernel.load_module(stock_kernel.module("xt_length"))
    assert kernel.machine.area.live == before
    checked(kernel)


def test_what_cannot_run_here_fails_at_the_call(kernel: Kernel, stock_kernel: StockKernel) -> None:
    kernel.load_module(stock_kernel.module("crct10dif_common"))
    kernel.load_module(stock_kernel.module("crct10dif_generic"))
    with pytest.raises(KlpemuError, match=r"crypto_register_shash, which exists but cannot run here"):
        kernel.call("crct10dif_generic:init_module")
    checked(kernel)


def test_a_stock_module_without_sites_is_refused_by_name(
    kernel: Kernel, stock_kernel: StockKernel, fixtures_dir: Path
) -> None:
    kernel.load_module(stock_kernel.module("crc7"))
    patch = Patch(
        "fix_crc7", {"crc7": [Func("crc7_be", "fixed_crc_t10dif_generic")]}, fixtures_dir / "fix_crct10dif.o"
    )
    with pytest.raises(KernelErrno, match="failed to find location for function 'crc7_be'"):
        kernel.enable(patch)
    assert "livepatch: failed to find location for function 'crc7_be'" in kernel.log
    assert "livepatch: failed to patch object 'crc7'" in kernel.log
    checked(kernel)
    data = b"\x40\x00\x00\x00\x00"
    result, _ = run(kernel, "crc7_be", 0, data, len(data))
    assert result & 0xFF == 0x95 & ~1  # the CMD0 of an SD card: 0x4a << 1, its end bit not yet set


def test_a_module_that_refers_to_its_empty_bss_is_loaded(kernel: Kernel, stock_kernel: StockKernel) -> None:
    # What it needs from others is not called here.
    kernel.machine.modules.missing = lambda symbol, module: kernel.machine.return_address
    assert kernel.load_module(stock_kernel.module("sunkbd")) == "sunkbd"
    checked(kernel)


def verify(module: Path, patch: str) -> subprocess.CompletedProcess[str]:
    """Run `klpemu verify`."""
    command = [sys.executable, "-m", "klpemu", "verify", "--module", str(module), patch]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@by_name
def test_klpemu_verify_accepts_the_patch_of_a_stock_module(
    stock_kernel: StockKernel, fixtures_dir: Path, stock: Stock
) -> None:
    pair = f"{stock.module}:{stock.function}=fixed_{stock.function}"
    done = verify(stock_kernel.module(stock.module), f"{fixtures_dir / stock.code}.o:{pair}")
    assert (done.returncode, done.stderr) == (0, "")


def test_klpemu_verify_refuses_a_stock_module_without_sites_by_name(
    stock_kernel: StockKernel, fixtures_dir: Path
) -> None:
    pair = "crc7:crc7_be=fixed_crc_t10dif_generic"
    done = verify(stock_kernel.module("crc7"), f"{fixtures_dir / 'fix_crct10dif.o'}:{pair}")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "crc7_be" in done.stderr


def _s32(value: int) -> int:
    return (value & 0xFFFF_FFFF ^ 0x8000_0000) - 0x8000_0000
