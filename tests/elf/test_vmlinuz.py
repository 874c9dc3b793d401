"""From a bzImage to the ELF file inside: every method of compression, and what is said of other files."""

import bz2
import gzip
import lzma
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from struct import pack

import lz4.block
import pytest
import zstandard
from elf_writer import Section, elf_file
from hypothesis import given
from hypothesis import strategies as st
from kernel_image_writer import RELEASE, bzimage, with_size
from objects import tool

from elf.errors import ElfError
from elf.image import ET_EXEC
from elf.vmlinuz import decompressed, open_kernel, read_setup_header

VMLINUX = elf_file(Section(".text", bytes(range(256)) * 80, address=0xFFFF_FFFF_8100_0000, flags=6), type=2)
LZ4_BLOCK = 8 << 20


def lz4_legacy(data: bytes) -> bytes:
    pieces = (data[at : at + LZ4_BLOCK] for at in range(0, len(data), LZ4_BLOCK))
    blocks = [lz4.block.compress(piece, store_size=False) for piece in pieces]
    return b"\x02\x21\x4c\x18" + b"".join(pack("<I", len(block)) + block for block in blocks)


def xz(data: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 32 << 20}]
    return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters)


METHODS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bzip2": lambda data: with_size(bz2.compress(data), data),
    "lzma": lambda data: with_size(lzma.compress(data, lzma.FORMAT_ALONE), data),
    "xz": lambda data: with_size(xz(data), data),
    "lz4": lambda data: with_size(lz4_legacy(data), data),
    "zstd": lambda data: with_size(zstandard.compress(data), data),
}
IMAGES = {method: bzimage(compress(VMLINUX)) for method, compress in METHODS.items()}
# The commands of scripts/Makefile.lib.
COMMANDS = {
    "gzip": "gzip -n -f -9",
    "bzip2": "bzip2 -9",
    "lzma": "xz --format=lzma -9",
    "xz": "xz --check=crc32 --x86 --lzma2=,dict=32MiB",
    "lz4": "lz4 -l -9 - -",
    "zstd": "zstd -22 --ultra",
}
each_method = pytest.mark.parametrize("method", METHODS)


@each_method
def test_the_elf_file_comes_out_of_each_method(method: str) -> None:
    assert decompressed(IMAGES[method], "vmlinuz") == VMLINUX


@each_method
def test_what_the_tools_of_the_kernel_build_write_is_read(method: str) -> None:
    program, *options = COMMANDS[method].split()
    done = subprocess.run([tool(program), *options], input=VMLINUX, check=True, capture_output=True)
    payload = done.stdout if method == "gzip" else with_size(done.stdout, VMLINUX)
    assert decompressed(bzimage(payload), "vmlinuz") == VMLINUX


def test_lz4_of_several_blocks_and_frames_is_joined() -> None:
    large = VMLINUX + bytes(LZ4_BLOCK) + b"end"
    assert decompressed(bzimage(with_size(lz4_legacy(large), large)), "vmlinuz") == large
    twice = lz4_legacy(VMLINUX) + lz4_legacy(b"more")
    assert decompressed(bzimage(with_size(twice, VMLINUX + b"more")), "vmlinuz") == VMLINUX + b"more"


def test_a_kernel_is_opened_as_an_image(tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").write_bytes(IMAGES["xz"])
    image = open_kernel(tmp_path / "vmlinuz")
    assert (image.type, image.path) == (ET_EXEC, str(tmp_path / "vmlinuz"))
    assert image.section_at(0xFFFF_FFFF_8100_0000) == image.section(".text")


def test_an_elf_file_is_passed_through(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(VMLINUX)
    assert open_kernel(tmp_path / "vmlinux").section(".text") is not None


def test_the_setup_header_says_which_release_it_is() -> None:
    header = read_setup_header(IMAGES["xz"], "vmlinuz")
    assert (header.protocol, header.release) == (0x20F, RELEASE)
    assert IMAGES["xz"][header.payload_offset :].startswith(b"\xfd7zXZ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "neither a bzImage nor an ELF file; give /boot/vmlinuz-RELEASE"),
        (b"text\n" * 1000, "neither a bzImage nor an ELF file"),
        (gzip.compress(VMLINUX), "a gzip file, not a bzImage; gunzip it"),
        (bytes(56) + b"ARMd" + bytes(4096), "a kernel image of arm64; give /boot/vmlinuz-RELEASE"),
        (b"MZ" + bytes(46) + b"RISCV" + bytes(4096), "a kernel image of RISC-V"),
        (b"MZ" + bytes(4096), "a PE file without the setup header of a bzImage; if it is a unified"),
        (bzimage(METHODS["xz"](VMLINUX), xloadflags=0x7E), "a 32-bit kernel (XLF_KERNEL_64 is not set)"),
        (bzimage(METHODS["xz"](VMLINUX), protocol=0x207), "boot protocol 2.07; the payload"),
        (IMAGES["xz"][:1100], "payload of 0x"),
        (bzimage(b"\x89LZO\0\r\n\x1a\n" + bytes(20) + pack("<I", 9)), "compressed with LZO, for which"),
        (bzimage(b"unknown!" + pack("<I", 9)), "in an unknown way, it begins with 75 6e 6b 6e 6f 77; run"),
        (bzimage(with_size(lz4_legacy(VMLINUX)[:-5], VMLINUX)), "lz4 data cannot be decompressed: a block"),
        (bzimage(METHODS["xz"](b"no ELF")), "the payload holds no ELF file but 6e 6f 20 45"),
        (bzimage(METHODS["xz"](VMLINUX), length=3), "payload of 0x3 bytes at file offset 0x410"),
        (bzimage(xz(VMLINUX) + pack("<I", len(VMLINUX) - 1)), f"more than {len(VMLINUX) - 1:#x} bytes after"),
        (bzimage(xz(VMLINUX) + pack("<I", len(VMLINUX) + 1)), f"only {len(VMLINUX):#x} bytes after"),
        (bzimage(xz(VMLINUX) + pack("<I", 0xFFFF_FFFF)), "0xffffffff bytes announced, more than a kernel"),
        (bzimage(xz(VMLINUX)[:-40] + pack("<I", len(VMLINUX))), "bytes after decompression of xz data"),
    ],
)  # fmt: skip
def test_other_files_are_refused_with_what_they_are_and_what_to_give(data: bytes, message: str) -> None:
    with pytest.raises(ElfError) as raised:
        decompressed(data, "file")
    assert str(raised.value).startswith("file: ")
    assert message in str(raised.value)


@pytest.mark.parametrize(("method", "package"), [("lz4", "lz4"), ("zstd", "zstandard")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, method: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ElfError, match=f"the Python package {package} is missing; pip install {package}"):
        decompressed(IMAGES[method], "vmlinuz")


@given(st.sampled_from(sorted(IMAGES)), st.data())
def test_a_damaged_image_is_read_or_refused(method: str, data: st.DataObject) -> None:
    damaged = bytearray(IMAGES[method])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.none() | st.integers(0, len(damaged)))
    with suppress(ElfError):
        assert decompressed(bytes(damaged[:end]), "vmlinuz").startswith(b"\x7fELF")
