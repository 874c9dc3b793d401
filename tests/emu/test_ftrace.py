"""Registering ops: text, records and lists against what the kernel's rules say, and what happens when they fail."""

import errno

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from machines import (
    IPMODIFY,
    RECORDED,
    REGS,
    boot,
    call_at,
    count_of,
    image,
    new_ops,
    record_of,
    registered,
    site_of,
)

from emu.dyn_ftrace import FTRACE_REF_MAX, FtraceFl
from emu.errno import KernelErrno
from emu.ftrace import FtraceBug, FtraceOpsFl
from emu.machine import Machine

NOP = bytes.fromhex("0f1f440000")
SITES = ("area_of", "perimeter_of", "measure", "tail_inner")
TRAMP, REGS_FL = int(FtraceFl.TRAMP | FtraceFl.TRAMP_EN), int(FtraceFl.REGS | FtraceFl.REGS_EN)
EN = int(FtraceFl.ENABLED)


def common_call(machine: Machine, site: str, caller: str) -> bytes:
    return call_at(machine.symbol(site), machine.symbol(caller))


def world(machine: Machine) -> tuple[object, ...]:
    """All that a failed registration must leave alone: text, records, lists, globals and allocations."""
    space = machine.space
    text = [space.read(each.address, len(each.contents)) for each in machine.modules.objects[""].texts]
    names = ("ftrace_ops_list", "ftrace_trace_function", "function_trace_op", "ftrace_ops_trampoline_list")
    variables = [space.read(machine.symbol(name), 8) for name in (*names, "ftrace_start_up")]
    records = [(record.ip, record.flags) for record in machine.ftrace.records]
    listed = [(ops.address_, ops.next, ops.func, ops.trampoline) for ops in machine.ftrace.each_ops()]
    return text, variables, records, listed, dict(machine.slab.live), dict(machine.area.live)


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
    before = world(machine)
    with pytest.raises(KernelErrno, match="EBUSY"):
        registered(machine, [], flags=int(FtraceOpsFl.PERMANENT))
    assert world(machine)[:4] == before[:4]


def test_nothing_is_poked_while_ftrace_is_switched_off(machine: Machine) -> None:
    machine.variable("ftrace_enabled", "<i").set(0)
    registered(machine, ["area_of"])
    assert site_of(machine, "area_of") == NOP


# IPMODIFY.


def test_a_second_ipmodify_ops_is_ebusy_and_nothing_has_changed(machine: Machine) -> None:
    registered(machine, ["measure", "perimeter_of"], flags=IPMODIFY)
    second = new_ops(machine, ["area_of", "perimeter_of", "tail_inner"], flags=IPMODIFY)
    before = world(machine)
    with pytest.raises(KernelErrno, match="EBUSY") as raised:
        machine.ftrace.register_ftrace_function(second)
    assert raised.value.number == errno.EBUSY
    assert "perimeter_of" in str(raised.value)
    assert world(machine) == before
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
    before = world(machine)
    with pytest.raises(KernelErrno, match="EINVAL"):
        registered(machine, [], flags=IPMODIFY)
    assert world(machine)[:4] == before[:4]


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
    before = world(machine)
    with pytest.raises(KernelErrno, match="EBUSY"):
        machine.ftrace.ftrace_set_filter_ip(ops, machine.symbol("measure"), remove=False)
    assert world(machine) == before


def test_emptying_the_filter_of_a_registered_ipmodify_ops_is_einval(machine: Machine) -> None:
    ops = registered(machine, ["area_of"], flags=IPMODIFY)
    before = world(machine)
    with pytest.raises(KernelErrno, match="EINVAL"):
        machine.ftrace.ftrace_set_filter_ip(ops, machine.symbol("area_of"), remove=True)
    assert world(machine) == before


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


# ftrace_bug.


def damaged(machine: Machine, name: str) -> bytes:
    """Change a byte of a site behind ftrace's back; returns what it holds now."""
    site = machine.symbol(name)
    machine.space.write(site + 2, bytes([machine.space.read(site + 2, 1)[0] ^ 0x40]))
    return machine.space.read(site, 5)


def test_ftrace_bug_is_reported_as_the_kernel_reports_it(machine: Machine) -> None:
    ops = registered(machine, ["area_of"])
    site, trampoline = machine.symbol("area_of"), ops.trampoline
    expected = machine.space.read(site, 5)
    actual = damaged(machine, "area_of")
    lines = len(machine.log.lines)
    with pytest.raises(FtraceBug, match="ftrace bug"):
        machine.ftrace.unregister_ftrace_function(ops)
    assert machine.log.lines[lines:] == [
        "------------[ ftrace bug ]------------",
        f"ftrace failed to modify [<{site:016x}>] area_of+0x0/0x10",
        f" actual:   {actual.hex(':')}",
        f" expected: {expected.hex(':')}",
        "Setting ftrace call site to NOP",
        "ftrace record flags: 88000000",
        " (0)  \ttramp: ERROR!",
        f" expected tramp: {trampoline:x}",
    ]


