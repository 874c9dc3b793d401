"""Text after loading, byte for byte as kernels had it that ran on CPUs of several kinds.

booted_text.json was recorded from the stock kernel in QEMU (TCG): the CPU's capability words, the keys of
jump labels and static calls that the boot had changed, and hashes of all text in memory, of vmlinux and of
modules.
"""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elf.image import Image
from elf.kallsyms_table import kallsyms
from elf.mcount import fentry_sites
from elf.text_tables import jump_entries, static_call_sites
from elf.vmlinuz import open_kernel
from emu.alternative import X86_NOPS, ArchSymbols
from emu.cpu_features import CPUS, FEATURES, Cpu, Vendor, capability_of
from emu.jump_label import jump_label_update
from emu.mitigations import Mitigations, select_mitigations
from emu.paging import Access
from emu.placement import Group, Placement
from emu.static_call import static_call_init, static_call_transform
from emu.text_at_load import alternative_instructions, module_finalize, text_of
from emu.text_image import TextImage
from klpemu import stock_kernel as stock
from klpemu.stock_kernel import StockKernel

RECORDED = json.loads((Path(__file__).parent / "booted_text.json").read_text())
BOOTS = {boot["name"]: boot for boot in RECORDED["boots"]}

# All features that only mitigations set: a CPU is what remains without them.
FORCED = capability_of(
    "PTI L1TF_PTEINV RETPOLINE RETPOLINE_LFENCE RETHUNK UNRET SRSO SRSO_ALIAS SRSO_NO KERNEL_IBRS ENTRY_IBPB"
    " RSB_VMEXIT RSB_CTXSW RSB_VMEXIT_LITE FENCE_SWAPGS_USER FENCE_SWAPGS_KERNEL CLEAR_CPU_BUF"
    " CLEAR_CPU_BUF_VM USE_IBPB USE_IBPB_FW USE_IBRS_FW IBPB_ON_VMEXIT IBPB_EXIT_TO_USER INDIRECT_THUNK_ITS"
    " CLEAR_BHB_LOOP CLEAR_BHB_LOOP_ON_VMEXIT CLEAR_BHB_HW"
)


@dataclass
class Booted:
    """The text of vmlinux as we make it for one recorded boot."""

    text: TextImage
    placement: Placement
    chosen: Mitigations


def cpu_of(boot: dict[str, Any]) -> Cpu:
    """The recorded CPU with all that was set in the end."""
    vendor = Vendor[boot["vendor"]]
    return Cpu(boot["name"], vendor, *boot["signature"], int(boot["capability"], 16))


def chosen_for(boot: dict[str, Any]) -> Mitigations:
    cpu = cpu_of(boot)
    return select_mitigations(replace(cpu, capability=cpu.capability & ~FORCED), boot["command_line"])


@lru_cache(maxsize=1)
def stock_image() -> tuple[Image, dict[str, int]]:
    kernel = stock.find()
    assert kernel is not None
    image = open_kernel(kernel.vmlinuz)
    text = image.section(".text")
    assert text is not None
    if sha256(image.contents(text)).hexdigest() != RECORDED["text_of_the_file"]:
        pytest.skip("another build of the kernel than the recorded one")
    symbols: dict[str, int] = {}
    for symbol in kallsyms(image):
        symbols.setdefault(symbol.name, symbol.address)
    return image, symbols


def placed() -> Placement:
    image, symbols = stock_image()
    loaded = [each for each in image.sections if each.is_alloc and each.size]
    start = symbols["_text"]
    group = Group(Access.EXECUTE, start, symbols["_etext"] - start)
    contents = {
        each.index: bytearray(each.size) if each.is_nobits else bytearray(image.contents(each))
        for each in loaded
    }
    addresses = {each.index: each.address for each in loaded}
    return Placement(image, start, 0, addresses, [group], [], contents)


def table_of(text: TextImage, symbols: dict[str, int], name: str) -> tuple[bytes, int]:
    """What lies between __start_<name> and __stop_<name>, and where."""
    start = symbols[f"__start_{name}"]
    return text.read(start, symbols[f"__stop_{name}"] - start), start


