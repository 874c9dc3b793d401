"""The kernel that people run, booted from its vmlinuz: its own code runs, redirects, and is walked."""

import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from shadow_stack import execute_with_shadow

from elf.errors import ElfError, KlpemuError
from elf.vmlinuz import decompressed
from emu.memory import read_string
from emu.module import LoadedObject
from klpemu import Func, Kernel, Patch
from klpemu.kernel_image import open_kernel_image
from klpemu.stock_kernel import StockKernel

NOP5 = bytes.fromhex("0f1f440000")
GFP_KERNEL = 0xCC0
HANDLERS = ("kernel", "own")


@pytest.fixture(scope="module")
def booted(stock_kernel: StockKernel) -> Kernel:
    """For tests that leave nothing behind."""
    return Kernel.load(stock_kernel.vmlinuz)


@pytest.fixture(scope="module", params=HANDLERS)
def redirecting(stock_kernel: StockKernel, request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """The kernel's own test module is enabled, and its own or our code redirects."""
    kernel = Kernel.load(stock_kernel.vmlinuz, handler=request.param)
    module = stock_kernel.livepatch.test_modules.get("test_klp_livepatch")
    if module is None:
        pytest.skip(stock_kernel.livepatch.why_not)
    kernel.insmod(module)
    yield kernel
    kernel.disable("test_klp_livepatch")
    kernel.verify("disabled").raise_for_findings()


def vmlinux(kernel: Kernel) -> LoadedObject:
    return kernel.machine.modules.objects[""]


def test_every_site_is_a_nop_and_nothing_else_was_touched(booted: Kernel) -> None:
    sites = vmlinux(booted).sites
    assert len(sites) > 30_000
    assert {booted.machine.space.read(site, 5) for site in sites} == {NOP5}
    booted.verify("boot").raise_for_findings()


def test_init_memory_is_gone_and_so_are_its_records(booted: Kernel) -> None:
    start = booted.machine.vmlinux.symbols["__init_begin"]
    assert booted.machine.space.access(start) is None
    assert not [site for site in vmlinux(booted).sites if site >= start]
    assert not booted.machine.kallsyms.named("start_kernel")


@pytest.mark.parametrize("seed", range(4))
def test_its_arithmetic_is_that_of_python(booted: Kernel, seed: int) -> None:
    """lib/math/: compiled by somebody else, from sources that Python's never saw."""
    numbers = random.Random(seed)
    for _ in range(25):
        a, b = numbers.getrandbits(40), numbers.getrandbits(30) or 1
        assert booted.call("int_sqrt", a) == math.isqrt(a)
        assert booted.call("gcd", a, b) == math.gcd(a, b)
        assert booted.call("lcm", b, b % 1000 or 1) == math.lcm(b, b % 1000 or 1)


def test_its_printf_formats_symbols_and_bitmaps(booted: Kernel) -> None:
    machine = booted.machine
    room = machine.slab.kzalloc(128, "room")
    form = machine.slab.kstrdup("%d %s %#x %pS %*pbl", "format")
    text = machine.slab.kstrdup("text", "text")
    bits = machine.slab.kzalloc(8, "bits")
    machine.space.write(bits, b"\x36")
    length = booted.call("sprintf", room, form, -7 % 2**32, text, 255, machine.symbol("gcd") + 4, 8, bits)
    size = machine.kallsyms.named("gcd")[0].size
    assert read_string(machine.space, room) == f"-7 text 0xff gcd+0x4/{size:#x} 1-2,4-5"
    assert length == len(read_string(machine.space, room))
    for each in (room, form, text, bits):
        machine.slab.kfree(each)


def test_what_allocates_inside_of_the_image_gets_memory(booted: Kernel) -> None:
    """kstrdup() and kasprintf() are the image's own; what they call for memory is answered."""
    machine = booted.machine
    live = set(machine.slab.live)
    text = machine.slab.kstrdup("%d of %s", "text")
    copy = booted.call("kstrdup", text, GFP_KERNEL)
    assert read_string(machine.space, copy) == "%d of %s"
    made = booted.call("kasprintf", GFP_KERNEL, text, 7, copy)
    assert read_string(machine.space, made) == "7 of %d of %s"
    larger = booted.call("krealloc", made, 100, GFP_KERNEL)
    assert read_string(machine.space, larger) == "7 of %d of %s"
    for each in (text, copy, larger):
        booted.call("kfree", each)
    assert set(machine.slab.live) == live


def test_a_cache_gives_objects_of_its_size_on_which_the_constructor_has_run(booted: Kernel) -> None:
    """int_sqrt() serves as a constructor without effect: what counts is that guest code can be called."""
    machine = booted.machine
    live = set(machine.slab.live)
    name = machine.slab.kstrdup("things", "name")
    cache = booted.call("kmem_cache_create", name, 40, 8, 0, booted.address_of("int_sqrt"))
    thing = booted.call("kmem_cache_alloc", cache, GFP_KERNEL)
    assert machine.slab.live[thing][0] == 40
    booted.call("kmem_cache_free", cache, thing)
    booted.call("kmem_cache_destroy", cache)
    machine.slab.kfree(name)
    assert set(machine.slab.live) == live


@pytest.mark.parametrize("function", ["panic", "kthread_create_on_node", "alloc_pages"])
def test_what_needs_a_running_system_is_refused_at_the_call(stock_kernel: StockKernel, function: str) -> None:
    kernel = Kernel.load(stock_kernel.vmlinuz)
    with pytest.raises(KlpemuError, match=r"guest code called \w+, which exists but cannot run here"):
        kernel.call(function, 0, 0, 0, 0)
    assert kernel.call("int_sqrt", 49) == 7, "the kernel goes on"
    kernel.verify().raise_for_findings()


def test_a_warning_is_told_with_file_and_line_and_execution_goes_on(stock_kernel: StockKernel) -> None:
    """__bug_table, read back by lib/bug.c; include/asm-generic/bug.h."""
    kernel = Kernel.load(stock_kernel.vmlinuz)
    counter = kernel.machine.slab.kzalloc(4, "refcount_t")
    for _ in range(2):
        kernel.call("refcount_warn_saturate", counter, 0)
    block = kernel.log[:]
    assert block[0] == "------------[ cut here ]------------"
    assert block[1] == "refcount_t: saturated; leaking memory."
    assert block[2].startswith("WARNING: CPU: 0 PID: 1 at lib/refcount.c:")
    assert block[-1] == "---[ end trace 0000000000000000 ]---"
    assert sum("WARNING" in line for line in block) == 1, "WARN_ONCE"


def test_cmdline_is_shown_by_the_image_and_the_patched_one_by_the_module(redirecting: Kernel) -> None:
    assert redirecting.read("/proc/cmdline") == "test_klp_livepatch: this has been live patched\n"
    (replacement,) = redirecting.machine.kallsyms.named("livepatch_cmdline_proc_show", "test_klp_livepatch")
    assert redirecting.function_stack("cmdline_proc_show") == [
        f"livepatch_cmdline_proc_show+0x0/{replacement.size:#x} [test_klp_livepatch]"
    ]
    redirecting.verify("enabled").raise_for_findings()


def test_every_frame_of_a_redirected_call_is_found_by_the_image_s_own_tables(redirecting: Kernel) -> None:
    """ORC of the image, of the module, and of the trampoline, which is a copy of ftrace_caller.

    Unreliable is only what a kernel finds unreliable: from the handler's answer to the trampoline's return.
    """
    machine = redirecting.machine
    points, unreliable = 0, []
    file = machine.slab.kzalloc(machine.layouts.sizeof("seq_file"), "seq_file")
    room = machine.slab.kzalloc(4096, "buffer")
    view = machine.view("seq_file", file)
    view.buf, view.size = room, 4096
    entry = redirecting.address_of("cmdline_proc_show")
    for registers, expected in execute_with_shadow(machine, entry, file, 0):
        trace = machine.unwinder.walk(registers)
        points += 1
        if trace.unreliable:
            unreliable.append(machine.kallsyms.describe(registers["rip"]))
        else:
            assert list(trace.entries) == expected, machine.kallsyms.describe(registers["rip"])
    assert read_string(machine.space, room).endswith("live patched\n")
    assert points > 200
    assert len(unreliable) < 40
    machine.slab.kfree(file)
    machine.slab.kfree(room)


@pytest.mark.parametrize("function", ["int_sqrt", "mutex_is_locked", "mutex_lock"])
def test_both_handlers_agree_and_what_they_cost_is_known(stock_kernel: StockKernel, function: str) -> None:
    """A function that Python answers is entered by way of its site all the same."""
    counts = {}
    for handler in HANDLERS:
        kernel = Kernel.load(stock_kernel.vmlinuz, handler=handler)
        kernel.enable(Patch("fix", {"vmlinux": [Func(function, "fixed_area_of")]}, code="builtin:fix_area.o"))
        trace = kernel.trace(function, 6, 7)
        assert trace.result == 42
        counts[handler] = len(trace.instructions)
        kernel.verify("enabled").raise_for_findings()
        kernel.disable("fix")
        kernel.verify("disabled").raise_for_findings()
    assert 60 < counts["own"] < counts["kernel"] < 100


def test_a_system_map_serves_as_well_as_its_own_symbols(
    booted: Kernel, stock_kernel: StockKernel, tmp_path: Path
) -> None:
    symbols = booted.machine.kallsyms.symbols()
    init = open_kernel_image(stock_kernel.vmlinuz).symbols
    lines = "".join(f"{address:016x} {letter} {name}\n" for name, letter, address in init)
    (tmp_path / "System.map").write_text(lines)
    kernel = Kernel.load(stock_kernel.vmlinuz, system_map=tmp_path / "System.map")
    assert kernel.machine.kallsyms.symbols() == symbols
    (tmp_path / "System.map").write_text(lines[: lines.index("\n", len(lines) // 2) + 1])
    with pytest.raises(KlpemuError, match="has no symbol"):
        Kernel.load(stock_kernel.vmlinuz, system_map=tmp_path / "System.map")


def test_an_image_whose_sites_do_not_hold_the_call_is_refused(
    booted: Kernel, stock_kernel: StockKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sites are checked before the first of them is changed."""
    image = open_kernel_image(stock_kernel.vmlinuz).image
    site = booted.site_of("int_sqrt")[0]
    section = image.section_at(site)
    assert section is not None
    data = bytearray(decompressed(stock_kernel.vmlinuz.read_bytes(), "vmlinuz"))
    data[section.offset + site - section.address] = 0x90
    (tmp_path / "vmlinux").write_bytes(data)
    with pytest.raises(
        ElfError, match=f"1 of .* fentry sites do not hold the call .* at {site:#x}, holds 90 "
    ):
        Kernel.load(tmp_path / "vmlinux")
