"""A module's life: init runs in the guest, what it needed goes, exit runs; and inits that go wrong."""

import pytest
from machines import image
from module_service import delete_module, init_module
from test_module import world

from elf.errors import KlpemuError, SymbolError
from emu.errno import KernelErrno
from emu.machine import Machine
from emu.module import ModuleState
from emu.module_use import module_refcount
from emu.paging import Access
from emu.traps import GuestFault


def test_init_runs_before_the_module_can_be_used(machine: Machine) -> None:
    init_module(machine, image("exporter.ko"))
    assert machine.call(machine.kallsyms.address_of("exported_area", "exporter"), 7) == 6 * 7


def test_load_module_runs_nothing(machine: Machine) -> None:
    machine.modules.load_module(image("exporter.ko"))
    assert machine.call(machine.kallsyms.address_of("exported_area", "exporter"), 7) == 7


def test_what_is_only_for_init_is_there_until_init_has_returned(machine: Machine) -> None:
    placed = machine.modules.load_module(image("exporter.ko"))
    base, size = placement_of_init(machine, placed.struct)
    init = machine.kallsyms.address_of("init_module", "exporter")
    assert base <= init < base + size
    assert machine.space.access(init) is Access.EXECUTE
    assert any(base <= site < base + size for site in placed.sites)
    machine.modules.unload_module("exporter")

    loaded = init_module(machine, image("exporter.ko"))
    assert placement_of_init(machine, loaded.struct) == (0, 0)
    for name in ("init_module", "first_factor", "first"):
        with pytest.raises(SymbolError):
            machine.kallsyms.address_of(name, "exporter")
    text = loaded.placement.groups[0]
    assert all(text.start <= site < text.start + text.size for site in loaded.sites)
    records = {record.ip for record in machine.ftrace.records}
    assert set(loaded.sites) <= records
    names = {machine.kallsyms.module_of(record) for record in records}
    assert names == {"", "exporter"}, "no record leads into what is gone"


def placement_of_init(machine: Machine, struct: int) -> tuple[int, int]:
    layout = machine.view("module", struct).init_layout
    return layout.base, layout.size


def test_a_jump_into_what_was_freed_after_init_faults(machine: Machine) -> None:
    loaded = init_module(machine, image("exporter.ko"))
    with pytest.raises(GuestFault, match="jump to unmapped"):
        machine.call(machine.view("module", loaded.struct).init)


def test_what_is_read_only_after_init_can_be_written_in_init_and_not_later(machine: Machine) -> None:
    init_module(machine, image("exporter.ko"))
    with pytest.raises(GuestFault, match="write to read-only"):
        machine.call(machine.kallsyms.address_of("set_factor", "exporter"), 1)


def test_the_states_and_who_is_told_of_them(machine: Machine) -> None:
    seen: list[tuple[str, int]] = []
    machine.modules.module_notify_list.append(
        lambda state, module: seen.append((state.name, machine.view("module", module).state))
    )
    coming, going = machine.modules.klp_module_coming, machine.modules.klp_module_going
    machine.modules.klp_module_coming = lambda module: (seen.append(("klp", 1)), coming(module))[1]
    machine.modules.klp_module_going = lambda module: (seen.append(("klp", 2)), going(module))[1]
    init_module(machine, image("exporter.ko"))
    delete_module(machine, "exporter")
    assert seen == [
        ("klp", ModuleState.COMING),
        ("COMING", ModuleState.COMING),
        ("LIVE", ModuleState.LIVE),
        ("GOING", ModuleState.GOING),
        ("klp", ModuleState.GOING),
    ]


def test_a_notifier_that_refuses_leaves_nothing(machine: Machine) -> None:
    before = world(machine)

    def refuse(state: ModuleState, module: int) -> None:
        if state is ModuleState.COMING:
            raise KernelErrno(22, "not this one")

    machine.modules.module_notify_list.append(refuse)
    with pytest.raises(KernelErrno, match="not this one"):
        init_module(machine, image("exporter.ko"))
    assert world(machine) == before


def test_exit_runs_and_everything_goes(machine: Machine) -> None:
    before = world(machine)
    init_module(machine, image("exporter.ko"))
    delete_module(machine, "exporter")
    assert machine.variable("div_errors").get() == 1
    assert world(machine) == before


def test_a_module_with_init_and_no_exit_stays(machine: Machine) -> None:
    init_module(machine, image("init_stays.ko"))
    with pytest.raises(KernelErrno, match="EBUSY"):
        delete_module(machine, "init_stays")
    assert "init_stays" in machine.modules.objects


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("init_fails", r"the init function of 'init_fails' failed \(-ENODEV\)"),
        ("init_jumps", "jump to unmapped address 0xffffffffdeadb000"),
        ("init_endless", "did not return within 20,000 instructions"),
    ],
)
def test_a_module_whose_init_fails_is_gone_and_the_machine_goes_on(
    machine: Machine, name: str, error: str
) -> None:
    before = world(machine)
    machine.hub.instruction_budget = 20_000
    with pytest.raises(KlpemuError, match=error):
        init_module(machine, image(f"{name}.ko"))
    assert world(machine) == before
    init_module(machine, image("exporter.ko"))


def test_a_positive_result_of_init_is_warned_of(machine: Machine) -> None:
    init_module(machine, image("init_positive.ko"))
    assert machine.log.lines == [
        "do_init_module: 'init_positive'->init suspiciously returned 1, it should follow 0/-E convention",
        "do_init_module: loading module anyway...",
    ]
    assert "init_positive" in machine.modules.objects


def test_while_init_runs_the_module_is_coming_and_held(machine: Machine) -> None:
    seen: list[tuple[int, int]] = []

    def look(loaded: object) -> None:
        module = machine.view("module", loaded.struct)  # type: ignore[attr-defined] # LoadedObject
        seen.append((module.state, module_refcount(module)))

    machine.modules.trace_module_load = look
    loaded = init_module(machine, image("exporter.ko"))
    assert seen == [(ModuleState.COMING, 1)]
    assert module_refcount(machine.view("module", loaded.struct)) == 0


def test_a_module_s_own_struct_is_on_the_list_with_its_functions(machine: Machine) -> None:
    loaded = machine.modules.load_module(image("exporter.ko"))
    section = loaded.placement.image.section(".gnu.linkonce.this_module")
    assert section is not None
    assert loaded.struct == loaded.placement.addresses[section.index]
    module = machine.view("module", loaded.struct)
    assert module.init == machine.kallsyms.address_of("init_module", "exporter")
    assert module.exit == machine.kallsyms.address_of("cleanup_module", "exporter")
    assert machine.list_head("modules").next == module.list.address_
    assert (module.num_syms, module.num_gpl_syms) == (1, 2)
    assert module.num_ftrace_callsites == len(loaded.sites)


def test_per_cpu_symbols_are_in_kallsyms(machine: Machine) -> None:
    loaded = init_module(machine, image("exporter.ko"))
    (symbol,) = machine.kallsyms.named("exporter_count", "exporter")
    assert symbol.address == loaded.placement.addresses[loaded.placement.per_cpu[0].index]
    value = machine.space.read(machine.percpu.areas[0] + symbol.address, 8)
    assert int.from_bytes(value, "little") == 17
    assert machine.view("module", loaded.struct).percpu == symbol.address