def test_ftrace_bug_while_enabling_names_the_nop(machine: Machine) -> None:
    actual = damaged(machine, "area_of")
    with pytest.raises(FtraceBug):
        registered(machine, ["area_of"])
    assert f" actual:   {actual.hex(':')}" in machine.log.lines
    assert " expected: 0f:1f:44:00:00" in machine.log.lines
    assert "Setting ftrace call site to call ftrace function" in machine.log.lines


def test_ftrace_bug_on_a_changed_call_says_it_was_updating(machine: Machine) -> None:
    registered(machine, ["area_of"])
    damaged(machine, "area_of")
    with pytest.raises(FtraceBug):
        registered(machine, ["area_of"])
    assert "Updating ftrace call site to call a different ftrace function" in machine.log.lines


def test_after_an_ftrace_bug_ftrace_is_dead(machine: Machine) -> None:
    other = registered(machine, ["measure"])
    damaged(machine, "area_of")
    with pytest.raises(FtraceBug):
        registered(machine, ["area_of"])
    text = [site_of(machine, name) for name in SITES]
    fresh = machine.view("ftrace_ops", machine.slab.kzalloc(machine.layouts.sizeof("ftrace_ops"), "fresh"))
    for attempt in (
        lambda: machine.ftrace.register_ftrace_function(fresh),
        lambda: machine.ftrace.unregister_ftrace_function(other),
        lambda: machine.ftrace.ftrace_set_filter_ip(fresh, machine.symbol("measure"), remove=False),
    ):
        with pytest.raises(KernelErrno, match="ENODEV"):
            attempt()
    assert [site_of(machine, name) for name in SITES] == text
    assert machine.variable("ftrace_disabled", "<i").get() == 1
    assert machine.variable("ftrace_enabled", "<i").get() == 0


def test_an_ftrace_bug_at_one_site_leaves_all_text_as_it_was(machine: Machine) -> None:
    """All sites are verified before the first is poked, and ftrace_kill() puts the stub back."""
    damaged(machine, "perimeter_of")
    before = world(machine)[0]
    with pytest.raises(FtraceBug):
        registered(machine, ["area_of", "measure", "perimeter_of"])
    assert world(machine)[0] == before
    assert not machine.poker._queue


def test_an_ops_that_met_an_ftrace_bug_is_off_the_list(machine: Machine) -> None:
    damaged(machine, "area_of")
    with pytest.raises(FtraceBug):
        registered(machine, ["area_of"])
    assert list(machine.ftrace.each_ops()) == []


@pytest.mark.parametrize("count", [0, FTRACE_REF_MAX - 1])
def test_a_count_that_leaves_its_range_turns_ftrace_off(machine: Machine, count: int) -> None:
    if count:
        record_of(machine, "area_of").flags = count
        with pytest.raises(FtraceBug, match="counts more ops than fit"):
            registered(machine, ["area_of"])
    else:
        ops = registered(machine, ["area_of"])
        record_of(machine, "area_of").flags = EN | TRAMP
        with pytest.raises(FtraceBug, match="counts no ops"):
            machine.ftrace.unregister_ftrace_function(ops)
    assert machine.ftrace.disabled.get() == 1


def test_a_site_whose_trampoline_nobody_has_is_bad_accounting(machine: Machine) -> None:
    ops = registered(machine, ["area_of"])
    ops.trampoline = 0
    with pytest.raises(FtraceBug, match="bad trampoline accounting"):
        registered(machine, ["area_of"])
    assert any(line.startswith("Bad trampoline accounting at: ") for line in machine.log.lines)
    assert machine.ftrace.disabled.get() == 1


# Everything at random, against a model that knows only the kernel's rules.


