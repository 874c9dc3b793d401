"""Damaged objects, all the way: only KlpemuError ever comes out, and nothing of them stays behind."""

import random
from pathlib import Path

import pytest

from klpemu import Func, Kernel, KlpemuError, Patch

BUILD = Path(__file__).resolve().parents[2] / "fixtures" / "build"
FUNCS = {
    "fix_area.o": [Func("area_of", "fixed_area_of"), Func("perimeter_of", "fixed_perimeter_of")],
    "fix_all.o": [Func("fib", "fixed_fib"), Func("mix", "fixed_mix")],
}
OTHERS = ["klp_area.ko", "klp_lamp.ko", "endbr.o", "late_site.o"]


def damage(data: bytearray, chance: random.Random) -> bytearray:
    """A few fields overwritten, more of them near the tables at the end; sometimes cut short."""
    for _ in range(chance.randint(1, 4)):
        first = 0 if chance.random() < 0.6 else max(0, len(data) - 3000)
        at, size = chance.randrange(first, len(data)), chance.choice([1, 1, 2, 4, 8])
        fill = chance.choice([b"\0" * 8, b"\xff" * 8, chance.randbytes(8)])
        data[at : at + size] = fill[: min(size, len(data) - at)]
    return data[: chance.randrange(len(data))] if chance.random() < 0.1 else data


def refusal(kernel: Kernel, path: Path) -> str:
    """Do what a user does with such a file; returns the error, or the empty string if it works."""
    try:
        if path.name in FUNCS:
            kernel.enable(Patch("damaged", {"vmlinux": FUNCS[path.name]}, code=path))
        elif path.suffix == ".ko":
            kernel.insmod(path)
        else:
            kernel.load_module(path)
    except KlpemuError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("seed", "count"),
    [(1, 120), (2, 120), pytest.param(3, 1500, marks=pytest.mark.slow)],
)
def test_a_damaged_object_is_refused_whole_or_works(tmp_path: Path, seed: int, count: int) -> None:
    chance = random.Random(seed)
    refused = 0
    for _ in range(count):
        name = chance.choice([*FUNCS, *OTHERS])
        path = tmp_path / name
        path.write_bytes(damage(bytearray((BUILD / name).read_bytes()), chance))
        kernel = Kernel.load()
        kernel.machine.hub.instruction_budget = 20_000
        error = refusal(kernel, path)
        report = kernel.verify(f"{name} damaged")
        if error:
            refused += 1
            assert "\n" not in error
            assert report.holds, (error, [str(each) for each in report.findings])
            assert kernel.call("area_of", 3, 4) == 7
    assert 0 < refused < count
