"""Pokes: their stores against a real kernel's, batches, and other vCPUs in every place in between."""

from functools import partial
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import RECORDED, Steps, boot, call_at, image, new_ops, record_of, registered, site_of

from elf.errors import KlpemuError
from emu.cpu import REGISTERS
from emu.events import EventKind
from emu.ftrace import FtraceOpsFl
from emu.machine import Machine
from emu.memory import read_u64
from emu.text_poke import NOP5, TP_VEC_MAX, text_gen_insn

LIVEPATCH = int(FtraceOpsFl.DYNAMIC | FtraceOpsFl.IPMODIFY | FtraceOpsFl.PERMANENT)


def normalised(phases: list[tuple[str, str, str, int]]) -> list[tuple[str, str, str, int]]:
    """Displacements as letters in order of appearance: what they are depends on where things lie."""
    known: dict[str, str] = {"1f440000": "nop"}

    def name(code: str) -> str:
        return code[:2] + " " + known.setdefault(code[2:], f"call {len(known)}")

    return [(site, name(before), name(after), phase) for site, before, after, phase in phases]


def recorded_phases(step: str) -> list[tuple[str, str, str, int]]:
    return [
        (each["site"].replace("cmdline_proc_show", "area_of"), each["before"], each["after"], each["phase"])
        for each in RECORDED["poke_phases"]
        if each["step"] == step
    ]


def poked_phases(machine: Machine, since: int) -> list[tuple[str, str, str, int]]:
    """The pokes as changes of the five bytes of a site; stores that change nothing are not in the record."""
    sites = {machine.symbol(name): name for name in ("ftrace_call", "ftrace_regs_call", "area_of")}
    now: dict[int, bytes] = {}
    found = []
    for event in machine.events.since(since):
        if event.kind is not EventKind.POKE:
            continue
        site = next(each for each in sites if each <= event.address < each + 5)
        before = now.get(site) or first_bytes(machine, since, site)
        offset = event.address - site
        after = before[:offset] + event.after + before[offset + len(event.after) :]
        assert before[offset : offset + len(event.before)] == event.before
        now[site] = after
        if after != before:
            found.append((sites[site], before.hex(), after.hex(), int(event.note.removeprefix("phase "))))
    return found


def first_bytes(machine: Machine, since: int, site: int) -> bytes:
    """What a site held before the first poke, put together from the events."""
    found: dict[int, int] = {}
    for event in machine.events.since(since):
        if event.kind is EventKind.POKE and site <= event.address < site + 5:
            for index, byte in enumerate(event.before):
                found.setdefault(event.address + index, byte)
    return bytes(found[site + index] for index in range(5))


def test_the_stores_of_enabling_and_disabling_are_the_recorded_ones(machine: Machine) -> None:
    start = machine.events.total
    ops = registered(machine, ["area_of"], flags=LIVEPATCH)
    middle = machine.events.total
    enabled = poked_phases(machine, start)
    machine.ftrace.unregister_ftrace_function(ops)
    disabled = poked_phases(machine, middle)
    assert normalised(enabled + disabled) == normalised(
        recorded_phases("enable") + recorded_phases("disable")
    )


def test_every_stage_of_a_poke_is_followed_by_a_sync(machine: Machine) -> None:
    start = machine.events.total
    site = machine.symbol("area_of")
    machine.poker.text_poke_bp(site, call_at(site, machine.symbol("tail_inner")))
    kinds = [(event.kind, event.address - site if event.address else 0, event.note)
             for event in machine.events.since(start)]  # fmt: skip
    sync = (EventKind.SYNC, 0, "text_poke_sync")
    assert kinds == [
        (EventKind.POKE, 0, "phase 1"), sync, (EventKind.POKE, 1, "phase 2"), sync,
        (EventKind.POKE, 0, "phase 3"), sync,
    ]  # fmt: skip


