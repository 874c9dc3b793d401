"""Lists and hashes that lead in a circle or to the wrong place: reading ends, and the report says where."""

from collections.abc import Callable

import pytest
from livepatches import Raw, fix_area

from klpemu import Kernel
from patches.invariants.finding import Finding, Report

RECORDS = "records_match_ops"
LISTS = "lists_are_well_formed"


def only(report: Report, invariant: str) -> Finding:
    """The one finding of an invariant."""
    found = [finding for finding in report.findings if finding.invariant == invariant]
    assert len(found) == 1, [str(finding) for finding in report.findings]
    return found[0]


def area_ops(kernel: Kernel, raw: Raw) -> int:
    return raw.klp_ops(kernel.address_of("area_of"))


def own_filter_bucket(kernel: Kernel, raw: Raw) -> int:
    ops = raw.view("klp_ops", area_ops(kernel, raw)).fops
    hashes = raw.view("ftrace_ops_hash", ops.func_hash)
    return int(raw.view("ftrace_hash", hashes.filter_hash).buckets)


CIRCLES: dict[str, tuple[Callable[[Kernel, Raw], tuple[int, int]], str, str]] = {
    "ftrace_ops_list": (
        lambda kernel, raw: (
            raw.member("ftrace_ops", raw.u64(raw.symbol("ftrace_ops_list")), "next"),
            raw.u64(raw.symbol("ftrace_ops_list")),
        ),
        LISTS,
        "ftrace_ops_list goes in a circle",
    ),
    "the record pages": (
        lambda kernel, raw: (
            raw.member("ftrace_page", raw.u64(raw.symbol("ftrace_pages")), "next"),
            raw.u64(raw.symbol("ftrace_pages_start")),
        ),
        RECORDS,
        "the list of ftrace_pages goes in a circle",
    ),
    "a hash bucket": (
        lambda kernel, raw: (raw.u64(own_filter_bucket(kernel, raw)),) * 2,
        RECORDS,
        "a bucket of a hash goes in a circle",
    ),
    "klp_ops": (
        lambda kernel, raw: (raw.u64(raw.u64(raw.symbol("klp_ops"))), raw.u64(raw.symbol("klp_ops"))),
        LISTS,
        "a link of klp_ops leads to ",
    ),
    "a func_stack": (
        lambda kernel, raw: (
            (raw.u64(raw.u64(raw.member("klp_ops", area_ops(kernel, raw), "func_stack"))),) * 2
        ),
        LISTS,
        "a link of a func_stack leads to ",
    ),
}


@pytest.mark.parametrize("name", CIRCLES)
def test_a_list_that_never_comes_back_is_reported(name: str, stacked: Kernel, raw: Raw) -> None:
    where, invariant, what = CIRCLES[name]
    at, to = where(stacked, raw)
    raw.put(at, to)
    found = [each for each in stacked.verify().findings if each.invariant == invariant]
    assert any(each.what.startswith(what) for each in found), [str(each) for each in found]


def test_a_hash_entry_in_the_wrong_bucket_is_reported(kernel: Kernel, raw: Raw) -> None:
    """A lookup would not find it there, although the set of addresses is right."""
    machine = kernel.machine
    ops = machine.view("ftrace_ops", machine.slab.kzalloc(machine.layouts.sizeof("ftrace_ops"), "ops"))
    ops.func, ops.flags = machine.symbol("trace_count"), 1 << 1
    ops.private = machine.slab.kzalloc(8, "counter")
    sites = sorted(kernel.subject().sites)[:8]

    def register() -> None:
        for site_address in sites:
            machine.ftrace.ftrace_set_filter_ip(ops, site_address, remove=False)
        machine.ftrace.register_ftrace_function(ops)

    machine.service("register", register)
    kernel.enable(fix_area())
    assert kernel.verify().holds
    found = raw.view("ftrace_hash", raw.view("ftrace_ops_hash", ops.func_hash).filter_hash)
    heads = [found.buckets + 8 * index for index in range(1 << found.size_bits)]
    full = next(head for head in heads if raw.u64(head))
    entry = raw.u64(full)
    other = next(head for head in heads if head != full)
    raw.put(full, raw.u64(entry))
    if raw.u64(entry):
        raw.put(raw.u64(entry) + 8, full)
    raw.put(entry, raw.u64(other))
    if raw.u64(other):
        raw.put(raw.u64(other) + 8, entry)
    raw.put(entry + 8, other)
    raw.put(other, entry)
    finding = only(kernel.verify(), RECORDS)
    assert finding.address == entry
    assert "a lookup looks in" in finding.what
