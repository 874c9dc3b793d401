"""The stock kernel image: its symbols, sites, layouts and tables, against other tools and each other."""

import json
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from elf_writer import Section, elf_file
from hypothesis import given, settings
from hypothesis import strategies as st

from elf.btf import Kind, read_btf
from elf.btf_layout import BtfLayouts, btf_layouts
from elf.bug_table import bug_table
from elf.errors import ElfError
from elf.image import ET_EXEC, Image
from elf.kallsyms_table import kallsyms
from elf.kernel_symbols import KernelSymbols, read_system_map
from elf.mcount import SiteKind, fentry_sites
from elf.vmlinuz import decompressed, open_kernel, read_setup_header
from klpemu.kernel_image import KernelImage, open_kernel_image
from klpemu.stock_kernel import StockKernel

# The structs that are read and written in guest memory.
USED = (
    *("klp_patch", "klp_object", "klp_func", "klp_state", "klp_ops", "klp_shadow", "klp_callbacks"),
    *("ftrace_ops", "ftrace_hash", "ftrace_func_entry", "ftrace_ops_hash", "ftrace_page", "dyn_ftrace"),
    *("module", "module_kobject", "module_layout", "kernel_param", "kernel_param_ops", "kobject", "mutex"),
    *("task_struct", "thread_info", "pt_regs", "list_head", "hlist_node", "hlist_head", "swait_queue"),
    *("timer_list", "work_struct", "delayed_work", "fixed_percpu_data", "bug_entry", "alt_instr", "seq_file"),
)
SAMPLE_OF_MODULES = 40


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def shown(program: str, *arguments: object) -> str:
    command = [tool(program), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def image(stock_kernel: StockKernel) -> Image:
    return open_kernel(stock_kernel.vmlinuz)


@pytest.fixture(scope="module")
def symbols(image: Image) -> KernelSymbols:
    return kallsyms(image)


@pytest.fixture(scope="module")
def layouts(image: Image) -> BtfLayouts:
    return btf_layouts(image)


@pytest.fixture(scope="module")
def vmlinux(stock_kernel: StockKernel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ELF file inside, for other tools to read."""
    path = tmp_path_factory.mktemp("stock") / "vmlinux"
    path.write_bytes(decompressed(stock_kernel.vmlinuz.read_bytes(), "vmlinuz"))
    return path


def text_at(image: Image, address: int) -> str:
    section = image.section_at(address)
    assert section is not None
    return bytes(image.contents(section)[address - section.address :][:4096]).partition(b"\0")[0].decode()


def test_the_image_is_a_linked_kernel_without_symbols(stock_kernel: StockKernel, image: Image) -> None:
    assert image.type == ET_EXEC
    assert image.symbols == ()
    header = read_setup_header(stock_kernel.vmlinuz.read_bytes(), "vmlinuz")
    assert header.release == stock_kernel.release


def test_the_banner_says_the_release(stock_kernel: StockKernel, image: Image, symbols: KernelSymbols) -> None:
    banner = text_at(image, symbols.address_of("linux_banner"))
    assert banner.startswith(f"Linux version {stock_kernel.release} (")


def test_the_symbols_agree_with_the_sections(image: Image, symbols: KernelSymbols) -> None:
    assert len(symbols) > 90_000
    assert symbols.address_of("_text") == image.sections[1].address
    for start, stop, name in (
        ("__start_BTF", "__stop_BTF", ".BTF"),
        ("__start_orc_unwind", "__stop_orc_unwind", ".orc_unwind"),
        ("__start___bug_table", "__stop___bug_table", "__bug_table"),
        ("__bss_start", "__bss_stop", ".bss"),
    ):
        section = image.section(name)
        assert section is not None
        assert symbols.address_of(start) == section.address
        assert 0 <= symbols.address_of(stop) - section.address - section.size < 4096
    in_text = [symbol for symbol in symbols if symbol.type in "tT" and symbol.address >= 2**63]
    # Those outside are bounds: the first address behind a section.
    outside = [symbol.name for symbol in in_text if image.section_at(symbol.address) is None]
    assert len(in_text) > 45_000
    assert [name for name in outside if "end" not in name and name != "_etext"] == []


def test_exported_names_are_symbols_at_the_address_that_their_export_gives(
    image: Image, symbols: KernelSymbols
) -> None:
    section = image.section("__ksymtab")
    assert section is not None
    words = image.contents(section).cast("i")
    names = set(symbols.names)
    for index in range(0, len(words), 3):  # struct kernel_symbol: three distances from their own fields
        at = section.address + 4 * index
        name = text_at(image, at + 4 + words[index + 1])
        assert name in names
        assert at + words[index] in symbols.addresses_of(name) or words[index] >= 0  # per-CPU ones wrap


@pytest.mark.slow
def test_the_symbols_are_those_that_vmlinux_to_elf_finds(
    stock_kernel: StockKernel, symbols: KernelSymbols, tmp_path: Path
) -> None:
    shown("vmlinux-to-elf", stock_kernel.vmlinuz, tmp_path / "with-symbols")
    rows = re.findall(
        r"^ +\d+: ([0-9a-f]{16}) +\S+ \S+ +\S+ +\S+ +\S+ (\S+)$",
        shown("readelf", "-sW", tmp_path / "with-symbols"),
        re.MULTILINE,
    )
    assert sorted((int(address, 16), name) for address, name in rows) == sorted(
        (symbol.address, symbol.name) for symbol in symbols
    )


def test_all_sites_call_fentry_in_functions_that_the_symbols_name(
    image: Image, symbols: KernelSymbols
) -> None:
    sites = fentry_sites(image, symbols)
    bounds = symbols.address_of("__stop_mcount_loc") - symbols.address_of("__start_mcount_loc")
    assert len(sites) == bounds // 8 > 40_000
    assert {site.kind for site in sites} == {SiteKind.CALL}
    starts = set(symbols.addresses)
    # ENDBR64 may stand before the site.  A weak function that another has replaced keeps its site but loses
    # its symbol: FTRACE_MCOUNT_MAX_OFFSET is there for these.
    unnamed = [site.address for site in sites if not {site.address, site.address - 4} & starts]
    assert len(unnamed) < len(sites) // 50


def test_every_entry_of_the_bug_table_is_a_ud2_of_a_source_file(image: Image) -> None:
    found = bug_table(image)
    assert len(found) > 5_000
    for address, entry in found.items():
        section = image.section_at(address)
        assert section is not None
        assert bytes(image.contents(section)[address - section.address :][:2]) == b"\x0f\x0b"
        assert re.fullmatch(r"[\w./-]+\.[chS]", text_at(image, entry.file))
        assert entry.line > 0


def test_the_types_are_those_that_bpftool_shows(layouts: BtfLayouts, vmlinux: Path) -> None:
    types = json.loads(shown("bpftool", "-j", "btf", "dump", "file", vmlinux))["types"]
    btf = layouts.btf
    assert btf.count == len(types) + 1
    for entry in types:
        number = entry["id"]
        assert btf.kind(number).name == entry["kind"]
        assert btf.name(number) == entry["name"].replace("(anon)", "")
        if "members" in entry:
            found = [(member.name, member.type, member.bits, member.width) for member in btf.members(number)]
            assert found == [
                (member["name"].replace("(anon)", ""), member["type_id"], member["bits_offset"],
                 member.get("bitfield_size", 0))
                for member in entry["members"]
            ]  # fmt: skip


def test_a_compiler_lays_out_every_struct_in_the_same_way(
    layouts: BtfLayouts, vmlinux: Path, tmp_path: Path
) -> None:
    (tmp_path / "vmlinux.h").write_text(shown("bpftool", "btf", "dump", "file", vmlinux, "format", "c"))
    tags = {name for kind, name in layouts.btf.named if kind == Kind.STRUCT}
    lines = ['#include "vmlinux.h"', "#define SAME(a, b) _Static_assert((a) == (b), #a);"]
    for name in layouts:
        if name.removeprefix("union ") in tags and name.startswith("union "):
            continue  # C has no struct and union of one tag
        tag = f"struct {name}" if name in tags else name
        lines.append(f"SAME(sizeof({tag}), {layouts[name].size})")
        for member in layouts[name].members.values():
            if not member.bit_size:
                lines.append(f"SAME(__builtin_offsetof({tag}, {member.name}), {member.offset})")
    assert len(lines) > 50_000
    (tmp_path / "check.c").write_text("\n".join(lines) + "\n")
    shown("gcc", "-fsyntax-only", "-w", tmp_path / "check.c")


def test_the_structs_that_are_used_are_there_and_unique(layouts: BtfLayouts) -> None:
    btf = layouts.btf
    names = [btf.name(number) for number in range(1, btf.count) if btf.kind(number) == Kind.STRUCT]
    assert {name: names.count(name) for name in USED} == dict.fromkeys(USED, 1)
    assert {"live_patch_state", "patch_state", "stack_canary"} & set(layouts["task_struct"].members)


def test_a_module_is_as_large_as_the_modules_say(stock_kernel: StockKernel, layouts: BtfLayouts) -> None:
    section = Image.open(stock_kernel.module("libarc4")).section(".gnu.linkonce.this_module")
    assert section is not None
    assert layouts["module"].size == section.size


def test_the_btf_of_modules_goes_on_where_that_of_the_kernel_ends(
    stock_kernel: StockKernel, layouts: BtfLayouts, vmlinux: Path
) -> None:
    modules = [path for path in stock_kernel.modules if Image.open(path).section(".BTF")]
    assert len(modules) > 1000
    seen = 0
    for path in modules[:: len(modules) // SAMPLE_OF_MODULES]:
        btf = read_btf(Image.open(path), base=layouts.btf)
        dump = shown("bpftool", "-j", "-B", vmlinux, "btf", "dump", "file", path)
        types = json.loads(dump)["types"]
        assert btf.count == layouts.btf.count + len(types)
        for entry in types:
            assert btf.name(entry["id"]) == entry["name"].replace("(anon)", "")
            if entry["kind"] == "STRUCT":
                found = [(member.name or "(anon)", member.type) for member in btf.members(entry["id"])]
                assert found == [(member["name"], member["type_id"]) for member in entry["members"]]
                seen += 1
    assert seen > 100


def test_the_system_map_of_the_package_is_refused(stock_kernel: StockKernel) -> None:
    path = stock_kernel.directory / "boot" / f"System.map-{stock_kernel.release}"
    with pytest.raises(ElfError, match=r"System.map-\S+: "):
        read_system_map(path)


def test_a_second_start_comes_from_the_cache(stock_kernel: StockKernel, tmp_path: Path) -> None:
    def summary(kernel: KernelImage) -> tuple[object, ...]:
        sites = fentry_sites(kernel.image, kernel.symbols)
        return kernel.release, kernel.digest, list(kernel.symbols), sites, kernel.layouts["task_struct"]

    first = open_kernel_image(stock_kernel.vmlinuz, cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    written = entry.stat()
    second = open_kernel_image(stock_kernel.vmlinuz, cache=tmp_path)
    assert summary(first) == summary(second)
    assert first.release == stock_kernel.release
    assert entry.stat().st_ino == written.st_ino


@pytest.mark.slow
@settings(max_examples=25)
@given(data=st.data())
def test_damage_in_rodata_is_read_or_refused(image: Image, data: st.DataObject) -> None:
    """Damage to the tables themselves as often as anywhere, for they are half of the section."""
    section = image.section(".rodata")
    assert section is not None
    damaged = bytearray(image.contents(section))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, section.size - 1))] = data.draw(st.integers(0, 255))
    alone = elf_file(Section(".rodata", bytes(damaged), address=section.address), type=ET_EXEC)
    with suppress(ElfError):
        assert len(kallsyms(Image.parse(alone))) > 90_000