@lru_cache(maxsize=2)
def booted(name: str) -> Booted:
    """vmlinux after loading, ftrace_init(), and the changes of keys that the record has."""
    boot, (_, symbols), placement = BOOTS[name], stock_image(), placed()
    chosen = chosen_for(boot)
    alternative_instructions(placement, symbols.get, chosen, boot["cpus"])
    text = text_of(placement, None)
    for site in memoryview(table_of(text, symbols, "mcount_loc")[0]).cast("Q"):
        text.write(site, X86_NOPS[5])
    arch = ArchSymbols(symbols.get)
    calls = {symbols[f"__SCK__{call}"]: (call, func) for call, func in boot["static_calls"].items()}
    for key, (call, func) in calls.items():
        text.write(key, func.to_bytes(8, "little"))
        tramp = symbols[f"__SCT__{call}"]
        new = static_call_transform(text.read(tramp, 6), tramp, func, tail=True, chosen=chosen, symbols=arch)
        text.write(tramp, new)
    late = [
        site for site in static_call_sites(*table_of(text, symbols, "static_call_sites")) if site.key in calls
    ]
    static_call_init(text, late, chosen, arch)
    for key, enabled in boot["jump_labels"].items():
        if text.holds(int(key, 16), 4):
            text.write(int(key, 16), enabled.to_bytes(4, "little"))
    entries = jump_entries(*table_of(text, symbols, "__jump_table"))
    jump_label_update(text, [each for each in entries if text.holds(each.key, 16)])
    return Booted(text, placement, chosen)


@pytest.mark.parametrize("name", BOOTS)
def test_the_mitigations_are_those_that_the_kernel_chose(name: str) -> None:
    boot = BOOTS[name]
    chosen = chosen_for(boot)
    assert chosen.cpu.features() == cpu_of(boot).features()
    assert chosen.return_thunk == boot["return_thunk"]


@pytest.mark.parametrize("name", BOOTS)
def test_the_text_of_vmlinux_is_that_of_a_running_kernel(name: str) -> None:
    made = booted(name)
    (group,) = made.placement.groups
    assert sha256(made.text.read(group.start, group.size)).hexdigest() == BOOTS[name]["text"]


@pytest.mark.parametrize("name", BOOTS)
def test_the_text_of_modules_is_that_of_a_running_kernel(name: str, stock_kernel: StockKernel) -> None:
    made, boot = booted(name), BOOTS[name]
    machine: Any = SimpleNamespace(
        mitigations=made.chosen,
        space=made.text,
        percpu=SimpleNamespace(areas=range(boot["cpus"])),
        vmlinux=SimpleNamespace(
            symbols=stock_image()[1], placement=made.placement, entry=made.placement.groups[0]
        ),
    )
    assert len(boot["modules"]) > 3
    for module, recorded in boot["modules"].items():
        image = Image.open(stock_kernel.module(module))
        addresses = {
            section.index: recorded["sections"].get(section.name, 0)
            for section in image.sections
            if section.is_alloc
        }
        placement = Placement(image, 0, 0, addresses, [], [])
        placement.relocate(lambda symbol: stock_image()[1].get(symbol.name, 0))
        # Nothing remains of init, and per-CPU data lies elsewhere.
        for index in [index for index, at in addresses.items() if not at]:
            del placement.addresses[index], placement.contents[index]
        done = module_finalize(machine, placement, module)
        assert not any(each.refused for each in done.applied)
        text = text_of(placement, None)
        for site in fentry_sites(image):
            if site.section in placement.addresses:
                text.write(placement.addresses[site.section] + site.offset, X86_NOPS[5])
        for section, wanted in recorded["text"].items():
            found = image.section(section)
            assert found is not None
            assert sha256(placement.contents[found.index]).hexdigest() == wanted, f"{module} {section}"


def test_the_preset_cpus_of_qemu_choose_what_the_kernel_chose_there() -> None:
    for preset, name in {"qemu64": "qemu64", "skylake-vm": "skylake", "zen2-vm": "rome"}.items():
        made = select_mitigations(CPUS[preset])
        assert made.return_thunk == BOOTS[name]["return_thunk"]
        recorded = cpu_of(BOOTS[name])
        known = sum(1 << number for number in FEATURES.values())
        assert made.cpu.capability == recorded.capability & known
