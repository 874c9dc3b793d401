"""Hundreds of functions of the kernel that people run, chosen by a seed, patched at once and one by one."""

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from objects import compiled

from elf.errors import KlpemuError
from klpemu import Func, Kernel, Patch
from klpemu.stock_kernel import StockKernel

SEED = 20_261
COUNT = 500
ONE_BY_ONE = 60
NOP5 = bytes.fromhex("0f1f440000")
# Functions that need nothing but their arguments: what they return is known.
RUNNABLE = {
    "int_sqrt": ((1 << 40,), 1 << 20),
    "gcd": ((48, 36), 12),
    "lcm": ((4, 6), 12),
    "int_pow": ((3, 20), 3**20),
    "mktime64": ((2024, 2, 29, 12, 0, 0), 1_709_208_000),
}


@pytest.fixture(scope="module")
def replacements(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An object with functions `new_0` and so on, each of which returns its number."""
    source = "\n".join(f"unsigned long new_{n}(void) {{ return 1000000 + {n}; }}" for n in range(COUNT))
    return compiled(tmp_path_factory.mktemp("replacements"), source, "-O2", "-g0")


def patch_of(names: Sequence[str], code: Path, module: str = "vmlinux") -> Patch:
    return Patch("fix_many", {module: [Func(name, f"new_{n}") for n, name in enumerate(names)]}, str(code))


def patchable(kernel: Kernel, sites: Iterable[int], module: str = "") -> Iterator[str]:
    """The functions that the sites belong to, where the name stands for one function alone."""
    kallsyms = kernel.machine.kallsyms
    for site in sites:
        symbol = kallsyms.at(site)
        if symbol is None or len(kallsyms.named(symbol.name, module)) > 1:
            continue
        if kernel.machine.ftrace.ftrace_location(symbol.address) == site:
            yield symbol.name


@pytest.fixture(scope="module")
def kernel(stock_kernel: StockKernel) -> Kernel:
    return Kernel.load(stock_kernel.vmlinuz)


@pytest.fixture(scope="module")
def chosen(kernel: Kernel) -> list[str]:
    """What can run is among them."""
    sites = kernel.machine.modules.objects[""].sites[:]
    random.Random(SEED).shuffle(sites)
    names = dict.fromkeys(RUNNABLE)
    for name in patchable(kernel, sites):
        names[name] = None
        if len(names) == COUNT:
            break
    return [*names]


def calls(kernel: Kernel) -> dict[str, int]:
    return {name: kernel.call(name, *arguments) for name, (arguments, _) in RUNNABLE.items()}


def test_hundreds_of_functions_of_the_image_are_redirected_at_once_and_restored(
    kernel: Kernel, chosen: list[str], replacements: Path
) -> None:
    """Each site, each stream up to the first instruction of the replacement, and each restored byte."""
    plain = {name: result for name, (_, result) in RUNNABLE.items()}
    assert calls(kernel) == plain
    patch = patch_of(chosen, replacements)
    kernel.enable(patch)
    report = kernel.verify("enabled")
    report.raise_for_findings()
    assert report.checks["calls_reach_the_expected_function"] >= COUNT
    assert calls(kernel) == {name: 1_000_000 + n for n, name in enumerate(chosen) if name in RUNNABLE}
    assert all(kernel.site_of(name)[1][0] == 0xE8 for name in chosen)
    kernel.disable(patch)
    kernel.verify("disabled").raise_for_findings()
    assert calls(kernel) == plain
    assert all(kernel.site_of(name)[1] == NOP5 for name in chosen)


def one_by_one(kernel: Kernel, names: Sequence[str], code: Path, module: str = "vmlinux") -> None:
    for name in names:
        patch = patch_of([name], code, module)
        kernel.enable(patch)
        report = kernel.verify(name)
        report.raise_for_findings()
        assert report.checks["calls_reach_the_expected_function"] >= 1
        kernel.disable(patch)
        kernel.verify(name).raise_for_findings()


def test_functions_of_the_image_are_redirected_and_restored_one_by_one(
    kernel: Kernel, chosen: list[str], replacements: Path
) -> None:
    one_by_one(kernel, chosen[:ONE_BY_ONE], replacements)


@pytest.mark.slow
def test_all_of_the_chosen_functions_are_redirected_and_restored_one_by_one(
    kernel: Kernel, chosen: list[str], replacements: Path
) -> None:
    one_by_one(kernel, chosen[ONE_BY_ONE:], replacements)


def loaded(kernel: Kernel, stock_kernel: StockKernel) -> Iterator[tuple[str, list[str]]]:
    """Modules, chosen by the seed, that need no other: their names, and what can be patched in them."""
    modules = stock_kernel.modules[:]
    random.Random(SEED).shuffle(modules)
    for path in modules:
        try:
            name = kernel.load_module(path)
        except KlpemuError:
            continue  # it needs another module
        sites = kernel.machine.modules.objects[name].sites
        yield name, list(dict.fromkeys(patchable(kernel, sites, name)))


@pytest.fixture(scope="module")
def in_modules(stock_kernel: StockKernel, replacements: Path) -> tuple[Kernel, list[Patch]]:
    """A kernel with modules chosen by the seed, and a patch of each, of COUNT functions in all."""
    kernel = Kernel.load(stock_kernel.vmlinuz)
    patches: list[Patch] = []
    count = 0
    for module, names in loaded(kernel, stock_kernel):
        taken = names[: min(40, COUNT - count)]
        if taken:
            patch = patch_of(taken, replacements, module)
            patches.append(Patch(f"fix_{module}"[:50], patch.objects, patch.code))
            count += len(taken)
        if count >= COUNT:
            break
    assert count == COUNT
    return kernel, patches


def test_hundreds_of_functions_of_modules_are_redirected_at_once_and_restored(
    in_modules: tuple[Kernel, list[Patch]],
) -> None:
    kernel, patches = in_modules
    for patch in patches:
        kernel.enable(patch)
    report = kernel.verify("all enabled")
    report.raise_for_findings()
    assert report.checks["calls_reach_the_expected_function"] >= COUNT
    for patch in patches:
        kernel.disable(patch)
    kernel.verify("all disabled").raise_for_findings()


def one_by_one_in_modules(kernel: Kernel, patches: Sequence[Patch], replacements: Path) -> None:
    for patch in patches:
        for module, funcs in patch.objects.items():
            one_by_one(kernel, [func.old for func in funcs], replacements, module)


def test_functions_of_a_module_are_redirected_and_restored_one_by_one(
    in_modules: tuple[Kernel, list[Patch]], replacements: Path
) -> None:
    kernel, (first, *_) = in_modules
    one_by_one_in_modules(kernel, [first], replacements)


@pytest.mark.slow
def test_all_of_the_functions_of_modules_are_redirected_and_restored_one_by_one(
    in_modules: tuple[Kernel, list[Patch]], replacements: Path
) -> None:
    kernel, (_, *rest) = in_modules
    one_by_one_in_modules(kernel, rest, replacements)
