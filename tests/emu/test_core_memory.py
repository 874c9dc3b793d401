"""Memory read back from a saved core is what the vCPUs' page tables say it is."""

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import boot, image, registered

from elf.errors import ElfError, KlpemuError
from emu.core_memory import CoreMemory
from emu.machine import Machine
from emu.memory import MemoryFault
from emu.vmcore import START_KERNEL_MAP, save_core

PAGE = 4096


@pytest.fixture
def core(machine: Machine, tmp_path: Path) -> CoreMemory:
    """The core of a machine with a module and something registered."""
    machine.modules.load_module(image("fix_area.o"))
    registered(machine, ["area_of"])
    save_core(machine, tmp_path / "vmcore")
    return CoreMemory(tmp_path / "vmcore")


def test_every_mapped_page_reads_the_same(machine: Machine, core: CoreMemory) -> None:
    pages = [page << 12 for page in machine.space._frames]
    for page in pages:
        assert core.read(page, PAGE) == machine.space.read(page, PAGE), hex(page)
    assert len(pages) > 40


def test_what_the_machine_cannot_read_faults_in_the_same_words(machine: Machine, core: CoreMemory) -> None:
    pages = {page << 12 for page in machine.space._frames}
    edges = {edge for page in pages for edge in (page - 8, page + PAGE - 4)}
    faults = 0
    for address in (*sorted(edges), 0, 0x1234, 0x7FFF_FFFF_FFFF, 0x8000_0000_0000, START_KERNEL_MAP):
        answers = []
        for memory in (machine.space, core):
            try:
                answers.append(memory.read(address, 16))
            except MemoryFault as fault:
                answers.append(str(fault))
        assert answers[0] == answers[1], hex(address)
        faults += isinstance(answers[0], str)
    assert 10 < faults < len(edges), "some of the edges lie between mapped pages"


def test_a_core_stays_what_it_was(machine: Machine, core: CoreMemory) -> None:
    site = machine.symbol("area_of")
    before = machine.space.read(site, 5)
    machine.space.write(site, bytes(5))
    assert core.read(site, 5) == before != machine.space.read(site, 5)


def test_nothing_is_read_for_no_bytes(core: CoreMemory) -> None:
    assert core.read(0, 0) == b""


def test_a_page_that_is_not_present_faults(machine: Machine, tmp_path: Path) -> None:
    """SDM Vol. 3A, 4.5: the CPU ignores the rest of an entry whose bit 0 is clear."""
    page = machine.symbol("init_task") & -PAGE
    machine.space._set_entry(page >> 12, machine.space._frames[page >> 12] | 2)
    save_core(machine, tmp_path / "vmcore")
    with pytest.raises(MemoryFault):
        CoreMemory(tmp_path / "vmcore").read(page, 8)


def vmcoreinfo(key: str, value: str) -> Callable[[bytes], bytes]:
    """Changes one line of the note, not its length."""

    def change(data: bytes) -> bytes:
        pattern = re.escape(key.encode()) + rb"=[^\n]+"
        found = re.search(pattern, data)
        assert found is not None
        new = f"{key}={value}".encode().ljust(len(found[0]), b" ")
        return data[: found.start()] + new + data[found.end() :]

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda data: b"", "a damaged file: cannot mmap an empty file"),
        (lambda data: data[:40], "a damaged file: unpack_from requires a buffer of at least 64 bytes"),
        (lambda data: b"\x7fBAD" + data[4:], "no x86-64 ELF core"),
        (lambda data: data[:16] + b"\x02" + data[17:], "no x86-64 ELF core"),
        (lambda data: data[:-1], r"segment \d+ ends at 0x\w+ of 0x\w+"),
        (lambda data: data.replace(b"VMCOREINFO", b"VMCOREJUNK"), r"no SYMBOL\(swapper_pg_dir\) in a VMCORE"),
        (vmcoreinfo("NUMBER(phys_base)", "?"), "a damaged file: invalid literal for int"),
    ],
    ids=["empty", "short", "other magic", "an executable", "cut off", "no note", "no number"],
)
def test_a_damaged_core_is_refused(
    machine: Machine, tmp_path: Path, change: Callable[[bytes], bytes], what: str
) -> None:
    save_core(machine, tmp_path / "vmcore")
    (tmp_path / "vmcore").write_bytes(change((tmp_path / "vmcore").read_bytes()))
    with pytest.raises(ElfError, match=f"^{re.escape(str(tmp_path))}/vmcore: {what}"):
        CoreMemory(tmp_path / "vmcore")


def test_a_wrong_root_maps_nothing_of_the_kernel(machine: Machine, tmp_path: Path) -> None:
    save_core(machine, tmp_path / "vmcore")
    change = vmcoreinfo("SYMBOL(swapper_pg_dir)", f"{START_KERNEL_MAP + PAGE:x}")
    (tmp_path / "vmcore").write_bytes(change((tmp_path / "vmcore").read_bytes()))
    with pytest.raises(MemoryFault):
        CoreMemory(tmp_path / "vmcore").read(machine.symbol("init_task"), 8)


@pytest.mark.parametrize("path", ["missing", "."], ids=["nothing", "a directory"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ElfError, match=r"cannot be read: No such file|not a regular file"):
        CoreMemory(tmp_path / path)


@pytest.fixture(scope="module")
def small_core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("core") / "vmcore"
    save_core(boot(), path)
    return path


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_whatever_a_file_holds_only_a_klpemu_error_comes_out(small_core: Path, data: st.DataObject) -> None:
    damaged = bytearray(small_core.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # Headers and notes come first; page tables are anywhere.
        limit = data.draw(st.sampled_from([64, 0x800, len(damaged)]))
        damaged[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
    path = small_core.with_name("damaged")
    path.write_bytes(damaged)
    with suppress(KlpemuError):
        memory = CoreMemory(path)
        for start in (0xFFFF_8880_0000_0000, 0xFFFF_C900_0000_0000, 0xFFFF_FFFF_8100_0000):
            for page in range(start, start + 64 * PAGE, PAGE):
                with suppress(MemoryFault):
                    assert len(memory.read(page, PAGE)) == PAGE


@pytest.mark.parametrize("at", [32, 64 + 8, 64 + 32], ids=["e_phoff", "p_offset", "p_filesz"])
@pytest.mark.parametrize("value", [0xFF, 0x7F])
def test_numbers_beyond_any_file_are_refused(small_core: Path, at: int, value: int) -> None:
    damaged = bytearray(small_core.read_bytes())
    damaged[at + 7] = value
    path = small_core.with_name("huge")
    path.write_bytes(damaged)
    with pytest.raises(ElfError):
        CoreMemory(path)
