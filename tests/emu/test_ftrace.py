"""Registering ops: text, records and lists against the kernel's rules, and what happens when it fails."""

import errno

import pytest
from machines import (
    IPMODIFY,
    RECORDED,
    REGS,
    call_at,
    count_of,
    ftrace_world,
    image,
    new_ops,
    record_of,
    registered,
    site_of,
)

from emu.dyn_ftrace import FtraceFl
from emu.errno import KernelErrno
from emu.ftrace import FtraceOpsFl
from emu.machine import Machine

NOP = bytes.fromhex("0f1f440000")
SITES = ("area_of", "perimeter_of", "measure", "tail_inner")
TRAMP, REGS_FL = int(FtraceFl.TRAMP | FtraceFl.TRAMP_EN), int(FtraceFl.REGS | FtraceFl.REGS_EN)
EN = int(FtraceFl.ENABLED)


def common_call(machine: Machine, site: str, caller: str) -> bytes:
    return call_at(machine.symbol(site), machine.symbol(caller))


# One ops, several ops.


def test_one_ops_gets_its_own_trampoline_called_from_the_site(machine: Machine) -> None:
    ops = registered(machine, ["area_of"])
    assert site_of(machine, "area_of") == call_at(machine.symbol("area_of"), ops.trampoline)
    assert record_of(machine, "area_of").flags == EN | TRAMP | 1
    machine.call(machine.symbol("area_of"), 3, 4)
    assert count_of(machine, ops) == 1


def test_several_ops_share_ftrace_caller_and_the_last_that_stays_gets_its_trampoline_back(
    machine: Machine,
) -> None:
    first, second = registered(machine, ["area_of"]), registered(machine, ["area_of"])
    assert site_of(machine, "area_of") == common_call(machine, "area_of", "ftrace_caller")
    assert record_of(machine, "area_of").flags == EN | 2
    machine.ftrace.unregister_ftrace_function(first)
    assert site_of(machine, "area_of") == call_at(machine.symbol("area_of"), second.trampoline)
    assert record_of(machine, "area_of").flags == EN | TRAMP | 1
    machine.ftrace.unregister_ftrace_function(second)
    assert site_of(machine, "area_of") == NOP
    assert record_of(machine, "area_of").flags == 0


def test_an_ops_that_wants_all_registers_gets_them_for_all(machine: Machine) -> None:
    plain, regs = registered(machine, ["area_of"]), registered(machine, ["area_of"], flags=REGS)
    assert site_of(machine, "area_of") == common_call(machine, "area_of", "ftrace_regs_caller")
    assert record_of(machine, "area_of").flags == EN | REGS_FL | 2
    machine.ftrace.unregister_ftrace_function(regs)
    assert site_of(machine, "area_of") == call_at(machine.symbol("area_of"), plain.trampoline)
    assert record_of(machine, "area_of").flags == EN | TRAMP | 1


def test_regs_stay_while_another_ops_wants_them(machine: Machine) -> None:
    first, second = registered(machine, ["area_of"], flags=REGS), registered(machine, ["area_of"], flags=REGS)
    registered(machine, ["area_of"])
    machine.ftrace.unregister_ftrace_function(first)
    assert record_of(machine, "area_of").flags == EN | REGS_FL | 2
    assert site_of(machine, "area_of") == common_call(machine, "area_of", "ftrace_regs_caller")
    machine.ftrace.unregister_ftrace_function(second)
    assert record_of(machine, "area_of").flags == EN | TRAMP | 1


def test_flags_of_a_livepatch_ops_are_the_recorded_ones(machine: Machine) -> None:
    flags = FtraceOpsFl.DYNAMIC | FtraceOpsFl.IPMODIFY | FtraceOpsFl.PERMANENT
    ops = registered(machine, ["area_of"], flags=int(flags))
    assert ops.flags == int(RECORDED["ops_flags"], 16)


def test_an_ops_on_the_heap_is_dynamic_and_loses_its_trampoline_when_it_goes(machine: Machine) -> None:
    live = dict(machine.area.live)
    ops = registered(machine, ["area_of"])
    assert ops.flags & FtraceOpsFl.DYNAMIC
    machine.ftrace.unregister_ftrace_function(ops)
    assert (ops.trampoline, ops.flags & FtraceOpsFl.ALLOC_TRAMP) == (0, 0)
    assert machine.area.live == live


