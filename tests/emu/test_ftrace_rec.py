"""Records: everything at random, against a model that knows only the kernel's rules."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from machines import IPMODIFY, REGS, boot, call_at, count_of, new_ops, record_of, site_of

from emu.dyn_ftrace import FtraceFl
from emu.errno import KernelErrno

NOP = bytes.fromhex("0f1f440000")
SITES = ("area_of", "perimeter_of", "measure", "tail_inner")
TRAMP, REGS_FL = int(FtraceFl.TRAMP | FtraceFl.TRAMP_EN), int(FtraceFl.REGS | FtraceFl.REGS_EN)
EN = int(FtraceFl.ENABLED)


class Registrations(RuleBasedStateMachine):
    """Random registrations; after each step every record, site and count is what the rules say."""

    @initialize()
    def start(self) -> None:
        self.machine = boot()
        self.filters: dict[int, set[str]] = {}
        self.on: list[int] = []  # registered, oldest first
        self.ops: list[Any] = []
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
