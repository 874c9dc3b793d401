"""The compressed kernel image as it is installed, a bzImage: from it to the ELF vmlinux inside.

Source of the rules: Documentation/x86/boot.rst of 6.1 (the setup header, boot protocol 2.08 and later), the
table of magic numbers in lib/decompress.c, and cmd_*_with_size in scripts/Makefile.lib (the last four bytes
of the payload are the size of what is in it; gzip has that of its own accord).
"""

import bz2
import lzma
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import Final

from elf.errors import ElfError
from elf.image import Image, file_bytes

__all__ = ["SetupHeader", "decompressed", "open_kernel", "read_setup_header"]

_SECTOR: Final = 512
_SETUP_SECTS: Final = 0x1F1
_MAGIC: Final = 0x202
_PROTOCOL: Final = Struct("<H")  # at 0x206
_KERNEL_VERSION: Final = 0x20E
_XLOADFLAGS: Final = 0x236
_PAYLOAD: Final = Struct("<II")  # at 0x248: offset and length
_HEADER_END: Final = 0x250
_PROTOCOL_WITH_PAYLOAD: Final = 0x208
_PROTOCOL_WITH_XLOADFLAGS: Final = 0x20C
_XLF_KERNEL_64: Final = 1
# The longest release and build string is two utsname fields of 65 bytes and what stands between them.
_LONGEST_VERSION: Final = 512

_SIZE: Final = Struct("<I")
# KERNEL_IMAGE_SIZE with CONFIG_RANDOMIZE_BASE: no image of x86-64 is larger.
_LARGEST_IMAGE: Final = 1 << 30
_MEMORY_LIMIT: Final = 1 << 30
_LZ4_LEGACY_BLOCK: Final = 8 << 20

