"""Symbols by name and by address, against what nm says of the object."""

import dataclasses
import shutil
import subprocess
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import FIXTURES, boot, image

from elf.errors import SymbolError
from emu.kallsyms import Kallsyms, Ksym
from emu.machine import Machine


def nm(name: str) -> list[tuple[str, str, str, int]]:
    """(section, type letter, name, offset) of every defined symbol, in symbol table order."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    output = subprocess.run(
        ["nm", "-p", "-f", "sysv", FIXTURES / name], check=True, capture_output=True, text=True
    ).stdout
    found = []
    for line in output.splitlines():
        fields = [field.strip() for field in line.split("|")]
        if len(fields) == 7 and fields[1] and fields[6] not in ("*UND*", "*ABS*"):
            found.append((fields[6], fields[2], fields[0], int(fields[1], 16)))
    return found


def test_every_symbol_that_nm_lists_is_at_its_place(machine: Machine) -> None:
    loaded = machine.modules.load_module(image("fix_all.o"))
    sections = {
        section.name: loaded.placement.addresses[section.index]
        for section in loaded.placement.image.sections
        if section.index in loaded.placement.addresses
    }
    expected = defaultdict(list)
    for section, _, name, offset in nm("fix_all.o"):
        if section in sections:
            expected[name].append(sections[section] + offset)
    assert expected
    for name, addresses in expected.items():
        assert [symbol.address for symbol in machine.kallsyms.named(name, "fix_all")] == addresses


def test_sizes_reach_to_the_next_symbol_or_the_end_of_the_section(machine: Machine) -> None:
    placement = machine.vmlinux.placement
    symbols = [symbol for name in ("area_of", "measure") for symbol in machine.kallsyms.named(name)]
    starts = sorted({s.address for s in placement.ksyms("")} | set(machine.vmlinux.labels.values()))
    for symbol in symbols:
        assert symbol.size == next(start for start in starts if start > symbol.address) - symbol.address
    text = next(s for s in placement.image.sections if s.name == ".text")
    end = placement.addresses[text.index] + text.size
    last = max((s for s in placement.ksyms("") if s.address < end), key=lambda s: s.address)
    assert last.address + last.size == end


def test_an_address_is_described_as_the_kernel_prints_it(machine: Machine) -> None:
    machine.modules.load_module(image("endbr.o"))
    start = machine.kallsyms.address_of("form_twice", "endbr")
    describe = machine.kallsyms.describe
    assert describe(machine.symbol("area_of") + 5) == "area_of+0x5/0x10"
    assert describe(machine.symbol("area_of") + 15) == "area_of+0xf/0x10"
    assert describe(machine.symbol("perimeter_of")) == "perimeter_of+0x0/0x10"
    assert describe(start + 4) == "form_twice+0x4/0x10 [endbr]"
    assert describe(0x1234) == "0x1234"


def test_a_lookup_gives_size_and_offset(machine: Machine) -> None:
    at = machine.symbol("area_of")
    assert machine.kallsyms.lookup_size_offset(at + 3) == (0x10, 3)
    assert machine.kallsyms.lookup_size_offset(8) is None


def test_two_functions_of_one_name_are_told_apart_by_sympos(machine: Machine) -> None:
    kallsyms = machine.kallsyms
    first, second = (kallsyms.address_of("same_name", "", sympos) for sympos in (1, 2))
    assert first < second, "in vmlinux sympos counts in address order"
    assert machine.call(first, 1) != machine.call(second, 1)
    with pytest.raises(SymbolError, match="unresolvable ambiguity"):
        kallsyms.address_of("same_name")
    with pytest.raises(SymbolError):
        kallsyms.address_of("same_name", "", 3)


def test_data_of_the_same_name_counts_for_sympos(machine: Machine) -> None:
    kinds = [symbol.is_function for symbol in machine.kallsyms.named("twin")]
    assert sorted(kinds) == [False, True]


def test_a_missing_symbol_is_an_error(machine: Machine) -> None:
    with pytest.raises(SymbolError, match="nowhere"):
        machine.symbol("nowhere")


def test_symbols_of_an_unloaded_module_are_gone(machine: Machine) -> None:
    machine.modules.load_module(image("endbr.o"))
    start = machine.kallsyms.address_of("form_twice", "endbr")
    assert machine.kallsyms.module_of(start) == "endbr"
    machine.modules.unload_module("endbr")
    assert not machine.kallsyms.named("form_twice", "endbr")
    assert machine.kallsyms.at(start) is None
    assert machine.kallsyms.module_of(start) is None
    assert list(machine.kallsyms.modules()) == [""]


def test_assembler_labels_are_no_symbols() -> None:
    machine = boot()
    assert not [symbol for symbol in machine.vmlinux.ksyms() if symbol.name.startswith(".L")]


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=20),
    at=st.integers(0, 900),
    aliases=st.sets(st.integers(0, 19)),
)
def test_the_symbol_found_is_the_one_that_covers_the_address(
    sizes: list[int], at: int, aliases: set[int]
) -> None:
    kallsyms = Kallsyms()
    table, start = [], 0x1000
    for number, size in enumerate(sizes):
        table.append(Ksym(f"data{number}", start, size, "m", is_function=False))
        if number in aliases:
            table += [Ksym(f"func{number}", start, size, "m"), Ksym(f"alias{number}", start, size, "m")]
        start += size
    kallsyms.add("m", table, [(0x1000, 0x1000 + 900)])
    found = kallsyms.at(0x1000 + at)
    if at >= sum(sizes):
        assert found is None
    else:
        index = next(n for n in range(len(sizes)) if sum(sizes[: n + 1]) > at)
        assert found is not None
        assert found.name == (f"func{index}" if index in aliases else f"data{index}")


def test_where_one_routine_of_ours_ends_and_another_begins_the_place_is_called_after_the_second(
    machine: Machine,
) -> None:
    vmlinux = machine.vmlinux
    start = vmlinux.labels["ftrace_caller"]
    labels = {"earlier_end": start, **vmlinux.labels}
    table = Kallsyms()
    table.add("", dataclasses.replace(vmlinux, labels=labels).ksyms(), [(0, 1 << 64)])
    symbol = table.at(start)
    assert symbol is not None
    assert symbol.name == "ftrace_caller"
