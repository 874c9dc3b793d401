"""One thing is damaged by a raw store; verification says which invariant, where, and both versions of the
bytes.

Each case names every invariant that may report: the one that is about the damaged thing, and those for which
it is a physical consequence (a call through a damaged site cannot arrive, a record without its ops adds up to
something else).  Anything more fails the test.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from livepatches import Raw, fix_area, fix_area2

from klpemu import Kernel
from patches.invariants.finding import Finding, Report
from patches.invariants.verify import INVARIANTS

TEXT = "text_matches_records"
RECORDS = "records_match_ops"
TRAMPOLINES = "trampolines_are_copies"
STREAMS = "calls_reach_the_expected_function"
LISTS = "lists_are_well_formed"
LISTED = "patches_are_listed"
STACKS = "func_stacks_hold_the_patches"
TASKS = "tasks_are_settled"
HEAP = "heap_is_intact"
REMAINS = "nothing_remains"
RELOCATIONS = "klp_relocations_are_right"
SYSFS = "sysfs_shows_the_patches"
REDIRECTION = {
    "one_ops_per_function",
    "ipmodify_is_exclusive",
    "newest_wins",
    "objects_know_their_modules",
    "nothing_freed_is_reachable",
    "log_agrees_with_the_patches",
}
SHADOWS = {"shadow_variables_are_hashed", "no_shadow_variable_remains"}


def invariants(report: Report) -> set[str]:
    return {finding.invariant for finding in report.findings}


def only(report: Report, invariant: str) -> Finding:
    """The one finding of an invariant."""
    found = [finding for finding in report.findings if finding.invariant == invariant]
    assert len(found) == 1, [str(finding) for finding in report.findings]
    return found[0]


def area_ops(kernel: Kernel, raw: Raw) -> int:
    return raw.klp_ops(kernel.address_of("area_of"))


@dataclass(frozen=True)
class Damage:
    """Where a byte is flipped in a kernel with two versions of area_of and perimeter_of, and who must say so.

    `also` are the invariants of which this is a physical consequence; `symbol` is what the finding must name.
    """

    where: Callable[[Kernel, Raw], int]
    invariant: str
    symbol: str
    also: frozenset[str] = frozenset()
    mask: int = 0xFF


def site(offset: int) -> Callable[[Kernel, Raw], int]:
    return lambda kernel, raw: kernel.site_of("area_of")[0] + offset


def trampoline(offset: int) -> Callable[[Kernel, Raw], int]:
    return lambda kernel, raw: raw.trampoline(area_ops(kernel, raw)) + offset


def symbol(name: str, offset: int = 0) -> Callable[[Kernel, Raw], int]:
    return lambda kernel, raw: raw.symbol(name) + offset


def in_ops(member: str, byte: int = 0) -> Callable[[Kernel, Raw], int]:
    return lambda kernel, raw: raw.member("klp_ops", area_ops(kernel, raw), member) + byte


def in_func(member: str, depth: int = 0, byte: int = 0) -> Callable[[Kernel, Raw], int]:
    return lambda kernel, raw: raw.member("klp_func", raw.funcs(area_ops(kernel, raw))[depth], member) + byte


def in_patch(member: str, byte: int = 0) -> Callable[[Kernel, Raw], int]:
    return lambda kernel, raw: raw.member("klp_patch", kernel.enabled[0].guest.address_, member) + byte


def in_record(member: str, byte: int = 0) -> Callable[[Kernel, Raw], int]:
    return lambda kernel, raw: (
        raw.member(
            "dyn_ftrace",
            kernel.machine.ftrace.records.lookup_rec(*[kernel.site_of("area_of")[0]] * 2).address_,
            member,
        )
        + byte
    )


def in_hash(member: str, byte: int = 0) -> Callable[[Kernel, Raw], int]:
    def where(kernel: Kernel, raw: Raw) -> int:
        ops = raw.view("klp_ops", area_ops(kernel, raw)).fops
        hashes = raw.view("ftrace_ops_hash", ops.func_hash)
        if member == "ip":
            bucket = raw.view("ftrace_hash", hashes.filter_hash).buckets
            return raw.member("ftrace_func_entry", raw.u64(bucket), "ip") + byte
        return raw.member("ftrace_hash", hashes.filter_hash, member) + byte

    return where


def in_task(member: str) -> Callable[[Kernel, Raw], int]:
    return lambda kernel, raw: raw.member("task_struct", raw.current(kernel), member)


ALSO_STREAM = frozenset({STREAMS})
CASES = {
    # Text.
    **{f"byte {n} of a site": Damage(site(n), TEXT, "area_of+0x0/", ALSO_STREAM) for n in range(5)},
    "the body of a patched function": Damage(site(7), TEXT, "area_of+0x5/"),
    "the body of another function": Damage(symbol("fib", 9), TEXT, "fib+0x"),
    "the site of another function": Damage(symbol("fib"), TEXT, "fib+0x0/"),
    "the entry of the handler": Damage(
        symbol("klp_ftrace_handler", 1), TEXT, "klp_ftrace_handler+0x1/", ALSO_STREAM
    ),
    "the handler, where it is not executed": Damage(
        symbol("klp_ftrace_handler", 0x4E), TEXT, "klp_ftrace_handler+0x4"
    ),
    "the common ftrace_caller": Damage(symbol("ftrace_caller", 3), TEXT, "ftrace_caller+0x0/"),
    "the call in the common ftrace_caller": Damage(symbol("ftrace_call", 1), TEXT, "ftrace_call+0x0/"),
    "the common ftrace_regs_caller": Damage(symbol("ftrace_regs_caller"), TEXT, "ftrace_regs_caller+0x0/"),
    "the list function": Damage(symbol("arch_ftrace_ops_list_func"), TEXT, "arch_ftrace_ops_list_func+0x0/"),
    # The private trampoline: 0xc2 bytes of code, the return, the pointer, the rest of its page.
    **{
        f"a trampoline's {name}": Damage(
            trampoline(at), TRAMPOLINES, f"ftrace_trampoline+{start:#x}/", ALSO_STREAM
        )
        for name, at, start in (
            ("save of registers", 0x0B, 0x07),
            ("load of its ops", 0x6A, 0x67),
            ("call of the handler", 0x7F, 0x7E),
            ("return address", 0x8B + 3, 0x8B),
            ("restore of registers", 0xA3, 0xA2),
            ("return", 0xC2, 0xC2),
            ("ops pointer", 0xC7, 0xC7),
        )
    },
    "the int3 behind a trampoline's return": Damage(trampoline(0xC3), TRAMPOLINES, "ftrace_trampoline+0xc3/"),
    "the page behind a trampoline": Damage(trampoline(0xFFF), TRAMPOLINES, "0xffffffffc0"),
    # Lists.  A link that is broken in one direction takes nothing away from the other.
    "klp_ops.node.next": Damage(in_ops("node.next"), LISTS, "klp_ops of area_of+0x0/"),
    "klp_ops.node.prev": Damage(in_ops("node.prev"), LISTS, "klp_ops of area_of+0x8/"),
    "the head of klp_ops": Damage(symbol("klp_ops"), LISTS, "klp_ops+0x0/"),
    "func_stack.prev": Damage(in_ops("func_stack.prev"), LISTS, "klp_ops of area_of+0x18/"),
    "func_stack.next": Damage(in_ops("func_stack.next"), LISTS, "klp_ops of area_of+0x10/", ALSO_STREAM),
    "the top func's stack_node.next": Damage(
        in_func("stack_node.next"), LISTS, "klp_func[] of patch fix_area2+0x70/"
    ),
    "the lower func's stack_node.prev": Damage(
        in_func("stack_node.prev", 1), LISTS, "klp_func[] of patch fix_area+0x78/"
    ),
    "klp_patches.next": Damage(symbol("klp_patches"), LISTS, "klp_patches+0x0/"),
    "klp_patches.prev": Damage(symbol("klp_patches", 8), LISTS, "klp_patches+0x8/"),
    "klp_patch.list.next": Damage(in_patch("list.next"), LISTS, "klp_patch of patch fix_area+0x"),
    "klp_patch.obj_list": Damage(in_patch("obj_list.next"), LISTS, "klp_patch of patch fix_area+0x"),
    "klp_func.node": Damage(in_func("node.next"), LISTS, "klp_func[] of patch fix_area2+0x60/"),
    "the task list": Damage(in_task("tasks.next"), LISTS, "task_struct init+0x"),
    "the trampoline list": Damage(in_ops("fops.list.next"), LISTS, "klp_ops of area_of+0x"),
    # ftrace_ops_list has no way back: what is behind the damage is lost for everyone who reads it.
    "ftrace_ops_list": Damage(symbol("ftrace_ops_list", 5), LISTS, "0x", frozenset({RECORDS})),
    "ftrace_ops.next": Damage(
        lambda kernel, raw: raw.member("ftrace_ops", raw.u64(raw.symbol("ftrace_ops_list")), "next") + 5,
        LISTS,
        "0x",
        frozenset({RECORDS}),
    ),
    # Records and hashes.
    "a record's count": Damage(in_record("flags"), RECORDS, "area_of+0x0/", mask=0x02),
    "a record's IPMODIFY flag": Damage(in_record("flags", 3), RECORDS, "area_of+0x0/", mask=0x04),
    "a record's TRAMP_EN flag": Damage(
        in_record("flags", 3), RECORDS, "area_of+0x0/", frozenset({TEXT}), mask=0x08
    ),
    "a record's ENABLED flag": Damage(in_record("flags", 3), RECORDS, "area_of+0x0/", mask=0x80),
    "the flags of another record": Damage(
        lambda kernel, raw: (
            kernel.machine.ftrace.records.lookup_rec(*[kernel.site_of("fib")[0]] * 2).address_ + 8
        ),
        RECORDS,
        "fib+0x0/",
        mask=0x01,
    ),
    "a record's ip": Damage(in_record("ip"), RECORDS, "area_of+0x0/", mask=0x01),
    "ftrace_page.index": Damage(
        lambda kernel, raw: raw.member("ftrace_page", raw.u64(raw.symbol("ftrace_pages_start")), "index") + 3,
        RECORDS,
        "ftrace_page+0x10/",
    ),
    "the count of a hash": Damage(in_hash("count"), RECORDS, "ftrace_hash+0x10/", mask=0x02),
    "the size of a hash": Damage(
        in_hash("size_bits", 2), RECORDS, "ftrace_hash+0x0/", frozenset({"ipmodify_is_exclusive"})
    ),
    "the buckets of a hash": Damage(in_hash("buckets", 5), RECORDS, "klp_ops of area_of+0x20/"),
    "the address in a hash entry": Damage(in_hash("ip"), RECORDS, "area_of+0x0/", mask=0x01),
    # The patches.
    "new_func of the top func": Damage(in_func("new_func"), STACKS, "area_of+0x0/", ALSO_STREAM, mask=0x10),
    "new_func of the func below": Damage(in_func("new_func", 1), STACKS, "area_of+0x0/"),
    "nop of the top func": Damage(in_func("nop"), STACKS, "area_of+0x0/", ALSO_STREAM, mask=0x01),
    "nop of the func below": Damage(in_func("nop", 1), STACKS, "area_of+0x0/", mask=0x01),
    "old_func of the top func": Damage(in_func("old_func"), STACKS, "klp_ops of area_of+0x10/"),
    "patched of the top func": Damage(
        in_func("patched"), STACKS, "klp_func[] of patch fix_area2+0x91/", mask=1
    ),
    "transition of the func below": Damage(
        in_func("transition", 1), STACKS, "klp_func[] of patch fix_area+0x92/", mask=1
    ),
    "the module of a patch": Damage(in_patch("mod"), LISTED, "klp_patches"),
    "klp_transition_patch": Damage(symbol("klp_transition_patch"), LISTED, "klp_transition_patch+0x0/"),
    "patch_state of the current task": Damage(in_task("patch_state"), TASKS, "task_struct init+0x"),
    "patch_state of the idle task": Damage(
        lambda kernel, raw: raw.member("task_struct", raw.symbol("init_task"), "patch_state"),
        TASKS,
        "init_task+0x",
    ),
    "klp_target_state": Damage(symbol("klp_target_state"), TASKS, "klp_target_state+0x0/"),
    # The heap.
    "the red zone before an object": Damage(
        lambda kernel, raw: area_ops(kernel, raw) - 1, HEAP, "klp_ops of area_of-0x1/"
    ),
    "the red zone behind an object": Damage(
        lambda kernel, raw: area_ops(kernel, raw) + raw.layouts.sizeof("klp_ops"),
        HEAP,
        "klp_ops of area_of+0xd8/",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_byte_is_reported_and_nothing_unrelated(name: str, stacked: Kernel, raw: Raw) -> None:
    case = CASES[name]
    address = case.where(stacked, raw)
    before = raw.flip(address, case.mask)
    report = stacked.verify("after the damage")
    shown = "\n".join(line for each in report.findings for line in (str(each), each.symbol, *each.details()))
    about = [each for each in report.findings if each.invariant == case.invariant]
    assert any(each.symbol.startswith(case.symbol) for each in about), shown
    assert invariants(report) - {case.invariant} == case.also, shown
    assert all(each.step == "after the damage" for each in report.findings)
    assert raw.flip(address, case.mask) == before ^ case.mask, "verification wrote nothing"
    assert stacked.verify().holds
    assert stacked.call("area_of", 3, 4) == 120000


def test_every_invariant_has_damage_that_makes_it_report() -> None:
    # Not in CASES: tests below, test_relocations.py, test_shadow_variables.py, test_sysfs_directories.py and
    # test_redirection.py.
    elsewhere = {REMAINS, RELOCATIONS, SYSFS} | SHADOWS | REDIRECTION
    covered = {case.invariant for case in CASES.values()} | elsewhere
    assert covered == {invariant.__name__ for invariant in INVARIANTS} - {STREAMS}
    assert STREAMS in {name for case in CASES.values() for name in case.also}


def test_the_finding_of_a_damaged_site_shows_both_instructions(stacked: Kernel, raw: Raw) -> None:
    site_address, call = stacked.site_of("area_of")
    raw.flip(site_address + 1, 0x01)
    finding = only(stacked.verify(), TEXT)
    assert (finding.address, finding.expected) == (site_address, call)
    assert finding.found == bytes([call[0], call[1] ^ 1, *call[2:]])
    target = raw.trampoline(area_ops(stacked, raw))
    assert finding.details() == [
        f"  expected {call.hex(' ')}  call {target:#x}",
        f"  found    {finding.found.hex(' ')}  call {target + (1 if finding.found[1] & 1 else -1):#x}",
    ]


def test_the_finding_of_damaged_text_shows_whole_instructions(stacked: Kernel, raw: Raw) -> None:
    address = stacked.address_of("area_of") + 5
    code = raw.space.read(address, 4)
    raw.flip(address + 2)
    finding = only(stacked.verify(), TEXT)
    assert finding.address == address
    assert code.startswith(finding.expected)
    assert "lea rax, [rdi + rsi]" in finding.details()[0]


def test_the_finding_of_a_damaged_pointer_shows_both_values(stacked: Kernel, raw: Raw) -> None:
    at = raw.member("klp_ops", area_ops(stacked, raw), "func_stack.prev")
    before = raw.u64(at)
    raw.put(at, 0xDEAD_BEEF)
    finding = only(stacked.verify(), LISTS)
    assert (finding.address, finding.symbol) == (at, "klp_ops of area_of+0x18/0xd8")
    assert finding.expected == before.to_bytes(8, "little")
    assert finding.found == (0xDEAD_BEEF).to_bytes(8, "little")
    assert finding.details()[1].endswith("0xdeadbeef")


def test_swapped_stack_nodes_are_reported_with_both_orders(stacked: Kernel, raw: Raw) -> None:
    head = raw.member("klp_ops", area_ops(stacked, raw), "func_stack")
    first, second = raw.u64(head), raw.u64(raw.u64(head))
    for at, following, back in ((head, second, first), (second, first, head), (first, head, second)):
        raw.put(at, following)
        raw.put(at + 8, back)
    report = stacked.verify()
    assert invariants(report) == {STACKS, STREAMS, "newest_wins"}
    assert only(report, STACKS).what == (
        "func_stack is [fixed_area_of, area_in_cm], expected [area_in_cm, fixed_area_of]"
    )


def test_a_store_to_a_freed_object_is_reported(stacked: Kernel, raw: Raw) -> None:
    freed = area_ops(stacked, raw)
    stacked.disable("fix_area2")
    stacked.disable("fix_area")
    raw.put(freed + 24, 0x42, 1)
    report = stacked.verify()
    assert invariants(report) == {HEAP}
    finding = only(report, HEAP)
    assert finding.what.startswith("freed object written to: klp_ops of area_of")
    assert (finding.address, finding.expected, finding.found) == (freed + 24, b"\x6b", b"\x42")


def test_a_leaked_allocation_is_reported_once_all_patches_are_gone(kernel: Kernel) -> None:
    leak = kernel.machine.slab.kzalloc(100, "a forgotten buffer")
    kernel.enable(fix_area())
    assert kernel.verify().holds, "while a patch is enabled nobody can tell whose it is"
    kernel.disable("fix_area")
    report = kernel.verify()
    assert invariants(report) == {REMAINS}
    finding = only(report, REMAINS)
    assert (finding.address, finding.what) == (leak, "still allocated: a forgotten buffer")
    kernel.machine.slab.kfree(leak)
    assert kernel.verify().holds


def test_a_leaked_trampoline_is_reported(kernel: Kernel) -> None:
    kernel.machine.area.module_alloc(207, "ftrace_trampoline nobody freed")
    assert only(kernel.verify(), REMAINS).what == "still allocated: ftrace_trampoline nobody freed"


def test_a_site_that_still_calls_although_no_patch_is_left_is_reported(kernel: Kernel, raw: Raw) -> None:
    kernel.enable(fix_area())
    address, call = kernel.site_of("area_of")
    kernel.disable("fix_area")
    raw.space.write(address, call)
    finding = only(kernel.verify(), TEXT)
    assert (finding.expected, finding.found) == (bytes.fromhex("0f1f440000"), call)


def test_two_damages_are_two_findings(stacked: Kernel, raw: Raw) -> None:
    raw.flip(stacked.address_of("fib") + 9)
    raw.flip(stacked.address_of("ack") + 9)
    names = {finding.symbol.split("+")[0] for finding in stacked.verify().findings}
    assert names == {"fib", "ack"}


def test_damage_of_one_function_is_not_blamed_on_the_other(kernel: Kernel, raw: Raw) -> None:
    kernel.enable(fix_area())
    kernel.enable(fix_area2())
    raw.flip(kernel.site_of("perimeter_of")[0] + 2)
    assert all(finding.symbol.startswith("perimeter_of+0x0/") for finding in kernel.verify().findings)