def test_an_ops_without_a_filter_is_called_from_every_site(machine: Machine) -> None:
    ops = registered(machine, [])
    assert {record.flags for record in machine.ftrace.records} == {EN | TRAMP | 1}
    for name in SITES[:2]:
        machine.call(machine.symbol(name), 1, 2)
    assert count_of(machine, ops) == 2
    machine.ftrace.unregister_ftrace_function(ops)
    assert {record.flags for record in machine.ftrace.records} == {0}


def test_registering_twice_is_ebusy_and_so_is_unregistering_twice(machine: Machine) -> None:
    ops = registered(machine, ["area_of"])
    with pytest.raises(KernelErrno, match="EBUSY"):
        machine.ftrace.register_ftrace_function(ops)
    machine.ftrace.unregister_ftrace_function(ops)
    with pytest.raises(KernelErrno, match="EBUSY"):
        machine.ftrace.unregister_ftrace_function(ops)


def test_a_permanent_ops_is_refused_while_ftrace_is_switched_off(machine: Machine) -> None:
    machine.variable("ftrace_enabled", "<i").set(0)
    before = ftrace_world(machine)
    with pytest.raises(KernelErrno, match="EBUSY"):
        registered(machine, [], flags=int(FtraceOpsFl.PERMANENT))
    assert ftrace_world(machine)[:4] == before[:4]


def test_nothing_is_poked_while_ftrace_is_switched_off(machine: Machine) -> None:
    machine.variable("ftrace_enabled", "<i").set(0)
    registered(machine, ["area_of"])
    assert site_of(machine, "area_of") == NOP


# IPMODIFY.


def test_a_second_ipmodify_ops_is_ebusy_and_nothing_has_changed(machine: Machine) -> None:
    registered(machine, ["measure", "perimeter_of"], flags=IPMODIFY)
    second = new_ops(machine, ["area_of", "perimeter_of", "tail_inner"], flags=IPMODIFY)
    before = ftrace_world(machine)
    with pytest.raises(KernelErrno, match="EBUSY") as raised:
        machine.ftrace.register_ftrace_function(second)
    assert raised.value.number == errno.EBUSY
    assert "perimeter_of" in str(raised.value)
    assert ftrace_world(machine) == before
    assert not second.flags & FtraceOpsFl.ENABLED


def test_a_refused_ipmodify_ops_can_register_once_the_other_is_gone(machine: Machine) -> None:
    first = registered(machine, ["area_of"], flags=IPMODIFY)
    second = new_ops(machine, ["area_of"], flags=IPMODIFY)
    with pytest.raises(KernelErrno, match="EBUSY"):
        machine.ftrace.register_ftrace_function(second)
    machine.ftrace.unregister_ftrace_function(first)
    machine.ftrace.register_ftrace_function(second)
    assert site_of(machine, "area_of") == call_at(machine.symbol("area_of"), second.trampoline)
    assert record_of(machine, "area_of").flags & FtraceFl.IPMODIFY


def test_an_ipmodify_ops_without_a_filter_is_einval(machine: Machine) -> None:
    before = ftrace_world(machine)
    with pytest.raises(KernelErrno, match="EINVAL"):
        registered(machine, [], flags=IPMODIFY)
    assert ftrace_world(machine)[:4] == before[:4]


def test_an_ipmodify_ops_shares_a_site_with_one_that_only_looks(machine: Machine) -> None:
    changing, looking = registered(machine, ["area_of"], flags=IPMODIFY), registered(machine, ["area_of"])
    machine.call(machine.symbol("area_of"), 1, 2)
    assert (count_of(machine, changing), count_of(machine, looking)) == (1, 1)
    machine.ftrace.unregister_ftrace_function(changing)
    assert not record_of(machine, "area_of").flags & FtraceFl.IPMODIFY


# Filters.


def test_a_filter_takes_the_start_of_a_function_whose_site_is_further_in(machine: Machine) -> None:
    machine.modules.load_module(image("late_site.o"))
    start = machine.kallsyms.address_of("late_site", "late_site")
    assert machine.ftrace.ftrace_location(start) == start + 6
    ops = new_ops(machine)
    machine.ftrace.ftrace_set_filter_ip(ops, start, remove=False)
    machine.ftrace.register_ftrace_function(ops)
    assert machine.call(start, 4) == 7
    assert count_of(machine, ops) == 1


@pytest.mark.parametrize("name", ["notrace_add", "trace_counter"])
def test_a_filter_refuses_what_has_no_site(machine: Machine, name: str) -> None:
    with pytest.raises(KernelErrno, match="EINVAL"):
        new_ops(machine, [name])


