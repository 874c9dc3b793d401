"""A kernel image with all that klpemu has to know about it: sections, symbols, struct layouts.

The image is what is installed as /boot/vmlinuz-RELEASE, or an ELF vmlinux.  Its symbols come from its
kallsyms or its ELF symbol table, unless a System.map is given; its layouts from its BTF.
"""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from elf.btf_layout import BtfLayouts, btf_layouts
from elf.errors import ElfError
from elf.image import Image, file_bytes
from elf.kallsyms_table import kernel_symbols
from elf.kernel_symbols import KernelSymbols, read_system_map
from elf.vmlinuz import decompressed
from klpemu.image_cache import CachedImage, ImageCache
from klpemu.stock_kernel import cache_directory

__all__ = ["KernelImage", "open_kernel_image"]

_BANNER: Final = "Linux version "


@dataclass(frozen=True)
class KernelImage:
    """One linked kernel; addresses are those it was linked at.

    `image.path` is the file that was given, `digest` the SHA-256 of its bytes in hex.
    """

    image: Image
    symbols: KernelSymbols
    layouts: BtfLayouts
    digest: str

    @cached_property
    def banner(self) -> str:
        """What `linux_banner` says (init/version.c), without the newline; empty if there is none."""
        if "linux_banner" not in self.symbols:
            return ""
        address = self.symbols.address_of("linux_banner")
        section = self.image.section_at(address)
        if section is None:
            return ""
        text = self.image.contents(section)[address - section.address :][:1024].tobytes()
        return text.partition(b"\0")[0].decode("utf-8", "backslashreplace").rstrip("\n")

    @property
    def release(self) -> str:
        """What `uname -r` says on this kernel; empty if the image does not tell."""
        return self.banner.removeprefix(_BANNER).partition(" ")[0]


def open_kernel_image(
    path: str | os.PathLike[str],
    *,
    system_map: str | os.PathLike[str] | None = None,
    cache: Path | None = None,
) -> KernelImage:
    """Read the kernel image `path`, from the cache if it has been read before.

    `system_map` gives the symbols in place of the image's own.  `cache` is the directory of the cache, by
    default one in `klpemu.stock_kernel.cache_directory()`.  Raises `ElfError` if the file is no kernel of
    x86-64, is damaged, or lacks symbols or BTF, and then names all that is missing.
    """
    data, name = file_bytes(path, "give /boot/vmlinuz-RELEASE or an ELF vmlinux")
    digest = hashlib.sha256(data).hexdigest()
    store = ImageCache(cache_directory() / "images" if cache is None else cache)
    cached = store.read(digest)
    if cached is None:
        vmlinux = decompressed(data, name)
        image = Image(vmlinux, name)
        # What was an ELF file already need not be kept a second time.
        cached = CachedImage(b"" if vmlinux is data else vmlinux, _symbols_of(image, []))
        store.write(digest, cached)
    else:
        image = Image(cached.vmlinux or data, name)
    missing: list[ElfError] = []
    symbols = cached.symbols
    if system_map is not None:
        symbols = read_system_map(system_map)
    elif symbols is None:
        symbols = _symbols_of(image, missing)
    layouts = _layouts_of(image, symbols, missing)
    if symbols is None or layouts is None:
        raise missing[0] if len(missing) == 1 else _all_of(missing)
    return KernelImage(image, symbols, layouts, digest)


def _symbols_of(image: Image, missing: list[ElfError]) -> KernelSymbols | None:
    try:
        return kernel_symbols(image)
    except ElfError as error:
        missing.append(error)
        return None


def _layouts_of(image: Image, symbols: KernelSymbols | None, missing: list[ElfError]) -> BtfLayouts | None:
    try:
        return btf_layouts(image, symbols)
    except ElfError as error:
        missing.append(error)
        return None


def _all_of(errors: list[ElfError]) -> ElfError:
    return ElfError(
        ", and ".join(error.what for error in errors),
        where=errors[0].where,
        advice="; ".join(error.advice for error in errors if error.advice),
    )