def test_queued_sites_go_through_the_stages_together(machine: Machine) -> None:
    start = machine.events.total
    sites = sorted(machine.symbol(name) for name in ("area_of", "measure", "perimeter_of"))
    for site in sites:
        machine.poker.text_poke_queue(site, call_at(site, machine.fentry))
    assert machine.events.total == start
    machine.poker.text_poke_finish()
    pokes = [(event.note, event.address) for event in machine.events.since(start)
             if event.kind is EventKind.POKE]  # fmt: skip
    assert pokes == (
        [("phase 1", site) for site in sites]
        + [("phase 2", site + 1) for site in sites]
        + [("phase 3", site) for site in sites]
    )
    assert sum(event.kind is EventKind.SYNC for event in machine.events.since(start)) == 3


def test_a_queue_that_would_lose_its_order_goes_out_first(machine: Machine) -> None:
    low, high = sorted(machine.symbol(name) for name in ("area_of", "measure"))
    start = machine.events.total
    machine.poker.text_poke_queue(high, call_at(high, machine.fentry))
    machine.poker.text_poke_queue(low, call_at(low, machine.fentry))
    assert site_of_address(machine, high)[0] == 0xE8
    assert site_of_address(machine, low) == NOP5
    machine.poker.text_poke_finish()
    assert site_of_address(machine, low)[0] == 0xE8
    assert sum(event.kind is EventKind.SYNC for event in machine.events.since(start)) == 6


def site_of_address(machine: Machine, site: int) -> bytes:
    return machine.space.read(site, 5)


def test_many_sites_go_out_in_batches_of_as_many_as_fit_a_page(machine: Machine) -> None:
    loaded = machine.modules.load_module(image("many.o"))
    ops = new_ops(machine)
    ips = sorted(loaded.sites)[: 2 * TP_VEC_MAX + 10]
    for each in (ips[0], *ips[1:]):
        machine.poker.text_poke_queue(each, call_at(each, machine.fentry))
    machine.poker.text_poke_finish()
    stages = [
        event.address for event in machine.events if event.kind is EventKind.POKE and event.note[-1] == "1"
    ]
    assert stages == ips
    syncs = [event for event in machine.events if event.kind is EventKind.SYNC]
    assert len(syncs) == 9
    assert TP_VEC_MAX == 4096 // 16  # sizeof(struct text_poke_loc)
    assert ops.flags & FtraceOpsFl.INITIALIZED == 0


@pytest.mark.parametrize("code", ["9090909090", "0f0b", "e8000000", "cc00000000", "0f1f4400"])
def test_what_the_breakpoint_handler_could_not_emulate_is_refused(machine: Machine, code: str) -> None:
    site = machine.symbol("area_of")
    with pytest.raises(KlpemuError, match="could not emulate"):
        machine.poker.text_poke_bp(site, bytes.fromhex(code))
    assert site_of(machine, "area_of") == NOP5


@given(address=st.integers(0, (1 << 64) - 1), displacement=st.integers(-(1 << 31), (1 << 31) - 1))
def test_a_generated_call_goes_where_it_shall(address: int, displacement: int) -> None:
    target = (address + 5 + displacement) % (1 << 64)
    code = text_gen_insn(0xE8, address, target)
    assert code[0] == 0xE8
    assert (address + 5 + int.from_bytes(code[1:], "little", signed=True)) % (1 << 64) == target


@given(distance=st.integers(1 << 31, 1 << 62))
def test_a_call_that_does_not_reach_is_refused(distance: int) -> None:
    with pytest.raises(KlpemuError, match="out of reach"):
        text_gen_insn(0xE8, 0, 5 + distance)


# Somebody else at every place of a poke.

OLD, NEW = 7, 6  # area_of(3, 4), and tail_inner(3)
SERVICE_STEPS, GUEST_STEPS = 7, 5


def merged(guest_at: tuple[int, ...]) -> list[tuple[int, int | None]]:
    total = SERVICE_STEPS + GUEST_STEPS
    return [(1, 1) if index in guest_at else (0, None) for index in range(total)]


