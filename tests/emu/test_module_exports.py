"""What a module may link against: exports, licences, namespaces, and the references that come of it."""

import pytest
from machines import image
from module_service import delete_module, init_module
from test_module import world

from elf.errors import SymbolError
from emu.errno import KernelErrno
from emu.machine import Machine
from emu.module_exports import UnknownSymbol
from emu.module_use import module_refcount, users_of


def test_a_module_uses_what_another_one_exports(machine: Machine) -> None:
    init_module(machine, image("exporter.ko"))
    init_module(machine, image("importer.ko"))
    imported = machine.kallsyms.address_of("imported", "importer")
    assert machine.call(imported, 7) == 6 * 7 + 100 * (7 + 6) + 10000 * (7 - 6)


def test_a_module_that_is_used_cannot_go(machine: Machine) -> None:
    exporter = init_module(machine, image("exporter.ko"))
    init_module(machine, image("importer.ko"))
    module = machine.view("module", exporter.struct)
    assert (users_of(module), module_refcount(module)) == (["importer"], 1)
    assert machine.modules.uses("importer") == ["exporter"]
    with pytest.raises(KernelErrno, match="in use by importer"):
        delete_module(machine, "exporter")
    delete_module(machine, "importer")
    assert (users_of(module), module_refcount(module)) == ([], 0)
    delete_module(machine, "exporter")


def test_a_proprietary_module_finds_no_gpl_only_symbol(machine: Machine) -> None:
    exporter = init_module(machine, image("exporter.ko"))
    before = world(machine)
    with pytest.raises(UnknownSymbol, match="GPL-compatible") as raised:
        init_module(machine, image("importer_closed.ko"))
    assert raised.value.name == "ENOENT"
    assert machine.log.lines[0] == "importer_closed: module license 'Proprietary' taints kernel."
    assert sorted(machine.log.lines[1:]) == [
        "importer_closed: Unknown symbol exported_gpl (err -2)",
        "importer_closed: Unknown symbol exported_ns (err -2)",
    ]
    assert world(machine) == before
    assert module_refcount(machine.view("module", exporter.struct)) == 0


def test_a_proprietary_module_finds_the_other_symbols(machine: Machine) -> None:
    init_module(machine, image("exporter.ko"))
    loaded = init_module(machine, image("importer_plain.ko"))
    assert machine.call(machine.kallsyms.address_of("imported", "importer_plain"), 7) == 42
    assert machine.view("module", loaded.struct).taints & 1
    machine.modules.unload_module("importer_plain")
    init_module(machine, image("importer_plain.ko"))
    said = [line for line in machine.log.lines if "license" in line]
    assert len(said) == 1, "a kernel that is tainted says no more"


def test_a_namespace_must_be_imported(machine: Machine) -> None:
    init_module(machine, image("exporter.ko"))
    before = world(machine)
    with pytest.raises(KernelErrno) as raised:
        init_module(machine, image("importer_no_ns.ko"))
    assert raised.value.name == "EINVAL"
    assert machine.log.lines == [
        "importer_no_ns: module uses symbol (exported_ns) from namespace LAMPS, but does not import it.",
        "importer_no_ns: Unknown symbol exported_ns (err -22)",
    ]
    assert world(machine) == before


def test_two_modules_cannot_export_one_name(machine: Machine) -> None:
    init_module(machine, image("exporter.ko"))
    before = world(machine)
    with pytest.raises(KernelErrno, match="ENOEXEC"):
        init_module(machine, image("exporter_again.ko"))
    assert machine.log.lines == ["exporter_again: exports duplicate symbol exported_area (owned by exporter)"]
    assert world(machine) == before


def test_all_that_is_missing_is_logged_before_the_module_is_refused(machine: Machine) -> None:
    with pytest.raises(SymbolError, match="Unknown symbol exported_"):
        init_module(machine, image("importer.ko"))
    assert sorted(machine.log.lines) == [
        "importer: Unknown symbol exported_area (err -2)",
        "importer: Unknown symbol exported_gpl (err -2)",
        "importer: Unknown symbol exported_ns (err -2)",
    ]


def test_a_symbol_of_a_module_that_is_still_coming_cannot_be_used(machine: Machine) -> None:
    exporter = machine.modules.load_module(image("exporter.ko"))
    machine.view("module", exporter.struct).state = 1
    with pytest.raises(KernelErrno, match="EBUSY"):
        init_module(machine, image("importer.ko"))
    assert module_refcount(machine.view("module", exporter.struct)) == 0
