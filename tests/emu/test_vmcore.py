"""A saved machine: what readelf and gdb read in it is what the machine has."""

import os
import re
import struct
from pathlib import Path

import pytest
from debuggers import gdb, run
from machines import boot, in_the_middle, registered

from elf.errors import KlpemuError
from emu.cpu import REGISTERS
from emu.machine import Machine
from emu.paging import Access
from emu.slab import PAGE_OFFSET
from emu.vmcore import START_KERNEL_MAP, save_core

PAGE = 4096
LOAD = re.compile(r"^  LOAD +(\S+) (\S+) (\S+) (\S+) (\S+) (.{3}) 0x1000$", re.MULTILINE)
FLAGS = {Access.READ: "R  ", Access.WRITE: "RW ", Access.EXECUTE: "R E"}


@pytest.fixture
def core(machine: Machine, tmp_path: Path) -> Path:
    """The core of a machine with something registered, and with pages whose frames are in no order."""
    registered(machine, ["area_of"])
    area = machine.area.module_alloc(4 * PAGE, "test", Access.READ)
    for page in range(4):
        machine.space.write(area + page * PAGE, bytes([page + 1]) * PAGE)
    save_core(machine, tmp_path / "vmcore")
    return tmp_path / "vmcore"


def segments(core: Path) -> list[tuple[int, int, int, int, str]]:
    """File offset, virtual and physical address, size and flags of each PT_LOAD, as readelf shows them."""
    found = []
    for *numbers, flags in LOAD.findall(run("readelf", "-lW", core)):
        offset, virtual, physical, size, in_memory = (int(number, 16) for number in numbers)
        assert size == in_memory
        found.append((offset, virtual, physical, size, flags))
    return found


def test_every_mapped_page_is_at_its_virtual_address(machine: Machine, core: Path) -> None:
    data = core.read_bytes()
    pages = {
        virtual + at: (data[offset + at : offset + at + PAGE], physical + at, flags)
        for offset, virtual, physical, size, flags in segments(core)
        for at in range(0, size, PAGE)
    }
    space = machine.space
    assert len(space._frames) > 40
    for page, frame in space._frames.items():
        access = space.access(page << 12)
        assert access is not None
        assert pages.pop(page << 12) == (space.read(page << 12, PAGE), frame, FLAGS[access]), hex(page << 12)
    # What is left is mapped nowhere: the page tables, and memory that nobody got yet.
    for address, (contents, physical, _) in pages.items():
        assert address == PAGE_OFFSET + physical
        assert contents == machine.space.arena.bytes[physical : physical + PAGE]
    assert len(pages) > 5


def test_all_physical_memory_in_use_is_there_once(machine: Machine, core: Path) -> None:
    arena = machine.space.arena
    frames = [physical + at for _, _, physical, size, _ in segments(core) for at in range(0, size, PAGE)]
    in_use = [*range(PAGE, arena._writable_end, PAGE), *range(arena._image_start, arena.size, PAGE)]
    assert sorted(frames) == in_use
    assert core.stat().st_size < len(in_use) * PAGE + 2 * PAGE


def test_segments_are_in_order_of_their_addresses(core: Path) -> None:
    """gABI, "Program Header": PT_LOAD entries appear in ascending order of p_vaddr."""
    addresses = [virtual for _, virtual, _, _, _ in segments(core)]
    assert addresses == sorted(addresses)
    assert all((offset - virtual) % PAGE == 0 for offset, virtual, _, _, _ in segments(core))


def test_the_notes_are_those_of_a_vmcore(tmp_path: Path) -> None:
    machine = boot(cpus=3)
    save_core(machine, tmp_path / "vmcore")
    shown = run("readelf", "-nW", tmp_path / "vmcore")
    owners = re.findall(r"^  (\w+) +0x\w+\t(.*?)\t", shown, re.MULTILINE)
    assert owners == [("CORE", "NT_PRSTATUS (prstatus structure)")] * 3 + [
        ("VMCOREINFO", "Unknown note type: (0x00000000)")
    ]
    text = bytes.fromhex(shown.split("description data: ")[1]).decode()
    info = dict(line.split("=") for line in text.splitlines())
    assert info["PAGESIZE"] == "4096"
    assert info["NUMBER(pgtable_l5_enabled)"] == "0"
    root = int(info["SYMBOL(swapper_pg_dir)"], 16) - START_KERNEL_MAP + int(info["NUMBER(phys_base)"])
    assert root == machine.space._roots[0]
    for other in machine.space._roots:
        table = [machine.space.arena.bytes[at + PAGE // 2 : at + PAGE] for at in (root, other)]
        # SDM Vol. 3A, 4.8: the CPU sets bit 5 (accessed) of the entries it uses.
        entries = [[entry & ~0x20 for entry in struct.unpack("<256Q", half)] for half in table]
        assert entries[0] == entries[1], "the root that is named maps what every vCPU's maps"


def test_the_registers_are_those_of_the_vcpus(tmp_path: Path) -> None:
    machine = boot(cpus=2)
    in_the_middle(machine, machine.cpus[1], machine.symbol("memcpy"), rdi=5, r13=1 << 63, rbp=7)
    save_core(machine, tmp_path / "vmcore")
    names = " ".join((*REGISTERS, "gs_base", "fs_base"))
    show = [each for number in (1, 2) for each in (f"thread {number}", f"info registers {names}")]
    answers = gdb(*show, core=tmp_path / "vmcore")
    for number, cpu in enumerate(machine.cpus):
        thread, shown = answers[2 * number : 2 * number + 2]
        assert f"LWP {number + 1}" in thread
        values = {name: int(value, 16) for name, value in re.findall(r"^(\w+) +(0x\w+)", shown, re.MULTILINE)}
        assert values == cpu.registers() | {"gs_base": cpu.gs_base, "fs_base": 0}


def test_saving_changes_nothing_in_the_machine(machine: Machine, tmp_path: Path) -> None:
    before = machine.space.arena.checkpoint(), [cpu.registers() for cpu in machine.cpus]
    save_core(machine, tmp_path / "vmcore")
    assert (machine.space.arena.checkpoint(), [cpu.registers() for cpu in machine.cpus]) == before
    assert os.listdir(tmp_path) == ["vmcore"]


def test_two_machines_alike_are_saved_alike(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_core(boot(), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_unwritable_path_is_one_line(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(KlpemuError) as caught:
        save_core(machine, tmp_path / "missing" / "vmcore")
    assert str(caught.value) == (
        f"{tmp_path}/missing/vmcore: cannot be written: No such file or directory; "
        "give a path in a directory that exists, can be written to and has room"
    )