class Registrations(RuleBasedStateMachine):
    """Random registrations; after each step every record, site and count is what the rules say."""

    @initialize()
    def start(self) -> None:
        self.machine = boot()
        self.filters: dict[int, set[str]] = {}
        self.on: list[int] = []  # registered, oldest first
        self.ops = []
        self.sticky: set[str] = set()  # sites on which REGS stays for the reason given above
        for flags in (0, 0, REGS, IPMODIFY, IPMODIFY | REGS):
            self.filters[len(self.ops)] = set()
            self.ops.append(new_ops(self.machine, flags=flags))

    def users(self, site: str) -> list[int]:
        return [number for number in self.on if site in self.filters[number]]

    def flag(self, number: int, flag: int) -> bool:
        return bool(self.ops[number].flags & flag)

    def conflict(self, number: int, sites: set[str]) -> bool:
        taken = {site for each in self.on if each != number and self.flag(each, IPMODIFY)
                 for site in self.filters[each]}  # fmt: skip
        return self.flag(number, IPMODIFY) and bool(taken & sites)

    @rule(number=st.integers(0, 4), site=st.sampled_from(SITES))
    def add_site(self, number: int, site: str) -> None:
        address = self.machine.symbol(site)
        if number in self.on and self.conflict(number, {site} - self.filters[number]):
            with pytest.raises(KernelErrno, match="EBUSY"):
                self.machine.ftrace.ftrace_set_filter_ip(self.ops[number], address, remove=False)
            return
        self.machine.ftrace.ftrace_set_filter_ip(self.ops[number], address, remove=False)
        self.filters[number].add(site)

    @rule(number=st.integers(0, 4), site=st.sampled_from(SITES))
    def remove_site(self, number: int, site: str) -> None:
        # Without its last site an ops means all functions; that has a test of its own.
        if site not in self.filters[number] or (number in self.on and len(self.filters[number]) == 1):
            return
        self.machine.ftrace.ftrace_set_filter_ip(self.ops[number], self.machine.symbol(site), remove=True)
        self.filters[number].discard(site)
        if number in self.on and self.flag(number, REGS):
            self.sticky.add(site)

    @rule(number=st.integers(0, 4))
    def register(self, number: int) -> None:
        if number in self.on or not self.filters[number]:
            return
        if self.conflict(number, self.filters[number]):
            with pytest.raises(KernelErrno, match="EBUSY"):
                self.machine.ftrace.register_ftrace_function(self.ops[number])
            return
        self.machine.ftrace.register_ftrace_function(self.ops[number])
        self.on.append(number)

    @precondition(lambda self: self.on)
    @rule(choice=st.integers(0, 4))
    def unregister(self, choice: int) -> None:
        number = self.on.pop(choice % len(self.on))
        self.machine.ftrace.unregister_ftrace_function(self.ops[number])
        if self.flag(number, REGS):
            self.sticky -= self.filters[number]

    @rule(site=st.sampled_from(SITES))
    def call(self, site: str) -> None:
        before = [count_of(self.machine, ops) for ops in self.ops]
        # measure calls the first two, and those only.
        self.machine.call(self.machine.symbol(site), 1, 2)
        called = {site, *SITES[:2]} if site == "measure" else {site}
        for number, ops in enumerate(self.ops):
            expected = sum(number in self.users(each) for each in called)
            assert count_of(self.machine, ops) - before[number] == expected

    @invariant()
    def every_record_and_site_is_what_the_rules_say(self) -> None:
        for site in SITES:
            users = self.users(site)
            self.sticky -= set() if users else {site}
            regs = any(self.flag(each, REGS) for each in users) or site in self.sticky
            flags, code = 0, NOP
            if users:
                flags = EN | len(users)
                flags |= REGS_FL if regs else 0
                flags |= TRAMP if len(users) == 1 else 0
                flags |= int(FtraceFl.IPMODIFY) if any(self.flag(each, IPMODIFY) for each in users) else 0
                caller = self.machine.symbol("ftrace_regs_caller" if regs else "ftrace_caller")
                target = self.ops[users[0]].trampoline if len(users) == 1 else caller
                code = call_at(self.machine.symbol(site), target)
            assert record_of(self.machine, site).flags == flags, site
            assert site_of(self.machine, site) == code, site

    @invariant()
    def the_list_is_newest_first(self) -> None:
        assert list(self.machine.ftrace.each_ops()) == [self.ops[each] for each in reversed(self.on)]
        assert self.machine.variable("ftrace_start_up", "<i").get() == len(self.on)

    @invariant()
    def the_common_trampolines_call_the_list_function_while_anybody_is_registered(self) -> None:
        target = "arch_ftrace_ops_list_func" if self.on else "ftrace_stub"
        for label in ("ftrace_call", "ftrace_regs_call"):
            at = self.machine.symbol(label)
            assert self.machine.space.read(at, 5) == call_at(at, self.machine.symbol(target))

    @invariant()
    def no_trampoline_is_left_over_and_the_heap_is_sound(self) -> None:
        assert set(self.machine.area.live) == {self.ops[each].trampoline for each in self.on}
        assert self.machine.slab.corruptions(self.machine.space) == []


Registrations.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestRegistrations = Registrations.TestCase
