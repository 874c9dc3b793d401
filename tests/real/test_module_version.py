"""A module that was built for another kernel is found out before anything of it runs."""

from pathlib import Path

import pytest

from elf.image import Image
from emu.errno import KernelErrno
from emu.module_version import versions
from klpemu import Kernel
from klpemu.livepatch_modules import LivepatchModules
from klpemu.stock_kernel import StockKernel


@pytest.fixture(scope="module")
def kernel(stock_kernel: StockKernel) -> Kernel:
    return Kernel.load(stock_kernel.vmlinuz)


@pytest.fixture
def module(livepatch_modules: LivepatchModules) -> bytes:
    return livepatch_modules.test_modules["test_klp_livepatch"].read_bytes()


def refused(kernel: Kernel, path: Path, data: bytes) -> str:
    """Why the kernel does not load a module, of which nothing stays behind."""
    path.write_bytes(data)
    before = kernel.verify().checks
    with pytest.raises(KernelErrno) as caught:
        kernel.modprobe(path)
    kernel.verify().raise_for_findings()
    assert kernel.verify().checks == before
    return str(caught.value)


def with_another_checksum(module: bytes, symbol: str) -> bytes:
    at = module.index(symbol.encode() + b"\0") - 8
    return module[:at] + bytes(byte ^ 0x55 for byte in module[at : at + 4]) + module[at + 4 :]


def test_checksums_are_those_of_the_kernel(kernel: Kernel, stock_kernel: StockKernel) -> None:
    """__versions of every tenth module against the image's __kcrctab: all agree, and most are found."""
    exports, found = kernel.machine.modules.exports, 0
    for path in stock_kernel.modules[::10]:
        for symbol, crc in versions(Image.open(path)).items():
            exported = exports.find_symbol(symbol, gplok=True)
            if exported is not None:
                found += 1
                assert exported.crc == crc, (path.name, symbol)
    assert found > 10_000


def test_another_struct_module_is_refused(kernel: Kernel, module: bytes, tmp_path: Path) -> None:
    text = refused(kernel, tmp_path / "other.ko", with_another_checksum(module, "module_layout"))
    assert "disagrees about version of symbol module_layout (-ENOEXEC)" in text
    assert kernel.log[-1] == "test_klp_livepatch: disagrees about version of symbol module_layout"


def test_a_symbol_that_changed_is_refused_and_named(kernel: Kernel, module: bytes, tmp_path: Path) -> None:
    text = refused(kernel, tmp_path / "other.ko", with_another_checksum(module, "klp_enable_patch"))
    assert "disagrees about version of symbol klp_enable_patch (-EINVAL)" in text
    assert kernel.log[-2:] == [
        "test_klp_livepatch: disagrees about version of symbol klp_enable_patch",
        "test_klp_livepatch: Unknown symbol klp_enable_patch (err -22)",
    ]


def test_another_vermagic_is_refused_with_both(kernel: Kernel, module: bytes, tmp_path: Path) -> None:
    text = refused(kernel, tmp_path / "other.ko", module.replace(b"SMP preempt ", b"SMP preemxt "))
    assert "version magic '" in text
    assert "SMP preemxt mod_unload" in text
    assert "should be '" in text


def test_another_release_with_the_same_checksums_is_told_and_loaded(
    stock_kernel: StockKernel, module: bytes, tmp_path: Path
) -> None:
    """same_magic(): with checksums the release does not matter."""
    kernel = Kernel.load(stock_kernel.vmlinuz)
    release = stock_kernel.release.encode()
    other = release.replace(b"6.1.", b"6.2.")
    (tmp_path / "other.ko").write_bytes(module.replace(b"vermagic=" + release, b"vermagic=" + other))
    kernel.modprobe(tmp_path / "other.ko")
    line = (
        f"klpemu: test_klp_livepatch: built for {other.decode()}, and this kernel is {stock_kernel.release}"
    )
    assert line in kernel.log
