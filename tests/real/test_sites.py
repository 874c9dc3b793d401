"""The fentry sites of the stock modules are those that readelf and objdump show."""

import random
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from itertools import batched
from pathlib import Path

import pytest

from elf.image import Image
from elf.mcount import SiteKind, fentry_sites
from klpemu.stock_kernel import StockKernel

SEED = 20240917
SAMPLE = 200
FILES_AT_ONCE = 100

# Of one file: section name and section offset.
Place = tuple[str, int]

SITE_TABLE = re.compile(r"^Relocation section '\.rela__mcount_loc' at .* contains (\d+) entr", re.MULTILINE)
SITE_ENTRY = re.compile(r"^([0-9a-f]{16})  [0-9a-f]{16} R_X86_64_64 +0{16} (\S+) \+ ([0-9a-f]+)$", re.MULTILINE)
CODE_SECTION = re.compile(r"^Disassembly of section (.*):\n", re.MULTILINE)
FENTRY_CALL = re.compile(
    r"^ *([0-9a-f]+):\te8 00 00 00 00 +\tcall .*\n\t+[0-9a-f]+: R_X86_64_P(?:LT|C)32\t__fentry__-0x4$",
    re.MULTILINE,
)


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, env={"LC_ALL": "C"}).stdout
