"""The vmlinux of a machine: against ld, gdb and readelf."""

import re
import subprocess
from pathlib import Path

import pytest
from debuggers import gdb, run
from machines import FIXTURES, boot, call_at, image, registered

from elf.errors import KlpemuError
from elf.image import Image
from elf.symbols import STB_GLOBAL, STB_LOCAL
from emu.machine import Machine
from emu.symbol_file import build_id, save_symbols
from emu.vmcore import save_core
from emu.vmlinux import KERNEL_BASE

# ld merges equal strings, which moves them; without these flags it leaves them where they are.
UNMERGED = [
    f"--set-section-flags={name}=contents,readonly,debug" for name in (".debug_str", ".debug_line_str")
]


@pytest.fixture
def vmlinux(machine: Machine, tmp_path: Path) -> Path:
    save_symbols(machine, tmp_path / "vmlinux")
    return tmp_path / "vmlinux"


def linked(machine: Machine, folder: Path) -> Image:
    """The fixture kernel as ld links it to the same addresses."""
    placement = machine.vmlinux.placement
    names = {placement.image.sections[index].name: at for index, at in placement.addresses.items()}
    lines = [f"{name} {address:#x} : {{ *({name}) }}" for name, address in names.items()]
    (folder / "script").write_text("\n".join(["SECTIONS {", *lines, "}"]))
    undefined = [each.name for each in placement.image.symbols if not each.is_defined and each.name]
    values = [f"--defsym={name}={machine.vmlinux.symbols[name]:#x}" for name in undefined]
    run("objcopy", *UNMERGED, placement.image.path, folder / "unmerged.o")
    options = ["-T", folder / "script", "-e", "0", "--no-check-sections", "--build-id=none"]
    run("ld", "-o", folder / "linked", *options, *values, folder / "unmerged.o")
    return Image.open(folder / "linked")


def test_the_debug_information_is_byte_for_byte_what_ld_makes_of_it(
    machine: Machine, vmlinux: Path, tmp_path: Path
) -> None:
    ours, theirs = Image.open(vmlinux), linked(machine, tmp_path)
    names = [section.name for section in ours.sections if section.name.startswith(".debug_")]
    assert {".debug_info", ".debug_line", ".debug_aranges", ".debug_loclists"} <= set(names)
    for name in names:
        assert bytes(ours.contents(ours.section(name))) == bytes(theirs.contents(theirs.section(name))), name


def test_symbols_have_the_values_that_ld_gives_them(machine: Machine, vmlinux: Path, tmp_path: Path) -> None:
    def table(image: Image) -> set[tuple[str, int, int, int]]:
        return {
            (each.name, each.value, each.size, each.type)
            for each in image.symbols
            if each.name and each.is_in_section and each.name not in machine.vmlinux.labels
        }

    ours, theirs = table(Image.open(vmlinux)), table(linked(machine, tmp_path))
    assert ours == theirs
    assert len(ours) > 60


def test_sections_hold_what_was_loaded(machine: Machine, vmlinux: Path) -> None:
    file = Image.open(vmlinux)
    for section in file.sections:
        if section.is_alloc and not section.is_write:  # data has changed since
            assert bytes(file.contents(section)) == machine.space.read(section.address, section.size), section
    assert file.section(".text..klpemu").address == machine.vmlinux.entry.start
    assert file.entry == KERNEL_BASE, "gdb warns of an entry point in no section"


def same_headers(file: Image, original: Image) -> None:
    for section in file.sections:
        source = original.section(section.name)
        if source is not None and (section.is_alloc or section.name.startswith(".debug_")):
            for field in ("size", "flags", "alignment", "entry_size"):
                assert getattr(section, field) == getattr(source, field), (section.name, field)


def test_section_headers_say_what_the_object_s_say(machine: Machine, vmlinux: Path) -> None:
    file = Image.open(vmlinux)
    same_headers(file, machine.image)
    (table,) = file.sections_named(".symtab")
    bindings = [symbol.binding for symbol in file.symbols]
    assert table.info == bindings.index(STB_GLOBAL), "gABI: sh_info is one more than the last local symbol"
    assert STB_LOCAL not in bindings[table.info :]


def test_gdb_knows_every_kernel_symbol(machine: Machine, vmlinux: Path) -> None:
    symbols = [each for each in machine.vmlinux.ksyms() if each.size]
    answers = gdb(*[f"info symbol {each.address:#x}" for each in symbols], vmlinux=vmlinux)
    by_address: dict[int, set[str]] = {}
    for each in symbols:
        by_address.setdefault(each.address, set()).add(each.name)
    for each, answer in zip(symbols, answers, strict=True):
        # gdb writes the part behind the dot, GCC's clone suffix, in brackets.
        assert answer.split(" in section")[0].replace("[", ".").rstrip("]") in by_address[each.address]
    assert len(symbols) > 90


