"""A kernel image opened whole: from vmlinuz or vmlinux, from the cache or not, and what is missing."""

import lzma
from pathlib import Path
from struct import pack

import pytest
from btf_writer import BtfWriter
from elf_writer import Section, elf_file
from kernel_image_writer import RODATA, TEXT, Row, bzimage, kallsyms, with_size

from elf.errors import ElfError
from klpemu import kernel_image
from klpemu.kernel_image import open_kernel_image

BANNER = RODATA + 0x10
ROWS: list[Row] = [("_text", "T", TEXT), ("linux_banner", "D", BANNER), ("_end", "B", RODATA + 0x10000)]
RODATA_START = bytes(16) + b"Linux version 6.1.0-test (someone) #1\n\0"


def btf() -> bytes:
    writer = BtfWriter()
    writer.struct("klp_ops", 216)
    return writer.data()


def vmlinux(*, with_kallsyms: bool = True, with_btf: bool = True) -> bytes:
    rodata = kallsyms(ROWS, before=RODATA_START) if with_kallsyms else RODATA_START
    sections = [
        Section(".text", bytes(64), address=TEXT, flags=6),
        Section(".rodata", rodata, address=RODATA),
    ]
    if with_btf:
        sections.append(Section(".BTF", btf(), address=RODATA + 0x8000))
    return elf_file(*sections, type=2)


def written(folder: Path, data: bytes) -> Path:
    (folder / "kernel").write_bytes(data)
    return folder / "kernel"


def compressed(data: bytes) -> bytes:
    return bzimage(with_size(lzma.compress(data), data))


@pytest.mark.parametrize("form", [compressed, bytes])
def test_an_image_has_its_symbols_its_layouts_and_its_release(tmp_path: Path, form: type[bytes]) -> None:
    path = written(tmp_path, form(vmlinux()))
    for _ in ("read", "from the cache"):
        kernel = open_kernel_image(path, cache=tmp_path / "cache")
        assert list(kernel.symbols) == ROWS
        assert kernel.layouts["klp_ops"].size == 216
        assert (kernel.release, kernel.banner) == ("6.1.0-test", "Linux version 6.1.0-test (someone) #1")
        assert kernel.image.path == str(path)
        assert kernel.image.section_at(TEXT) is not None


def test_the_second_start_decompresses_and_decodes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, compressed(vmlinux()))
    first = open_kernel_image(path, cache=tmp_path / "cache")
    monkeypatch.setattr(kernel_image, "decompressed", None)
    monkeypatch.setattr(kernel_image, "kernel_symbols", None)
    second = open_kernel_image(path, cache=tmp_path / "cache")
    assert list(second.symbols) == list(first.symbols)
    assert second.digest == first.digest


def test_another_content_under_the_same_name_is_another_image(tmp_path: Path) -> None:
    first = open_kernel_image(written(tmp_path, compressed(vmlinux())), cache=tmp_path / "cache")
    ROWS.append(("added", "B", RODATA + 0x20000))
    try:
        second = open_kernel_image(written(tmp_path, compressed(vmlinux())), cache=tmp_path / "cache")
    finally:
        ROWS.pop()
    assert "added" in second.symbols
    assert "added" not in first.symbols


def test_a_damaged_entry_is_built_anew(tmp_path: Path) -> None:
    path = written(tmp_path, compressed(vmlinux()))
    open_kernel_image(path, cache=tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-1] + b"\xaa")
    assert list(open_kernel_image(path, cache=tmp_path / "cache").symbols) == ROWS
    assert entry.read_bytes() == whole


@pytest.mark.parametrize(
    ("with_kallsyms", "with_btf", "message"),
    [
        (False, True, r"kernel: no kallsyms token table; give .*, or a System.map"),
        (True, False, r"kernel: no BTF; give an image with CONFIG_DEBUG_INFO_BTF=y"),
        (
            False,
            False,
            r"kernel: no kallsyms token table, and no BTF; give .*; give an image with CONFIG_DEBUG",
        ),
    ],
)
def test_all_that_is_missing_is_named(
    tmp_path: Path, with_kallsyms: bool, with_btf: bool, message: str
) -> None:
    path = written(tmp_path, compressed(vmlinux(with_kallsyms=with_kallsyms, with_btf=with_btf)))
    for _ in ("read", "from the cache"):
        with pytest.raises(ElfError, match=message):
            open_kernel_image(path, cache=tmp_path / "cache")


def test_a_system_map_gives_the_symbols_that_the_image_lacks(tmp_path: Path) -> None:
    path = written(tmp_path, compressed(vmlinux(with_kallsyms=False)))
    (tmp_path / "System.map").write_text(
        "".join(f"{address:016x} {type_} {name}\n" for name, type_, address in ROWS)
    )
    for _ in ("read", "from the cache"):
        kernel = open_kernel_image(path, system_map=tmp_path / "System.map", cache=tmp_path / "cache")
        assert list(kernel.symbols) == ROWS
        assert kernel.release == "6.1.0-test"


def test_a_file_that_is_no_kernel_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    for data in (b"text", bzimage(b"unknown" + pack("<I", 9)), compressed(b"\x7fELF")):
        with pytest.raises(ElfError):
            open_kernel_image(written(tmp_path, data), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