_ADVICE: Final = "give /boot/vmlinuz-RELEASE of an x86-64 kernel, or the ELF vmlinux it was made from"
_OTHER_FILES: Final = (
    (0, b"\x1f\x8b", "a gzip file, not a bzImage", "gunzip it and give what comes out"),
    (56, b"ARMd", "a kernel image of arm64", _ADVICE),
    (48, b"RISCV", "a kernel image of RISC-V", _ADVICE),
    (0, b"MZ", "a PE file without the setup header of a bzImage",
     "if it is a unified kernel image, take the kernel out: objcopy -O binary --only-section=.linux"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SetupHeader:
    """What the setup header of a bzImage says.

    `protocol` is the boot protocol (0x20f for 2.15), `version` the text that `file` shows, which begins with
    the release, `payload_offset` and `payload_length` the compressed kernel as a file offset and bytes.
    """

    protocol: int
    version: str
    payload_offset: int
    payload_length: int

    @property
    def release(self) -> str:
        """What `uname -r` says on this kernel; empty if the header has no version text."""
        return self.version.partition(" ")[0]


def open_kernel(path: str | os.PathLike[str]) -> Image:
    """The ELF vmlinux in the kernel image `path`; one that is an ELF file already is parsed as it is.

    Raises `ElfError` for what is no x86-64 kernel, is compressed in an unknown way, or is damaged.
    """
    data, name = file_bytes(path, _ADVICE)
    return Image(decompressed(data, name), name)


def decompressed(data: bytes, path: str) -> bytes:
    """The bytes of the ELF vmlinux in the kernel image `data`; `path` is the name used in messages.

    An ELF file is returned as it is.  Raises `ElfError` as `open_kernel` does.
    """
    if data[:4] == b"\x7fELF":
        return data
    header = read_setup_header(data, path)
    end = header.payload_offset + header.payload_length
    vmlinux = _unpacked(data[header.payload_offset : end], path)
    if vmlinux[:4] != b"\x7fELF":
        raise ElfError(
            f"the payload holds no ELF file but {vmlinux[:4].hex(' ')}", where=path, advice=_ADVICE
        )
    return vmlinux


def read_setup_header(data: bytes, path: str) -> SetupHeader:
    """The setup header of the bzImage `data`; `ElfError` if there is none, or not one of x86-64."""
    where = f"{path}: setup header"
    if len(data) < _HEADER_END or data[_MAGIC : _MAGIC + 4] != b"HdrS":
        for offset, magic, found, advice in _OTHER_FILES:
            if data[offset : offset + len(magic)] == magic:
                raise ElfError(found, where=path, advice=advice)
        raise ElfError("neither a bzImage nor an ELF file", where=path, advice=_ADVICE)
    (protocol,) = _PROTOCOL.unpack_from(data, 0x206)
    if protocol < _PROTOCOL_WITH_PAYLOAD:
        raise ElfError(
            f"boot protocol {protocol >> 8}.{protocol & 0xFF:02}; the payload is described since 2.08",
            where=where,
            advice="give the ELF vmlinux of this kernel",
        )
    (xloadflags,) = _PROTOCOL.unpack_from(data, _XLOADFLAGS)
    if protocol >= _PROTOCOL_WITH_XLOADFLAGS and not xloadflags & _XLF_KERNEL_64:
        raise ElfError("a 32-bit kernel (XLF_KERNEL_64 is not set)", where=where, advice=_ADVICE)
    # Kernels from before the field existed have four sectors and say 0.
    setup_bytes = ((data[_SETUP_SECTS] or 4) + 1) * _SECTOR
    offset, length = _PAYLOAD.unpack_from(data, 0x248)
    start = setup_bytes + offset
    if length <= _SIZE.size or start + length > len(data):
        raise ElfError(
            f"payload of {length:#x} bytes at file offset {start:#x}; the file ends at {len(data):#x}",
            where=where,
            advice="the file is truncated: copy it again",
        )
    return SetupHeader(protocol, _version_text(data), start, length)


def _version_text(data: bytes) -> str:
    (pointer,) = _PROTOCOL.unpack_from(data, _KERNEL_VERSION)
    if not pointer:
        return ""
    text = data[pointer + 0x200 : pointer + 0x200 + _LONGEST_VERSION].partition(b"\0")[0]
    return text.decode("utf-8", "backslashreplace")


def _unpacked(payload: bytes, path: str) -> bytes:
    where = f"{path}: payload"
    for magic, method, unpack in _METHODS:
        if not payload.startswith(magic):
            continue
        (size,) = _SIZE.unpack_from(payload, len(payload) - _SIZE.size)
        if not 0 < size <= _LARGEST_IMAGE:
            raise ElfError(f"{size:#x} bytes announced, more than a kernel can have", where=where)
        try:
            # One byte more than announced, to notice what is larger.
            data = unpack(payload if method == "gzip" else payload[: -_SIZE.size], size + 1)
        except ElfError as error:
            raise ElfError(error.what, where=where, advice=error.advice) from error.__cause__
        except _FAILURES as error:
            raise ElfError(
                f"{method} data cannot be decompressed: {error or type(error).__name__}",
                where=where,
                advice=_DAMAGED,
            ) from error
        if len(data) != size:
            found = f"more than {size:#x}" if len(data) > size else f"only {len(data):#x}"
            raise ElfError(
                f"{found} bytes after decompression of {method} data, {size:#x} announced",
                where=where,
                advice=_DAMAGED,
            )
        return data
    raise ElfError(
        f"compressed in an unknown way, it begins with {payload[:6].hex(' ')}",
        where=where,
        advice=_EXTRACT,
    )


_EXTRACT: Final = "run the kernel's scripts/extract-vmlinux on it and give the vmlinux that comes out"
_DAMAGED: Final = "the file is damaged: copy it again"
_FAILURES: Final = (zlib.error, lzma.LZMAError, OSError, EOFError, MemoryError, ValueError, RuntimeError)


def _gzip(payload: bytes, limit: int) -> bytes:
    return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(payload, limit)


def _bzip2(payload: bytes, limit: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(payload, limit)


def _lzma(payload: bytes, limit: int) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_ALONE, _MEMORY_LIMIT).decompress(payload, limit)


def _xz(payload: bytes, limit: int) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, _MEMORY_LIMIT).decompress(payload, limit)


def _lzo(payload: bytes, limit: int) -> bytes:
    raise ElfError("compressed with LZO, for which there is no decompressor here", advice=_EXTRACT)


def _lz4(payload: bytes, limit: int) -> bytes:
    """The legacy frame of lz4 -l: a magic number, then blocks, each after its compressed size."""
    try:
        from lz4 import block
    except ImportError:
        raise _missing("LZ4", "lz4") from None
    blocks: list[bytes] = []
    total, at = 0, 4
    while at + _SIZE.size <= len(payload) and total < limit:
        (size,) = _SIZE.unpack_from(payload, at)
        if payload.startswith(b"\x02\x21\x4c\x18", at):
            at += 4  # another frame
            continue
        at += _SIZE.size
        if not 0 < size <= len(payload) - at:
            raise ValueError(f"a block of {size:#x} bytes where {len(payload) - at:#x} are left")
        try:
            piece = block.decompress(payload[at : at + size], uncompressed_size=_LZ4_LEGACY_BLOCK)
        except block.LZ4BlockError as error:
            raise ValueError(str(error)) from error
        blocks.append(piece)
        total += len(blocks[-1])
        at += size
    return b"".join(blocks)


def _zstd(payload: bytes, limit: int) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise _missing("Zstandard", "zstandard") from None
    try:
        with zstandard.ZstdDecompressor().stream_reader(payload) as stream:
            return stream.read(limit)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


def _missing(method: str, package: str) -> ElfError:
    return ElfError(
        f"compressed with {method}, and the Python package {package} is missing",
        advice=f"pip install {package}",
    )


_METHODS: Final[tuple[tuple[bytes, str, Callable[[bytes, int], bytes]], ...]] = (
    (b"\x1f\x8b", "gzip", _gzip),
    (b"\x1f\x9e", "gzip", _gzip),
    (b"BZh", "bzip2", _bzip2),
    (b"\x5d\x00", "lzma", _lzma),
    (b"\xfd7zXZ\x00", "xz", _xz),
    (b"\x89LZO", "lzo", _lzo),
    (b"\x02\x21\x4c\x18", "lz4", _lz4),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
)
