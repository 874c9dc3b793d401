"""Kernel images as they are after decompression and decoding, kept from one start to the next.

One file for each image, named by the SHA-256 of what was given.  Its form is made to be read at once: a line
of magic, the SHA-256 of the rest, then parts, each a length and its bytes.  A file appears under its name
only when it is complete; one that does not check is as good as none, and the next start writes it anew.
"""

import fcntl
import hashlib
import os
import tempfile
from array import array
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Final

from elf.kernel_symbols import KernelSymbols

__all__ = ["CachedImage", "ImageCache"]

# The number changes with the form and with what the readers make of an image.
_MAGIC: Final = b"klpemu kernel image 1\n"
_DIGEST_BYTES: Final = hashlib.sha256().digest_size
_LENGTH: Final = Struct("<Q")
_PARTS: Final = 4
_UNFINISHED: Final = ".write-"


@dataclass(frozen=True, slots=True)
class CachedImage:
    """What an image comes to: the bytes of its ELF vmlinux, and its symbols if it has any."""

    vmlinux: bytes
    symbols: KernelSymbols | None


class ImageCache:
    """The cache in `directory`, which need not exist yet.

    What cannot be read or written there (no permission, no space) is not an error: it costs time only.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def read(self, digest: str) -> CachedImage | None:
        """The image of which `digest` is the SHA-256; None if it is not there, or damaged."""
        try:
            data = self._file(digest).read_bytes()
        except OSError:
            return None
        return _decoded(data)

    def write(self, digest: str, cached: CachedImage) -> None:
        """Keep `cached`; safe against other writers and against being killed at any moment."""
        body = _encoded(cached)
        with suppress(OSError):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            with tempfile.NamedTemporaryFile(prefix=_UNFINISHED, dir=self.directory, delete=False) as file:
                # Held until the file has its name: what is unfinished and not locked belongs to nobody.
                fcntl.flock(file, fcntl.LOCK_EX)
                try:
                    for part in (_MAGIC, hashlib.sha256(body).digest(), body):
                        file.write(part)
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(file.name, self._file(digest))
                except BaseException:
                    with suppress(OSError):
                        os.unlink(file.name)
                    raise
            _sync_directory(self.directory)

    def _file(self, digest: str) -> Path:
        return self.directory / f"{digest}.image"

    def _remove_unfinished(self) -> None:
        """Remove what killed writers have left."""
        for path in self.directory.glob(f"{_UNFINISHED}*"):
            with suppress(OSError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encoded(cached: CachedImage) -> bytes:
    symbols = cached.symbols
    parts = [cached.vmlinux, b"", b"", b""]
    if symbols is not None:
        # Names hold no NUL: that is what ends them where they come from.
        names = "\0".join(symbols.names)
        parts[1:] = [names.encode(), symbols.types.encode("latin-1"), array("Q", symbols.addresses).tobytes()]
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def _decoded(data: bytes) -> CachedImage | None:
    start = len(_MAGIC) + _DIGEST_BYTES
    body = memoryview(data)[start:]
    if not data.startswith(_MAGIC) or hashlib.sha256(body).digest() != data[len(_MAGIC) : start]:
        return None
    parts = []
    at = 0
    for _ in range(_PARTS):
        (length,) = _LENGTH.unpack_from(body, at)
        at += _LENGTH.size
        parts.append(body[at : at + length])
        at += length
    vmlinux, names, types, addresses = parts
    if not len(addresses):
        return CachedImage(bytes(vmlinux), None)
    columns = str(names, "utf-8").split("\0"), str(types, "latin-1"), array("Q", addresses.tobytes())
    return CachedImage(bytes(vmlinux), KernelSymbols(*columns))