def test_gdb_shows_the_variables_and_lines_of_a_core(machine: Machine, vmlinux: Path, tmp_path: Path) -> None:
    comm = machine.layouts.view("task_struct", machine.space, machine.symbol("init_task"))
    comm.comm = b"changed"
    save_core(machine, tmp_path / "vmcore")
    answers = gdb(
        "output (char *)init_task.comm",
        "output init_task.tasks.next",
        "info line *area_of",
        "print &current_task",
        vmlinux=vmlinux,
        core=tmp_path / "vmcore",
    )
    assert answers[0].endswith('"changed"')
    assert answers[1] == f"(struct list_head *) {comm.tasks.next:#x}"
    assert f"starts at address {machine.symbol('area_of'):#x} <area_of>" in answers[2]
    assert "shapes.c" in answers[2]
    assert f"{machine.vmlinux.symbols['current_task']:#x} <current_task>" in answers[3], "an offset from GS"


def test_gdb_sees_the_patched_site_in_the_core_and_the_nop_in_the_file(
    machine: Machine, vmlinux: Path, tmp_path: Path
) -> None:
    ops = registered(machine, ["area_of"])
    save_core(machine, tmp_path / "vmcore")
    show = "x/5xb area_of"
    (in_file,) = gdb(show, vmlinux=vmlinux)
    (in_core,) = gdb(show, vmlinux=vmlinux, core=tmp_path / "vmcore")
    assert bytes.fromhex("".join(re.findall(r"\t0x(\w\w)", in_file))) == bytes.fromhex("0f1f440000")
    site = machine.symbol("area_of")
    assert bytes.fromhex("".join(re.findall(r"\t0x(\w\w)", in_core))) == call_at(site, ops.trampoline)


def test_gdb_reads_a_module_s_symbols_without_being_told_an_address(
    machine: Machine, vmlinux: Path, tmp_path: Path
) -> None:
    loaded = machine.modules.load_module(image("fix_area.o"))
    save_symbols(machine, tmp_path / "module", loaded.name)
    save_core(machine, tmp_path / "vmcore")
    address = machine.kallsyms.address_of("fixed_area_of", loaded.name)
    _, place, line, code = gdb(
        f"add-symbol-file {tmp_path}/module",
        f"info symbol {address:#x}",
        "info line fixed_area_of",
        "x/5xb fixed_area_of",
        vmlinux=vmlinux,
        core=tmp_path / "vmcore",
    )
    assert place.startswith("fixed_area_of in section .text")
    assert "fix_area.c" in line
    assert f"{address:#x} <fixed_area_of>" in line
    assert "0x0f\t0x1f\t0x44\t0x00\t0x00" in code


def test_core_and_vmlinux_have_one_build_id(machine: Machine, vmlinux: Path, tmp_path: Path) -> None:
    save_core(machine, tmp_path / "vmcore")
    identity = build_id(machine).hex()
    assert f"Build ID: {identity}" in run("readelf", "-n", vmlinux)
    assert f"BUILD-ID={identity}\n".encode() in (tmp_path / "vmcore").read_bytes()


def test_the_build_id_tells_images_and_places_apart(machine: Machine) -> None:
    assert build_id(machine) == build_id(boot())
    first = machine.modules.load_module(image("fix_area.o"), "one")
    second = machine.modules.load_module(image("fix_area.o"), "two")
    assert len({build_id(machine), build_id(machine, first.name), build_id(machine, second.name)}) == 3


def test_readelf_has_nothing_to_complain_about(vmlinux: Path) -> None:
    shown = run("readelf", "-hSlsnW", "--debug-dump=info,decodedline,aranges", vmlinux)
    assert "EXEC (Executable file)" in shown
    assert "init_task" in shown


def test_a_module_that_is_not_loaded_is_named(machine: Machine, tmp_path: Path) -> None:
    machine.modules.load_module(image("fix_area.o"))
    with pytest.raises(KlpemuError, match="module 'nobody' is not loaded; loaded modules: fix_area"):
        save_symbols(machine, tmp_path / "vmlinux", "nobody")
    assert not (tmp_path / "vmlinux").exists()


def test_compressed_debug_information_is_refused(machine: Machine, tmp_path: Path) -> None:
    packed = tmp_path / "packed.o"
    subprocess.run(["objcopy", "--compress-debug-sections", FIXTURES / "fix_area.o", packed], check=True)
    machine.modules.load_module(Image.open(packed))
    with pytest.raises(KlpemuError, match=r"\.debug_\w+: compressed; build with -gz=none"):
        save_symbols(machine, tmp_path / "module", "packed")


@pytest.mark.parametrize("name", ["fix_all.o", "klp_area.ko", "fix_shapes.o", "no_site.o"])
def test_any_module_can_be_written(machine: Machine, tmp_path: Path, name: str) -> None:
    machine.vmlinux.symbols.setdefault("klp_enable_patch", machine.symbol("klpemu_return"))
    loaded = machine.modules.load_module(image(name))
    save_symbols(machine, tmp_path / "module", loaded.name)
    same_headers(Image.open(tmp_path / "module"), image(name))
    shown = run("readelf", "-sW", tmp_path / "module")
    for symbol in loaded.placement.ksyms(loaded.name):
        assert f"{symbol.address:016x}" in shown