def raced(machine: Machine, code: bytes, steps: list[tuple[int, int | None]]) -> int:
    """What area_of(3, 4) gives on the second vCPU while the first one pokes its site."""
    site, (poking, calling) = machine.symbol("area_of"), machine.tasks[:2]
    machine.hub.schedule = Steps(steps)
    call = machine.hub.call(calling, site, (3, 4))
    service = machine.hub.serve(poking, "poke", lambda: machine.poker.text_poke_bp(site, code))
    machine.hub.finish(poking, service)
    return int(machine.hub.finish(calling, call))


def test_whoever_calls_while_a_site_is_poked_gets_the_old_or_the_new_function() -> None:
    """Every merge of the poke's stores with the call's instructions, in both directions."""
    machine = boot(cpus=2)
    site = machine.symbol("area_of")
    jump = b"\xe9" + call_at(site, machine.symbol("tail_inner"))[1:]
    seen = set()
    for guest_at in combinations(range(SERVICE_STEPS + GUEST_STEPS), GUEST_STEPS):
        for code, allowed in ((jump, {OLD, NEW}), (NOP5, {NEW, OLD})):
            start = machine.events.total
            result = raced(machine, code, merged(guest_at))
            assert result in allowed, guest_at
            assert site_of(machine, "area_of") == code
            trapped = [each for each in machine.events.since(start) if each.kind is EventKind.TRAP]
            seen.add((code, result, bool(trapped)))
    # The search is not empty: before, after, and through the breakpoint, both ways.
    assert seen == {
        (jump, OLD, False), (jump, NEW, False), (jump, NEW, True),
        (NOP5, NEW, False), (NOP5, OLD, False), (NOP5, OLD, True),
    }  # fmt: skip


def test_a_vcpu_between_an_int3_and_its_handling_holds_up_the_sync() -> None:
    machine = boot(cpus=2)
    site = machine.symbol("area_of")
    start = machine.events.total
    # int3 is there after two steps; the trap comes, and then the poker is asked to go on, and cannot.
    steps = [(0, None), (0, None), (1, 1), *[(0, None)] * 20]
    assert raced(machine, call_at(site, machine.fentry), steps) == OLD
    kinds = [each.kind for each in machine.events.since(start)]
    assert kinds.index(EventKind.EMULATE) < kinds.index(EventKind.SYNC)


@settings(max_examples=60, deadline=None)
@given(
    before=st.integers(0, 400),
    slices=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), max_size=12),
)
def test_a_call_during_a_registration_is_redirected_or_not_but_never_faults(
    before: int, slices: list[tuple[int, int]]
) -> None:
    """The whole of register_ftrace_function() and of unregister, cut anywhere, instruction by instruction."""
    machine = boot(cpus=2)
    doing, calling = machine.tasks[:2]
    other = registered(machine, ["area_of"])  # so that the common trampolines and the list function take part
    ops = new_ops(machine, ["area_of"], func="redirect", private=machine.symbol("tail_inner"))
    for service in (machine.ftrace.register_ftrace_function, machine.ftrace.unregister_ftrace_function):
        steps: list[tuple[int, int | None]] = [(0, None)] * before
        for doors, instructions in slices:
            steps += [(1, instructions)] + [(0, None)] * doors
        machine.hub.schedule = Steps(steps)
        call = machine.hub.call(calling, machine.symbol("area_of"), (3, 4))
        machine.hub.finish(doing, machine.hub.serve(doing, "ftrace", partial(service, ops)))
        assert machine.hub.finish(calling, call) in (OLD, NEW)
    assert list(machine.ftrace.each_ops()) == [other]
    assert record_of(machine, "area_of").flags & 0xFF == 1