def test_taking_out_of_a_filter_what_is_not_in_it_is_enoent(machine: Machine) -> None:
    ops = new_ops(machine, ["area_of"])
    with pytest.raises(KernelErrno, match="ENOENT"):
        machine.ftrace.ftrace_set_filter_ip(ops, machine.symbol("measure"), remove=True)


def test_the_filter_of_a_registered_ops_can_grow_and_shrink(machine: Machine) -> None:
    ops = registered(machine, ["area_of"])
    machine.ftrace.ftrace_set_filter_ip(ops, machine.symbol("perimeter_of"), remove=False)
    assert site_of(machine, "perimeter_of") == call_at(machine.symbol("perimeter_of"), ops.trampoline)
    machine.ftrace.ftrace_set_filter_ip(ops, machine.symbol("area_of"), remove=True)
    assert site_of(machine, "area_of") == NOP
    assert record_of(machine, "area_of").flags == 0
    assert not ops.flags & FtraceOpsFl.MODIFYING
    assert (ops.old_hash.filter_hash, ops.old_hash.notrace_hash) == (0, 0)


def test_an_old_filter_is_freed(machine: Machine) -> None:
    ops = registered(machine, ["area_of", "perimeter_of"])
    live = len(machine.slab.live)
    machine.ftrace.ftrace_set_filter_ip(ops, machine.symbol("perimeter_of"), remove=True)
    assert len(machine.slab.live) == live - 1


def test_growing_an_ipmodify_filter_onto_anothers_site_is_ebusy_and_changes_nothing(machine: Machine) -> None:
    registered(machine, ["measure"], flags=IPMODIFY)
    ops = registered(machine, ["area_of"], flags=IPMODIFY)
    before = ftrace_world(machine)
    with pytest.raises(KernelErrno, match="EBUSY"):
        machine.ftrace.ftrace_set_filter_ip(ops, machine.symbol("measure"), remove=False)
    assert ftrace_world(machine) == before


def test_emptying_the_filter_of_a_registered_ipmodify_ops_is_einval(machine: Machine) -> None:
    ops = registered(machine, ["area_of"], flags=IPMODIFY)
    before = ftrace_world(machine)
    with pytest.raises(KernelErrno, match="EINVAL"):
        machine.ftrace.ftrace_set_filter_ip(ops, machine.symbol("area_of"), remove=True)
    assert ftrace_world(machine) == before


def test_regs_stay_on_a_site_that_a_registered_ops_drops_from_its_filter(machine: Machine) -> None:
    """test_rec_ops_needs_regs() still finds the ops that is just leaving, so the kernel leaves REGS set."""
    registered(machine, ["area_of"])
    regs = registered(machine, ["area_of", "measure"], flags=REGS)
    machine.ftrace.ftrace_set_filter_ip(regs, machine.symbol("area_of"), remove=True)
    assert record_of(machine, "area_of").flags == EN | REGS_FL | TRAMP | 1


# enabled_functions.


def test_enabled_functions_has_the_recorded_form(machine: Machine) -> None:
    ops = registered(machine, ["area_of"], flags=IPMODIFY)
    handler = f"trace_count+0x0/{machine.kallsyms.named('trace_count')[0].size:#x}"
    recorded = RECORDED["enabled_functions"][0]
    expected = recorded.replace("cmdline_proc_show", "area_of").replace(
        "klp_ftrace_handler+0x0/0x110", handler
    )
    expected = expected.replace("0xffffffffc0209000", f"{ops.trampoline:#018x}")
    assert machine.ftrace.enabled_functions() == [expected]


def test_enabled_functions_says_what_the_common_trampolines_call(machine: Machine) -> None:
    registered(machine, ["area_of"])
    registered(machine, ["area_of"], flags=REGS)
    (list_func,) = machine.kallsyms.named("arch_ftrace_ops_list_func")
    assert machine.ftrace.enabled_functions() == [
        f"area_of (2) R     ->arch_ftrace_ops_list_func+0x0/{list_func.size:#x}"
    ]


def test_enabled_functions_names_the_module(machine: Machine) -> None:
    machine.modules.load_module(image("endbr.o"))
    ops = new_ops(machine)
    address = machine.kallsyms.address_of("form_twice", "endbr")
    machine.ftrace.ftrace_set_filter_ip(ops, address, remove=False)
    machine.ftrace.register_ftrace_function(ops)
    (line,) = machine.ftrace.enabled_functions()
    assert line.startswith("form_twice [endbr] (1)      \ttramp: 0x")
