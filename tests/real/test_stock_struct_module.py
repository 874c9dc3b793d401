"""The built-in kernel's struct module is the stock kernel's, and stock modules' own structs are used."""

import subprocess

import pytest

from elf.btf_layout import BtfLayouts, btf_layouts
from elf.image import Image
from elf.vmlinuz import open_kernel
from klpemu import Kernel
from klpemu.stock_kernel import StockKernel

STRUCTS = (
    "module", "module_layout", "module_kobject", "mod_arch_specific", "mod_kallsyms", "module_use",
    "kernel_symbol", "kernel_param_ops", "kparam_string", "kparam_array",
)  # fmt: skip


@pytest.fixture(scope="module")
def real_layouts(stock_kernel: StockKernel) -> BtfLayouts:
    return btf_layouts(open_kernel(stock_kernel.vmlinuz))


@pytest.mark.parametrize("name", STRUCTS)
def test_the_layout_is_the_stock_kernel_s(real_layouts: BtfLayouts, name: str) -> None:
    real = real_layouts[name]
    ours = Kernel.load().machine.layouts[name]
    assert ours.size == real.size
    assert {each.name: each.offset for each in ours.members.values()} == {
        each.name: each.offset for each in real.members.values()
    }


@pytest.mark.parametrize("name", ["libarc4", "cordic", "libdes", "crct10dif_common", "snd_util_mem"])
def test_a_stock_module_s_own_struct_is_on_the_list(stock_kernel: StockKernel, name: str) -> None:
    path = stock_kernel.module(name)
    kernel = Kernel.load()
    kernel.load_module(path)
    machine, loaded = kernel.machine, kernel.machine.modules.objects[name]
    section = Image.open(path).section(".gnu.linkonce.this_module")
    assert section is not None
    assert loaded.struct == loaded.placement.addresses[section.index]
    module = machine.view("module", loaded.struct)
    assert machine.list_head("modules").next == module.list.address_
    assert (module.init, module.exit) == tuple(
        machine.kallsyms.address_of(function, name) if offset in relocated(str(path)) else 0
        for function, offset in (("init_module", 312), ("cleanup_module", 848))
    )
    kernel.unload_module(name)
    kernel.verify().raise_for_findings()


def relocated(path: str) -> set[int]:
    """Offsets of relocations in the module's struct, as readelf lists them."""
    listing = subprocess.run(["readelf", "-rW", path], capture_output=True, text=True, check=True).stdout
    found, inside = set(), False
    for line in listing.splitlines():
        if line.startswith("Relocation section"):
            inside = "'.rela.gnu.linkonce.this_module'" in line
        elif inside and line[:1].isdigit():
            found.add(int(line.split()[0], 16))
    return found