def test_every_door_of_a_registration_lets_a_whole_call_through() -> None:
    results = []
    for doors in range(0, 600, 3):
        machine = boot(cpus=2)
        doing, calling = machine.tasks[:2]
        ops = new_ops(machine, ["area_of"], func="redirect", private=machine.symbol("tail_inner"))
        call = machine.hub.call(calling, machine.symbol("area_of"), (3, 4))
        machine.hub.schedule = Steps([(0, None)] * doors + [(1, None)] * 3)
        service = machine.hub.serve(doing, "register", partial(machine.ftrace.register_ftrace_function, ops))
        machine.hub.finish(doing, service)
        ran_during = call.finished
        results.append(machine.hub.finish(calling, call))
        if not ran_during:
            break
    # Old up to some door, new from there on: never back.
    assert set(results) == {OLD, NEW}
    assert results == sorted(results, reverse=True)


# What the int3 step changes.


@pytest.mark.parametrize(("opcode", "pushes"), [(0xE8, True), (0xE9, False)])
def test_the_int3_step_changes_rip_only_and_a_call_pushes_its_return_address(
    opcode: int, pushes: bool
) -> None:
    machine = boot(cpus=2)
    poking, calling = machine.tasks[:2]
    site, target = machine.symbol("area_of"), machine.symbol("tail_inner")
    values = {name: 0x0101_0101_0101_0101 * (number + 1) for number, name in enumerate(REGISTERS[:6])}
    values |= {f"r{number}": 0x1F1F_0000_0000_0000 + number for number in range(8, 16)}
    values |= {"rbp": 0x5555_5555, "eflags": 0x2 | 0x8D5}
    calling.cpu.set_vectors(bytes(range(256)))
    machine.hub.schedule = Steps([(0, None)] * 100)
    code = bytes([opcode]) + call_at(site, target)[1:]
    machine.hub.serve(poking, "poke", lambda: machine.poker.text_poke_bp(site, code))
    machine.hub.advance(poking)
    machine.hub.advance(poking)
    assert machine.space.read(site, 1) == b"\xcc"
    machine.hub.call(calling, site, (), **values)
    stack = calling.stack_top - 256
    machine.space.write(stack, bytes(range(240)))

    machine.hub.advance(calling)  # the trap
    trapped = calling.cpu.registers()
    around = machine.space.read(stack, 256)
    assert trapped == trapped | values
    assert trapped["rip"] == site + 1
    machine.hub.advance(calling)  # its handling
    handled = calling.cpu.registers()
    expected = trapped | {"rip": target}
    if pushes:
        expected["rsp"] -= 8
        assert read_u64(machine.space, handled["rsp"]) == site + 5
        below = handled["rsp"] - stack
        around = around[:below] + (site + 5).to_bytes(8, "little") + around[below + 8 :]
    assert handled == expected
    assert machine.space.read(stack, 256) == around
    assert calling.cpu.vectors() == bytes(range(256))


def test_emulating_the_way_back_to_a_nop_goes_on_behind_the_site() -> None:
    machine = boot(cpus=2)
    registers = {"rip": machine.symbol("area_of") + 1, "rsp": 0x1000}
    poking = machine.tasks[0]
    site = machine.symbol("area_of")
    machine.poker.text_poke_bp(site, call_at(site, machine.fentry))
    machine.hub.schedule = Steps([(0, None)] * 9)
    machine.hub.serve(poking, "poke", lambda: machine.poker.text_poke_bp(site, NOP5))
    machine.hub.advance(poking)
    machine.hub.advance(poking)
    assert machine.poker.poke_int3_handler(registers, lambda value: pytest.fail("a NOP pushes nothing"))
    assert registers == {"rip": site + 5, "rsp": 0x1000}


def test_the_poker_claims_no_int3_but_its_own(machine: Machine) -> None:
    registers = {"rip": machine.symbol("own_int3") + 1}
    assert not machine.poker.poke_int3_handler(registers, lambda value: None)
    assert registers == {"rip": machine.symbol("own_int3") + 1}
