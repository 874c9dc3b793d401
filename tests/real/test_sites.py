"""The fentry sites of the stock modules are those that readelf and objdump show."""

import os
import random
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from elf.image import Image
from elf.mcount import SiteKind, fentry_sites
from klpemu.stock_kernel import StockKernel

SEED = 6_1
SAMPLE = 200
FILES_AT_ONCE = 50

# Section name and section offset, in bytes.
Place = tuple[str, int]

READELF_FILE = re.compile(r"^File: (.*)$", re.MULTILINE)
TABLE = re.compile(r"^Relocation section '\.rela__mcount_loc' at offset \S+ contains (\d+) ", re.MULTILINE)
ENTRY = re.compile(r"^[0-9a-f]{16}  [0-9a-f]{16} R_X86_64_64 +0{16} (\.\S+) \+ ([0-9a-f]+)$", re.MULTILINE)
OBJDUMP_FILE = re.compile(r"^(/.*):     file format elf64-x86-64$", re.MULTILINE)
CODE_SECTION = re.compile(r"^Disassembly of section (.*):$", re.MULTILINE)
FENTRY_CALL = re.compile(
    r"^ *([0-9a-f]+):\te8 00 00 00 00 +\tcall .*\n\t+[0-9a-f]+: R_X86_64_(?:PLT|PC)32\t__fentry__-0x4$",
    re.MULTILINE,
)


def batches(modules: Sequence[Path]) -> Iterator[Sequence[Path]]:
    """Batches of about equal size: given one file, readelf would not print its name."""
    count = -(-len(modules) // FILES_AT_ONCE)
    return (modules[number::count] for number in range(count))


def shown_by(*command: str, files: Sequence[Path], each_file: re.Pattern[str]) -> Iterator[tuple[Path, str]]:
    """What a binutils tool prints about each of `files`."""
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run([*command, *files], check=True, capture_output=True, text=True, env=environment)
    _, *parts = each_file.split(done.stdout)
    shown = dict(zip(map(Path, parts[::2]), parts[1::2], strict=True))
    assert list(shown) == list(files)
    yield from shown.items()


def table_by_readelf(text: str) -> list[Place]:
    """The relocations of `__mcount_loc`, in its order."""
    table = TABLE.search(text)
    if table is None:
        return []
    section, _, _ = text[table.start() :].partition("\n\n")
    entries = [(symbol, int(addend, 16)) for symbol, addend in ENTRY.findall(section)]
    assert len(entries) == int(table[1]), f"readelf printed something else:\n{section[:1000]}"
    return entries


def calls_by_objdump(text: str) -> list[Place]:
    """Every `call` with a relocation against `__fentry__`, sorted."""
    _, *parts = CODE_SECTION.split(text)
    return sorted(
        (section, int(offset, 16))
        for section, code in zip(parts[::2], parts[1::2], strict=True)
        for offset in FENTRY_CALL.findall(code)
    )


def check_against_binutils(modules: Sequence[Path]) -> int:
    """Compare all three for each module; the number of sites."""
    count = 0
    for batch in batches(modules):
        tables = shown_by("readelf", "-rW", files=batch, each_file=READELF_FILE)
        codes = shown_by("objdump", "-dr", files=batch, each_file=OBJDUMP_FILE)
        for (path, table), (_, code) in zip(tables, codes, strict=True):
            image = Image.open(path)
            sites = fentry_sites(image)
            ours = [(image.sections[site.section].name, site.address) for site in sites]
            assert ours == table_by_readelf(table), path.name
            assert sorted(ours) == calls_by_objdump(code), path.name
            assert {site.kind for site in sites} <= {SiteKind.CALL}, path.name
            count += len(sites)
    return count


def test_a_sample_of_modules_has_the_sites_that_binutils_shows(stock_kernel: StockKernel) -> None:
    sample = random.Random(SEED).sample(stock_kernel.modules, SAMPLE)
    assert check_against_binutils(sample) > 2_000


@pytest.mark.slow
def test_every_module_has_the_sites_that_binutils_shows(stock_kernel: StockKernel) -> None:
    assert check_against_binutils(stock_kernel.modules) > 150_000


def test_crc7_has_no_site(stock_kernel: StockKernel) -> None:
    assert fentry_sites(Image.open(stock_kernel.module("crc7"))) == []
