"""Each rule about who redirects a function, and about what may be reached, is broken by a raw store."""

import pytest
from livepatches import Raw, fix_area, fix_area2

from klpemu import Func, Kernel, Patch
from klpemu.ftrace_users import FtraceUsers
from patches.invariants.finding import Finding

IPMODIFY = 1 << 12


@pytest.fixture
def patched(kernel: Kernel) -> Kernel:
    kernel.enable(fix_area())
    kernel.enable(fix_area2())
    assert kernel.verify().holds
    return kernel


def found(kernel: Kernel, invariant: str) -> list[Finding]:
    return [each for each in kernel.verify().findings if each.invariant == invariant]


def test_a_second_klp_ops_of_a_function_is_reported(patched: Kernel, raw: Raw) -> None:
    area, perimeter = (patched.address_of(name) for name in ("area_of", "perimeter_of"))
    for func in raw.funcs(raw.klp_ops(perimeter)):
        raw.put(raw.member("klp_func", func, "old_func"), area)
    (finding,) = found(patched, "one_ops_per_function")
    assert (finding.address, finding.what) == (area, "2 klp_ops are there for one function")


def test_a_second_ops_with_ipmodify_is_reported(patched: Kernel, raw: Raw) -> None:
    FtraceUsers(patched).register("tracer", ["area_of"])
    assert patched.verify().holds
    ops = raw.u64(raw.symbol("ftrace_ops_list"))
    flags = raw.member("ftrace_ops", ops, "flags")
    raw.put(flags, raw.u64(flags) | IPMODIFY)
    (finding,) = found(patched, "ipmodify_is_exclusive")
    assert finding.address == patched.site_of("area_of")[0]


def test_an_older_patch_on_top_of_a_newer_one_is_reported(patched: Kernel, raw: Raw) -> None:
    ops = raw.klp_ops(patched.address_of("area_of"))
    head = raw.member("klp_ops", ops, "func_stack")
    first, second = raw.u64(head), raw.u64(raw.u64(head))
    for at, following, back in ((head, second, first), (second, first, head), (first, head, second)):
        raw.put(at, following)
        raw.put(at + 8, back)
    (finding,) = found(patched, "newest_wins")
    assert finding.what.startswith("the funcs on a func_stack are of the patches [0, 1]")


@pytest.mark.parametrize("value", [0, 0xFFFF_FFFF_C0DE_0000])
def test_an_object_with_another_module_is_reported(kernel: Kernel, raw: Raw, value: int) -> None:
    kernel.load_module("builtin:nop_mcount.o")
    funcs = [Func("form_twice", "fixed_area_of")]
    kernel.enable(Patch("fix_form", {"nop_mcount": funcs}, code="builtin:fix_area.o"))
    assert kernel.verify().holds
    patch = raw.u64(raw.symbol("klp_patches")) - raw.layouts.offsetof("klp_patch", "list")
    objs = raw.u64(raw.member("klp_patch", patch, "objs"))
    module = raw.member("klp_object", objs, "mod")
    expected = raw.put(module, value)
    (finding,) = found(kernel, "objects_know_their_modules")
    assert (finding.address, finding.expected) == (module, expected)
    assert finding.found == value.to_bytes(8, "little")


def test_a_list_that_leads_to_freed_memory_is_reported(patched: Kernel, raw: Raw) -> None:
    ops = raw.klp_ops(patched.address_of("area_of"))
    del patched.machine.slab.live[ops]
    whats = {each.what for each in found(patched, "nothing_freed_is_reachable")}
    assert whats == {"a klp_ops is not allocated", "an ops of ftrace_ops_list is not allocated"}


def test_a_trampoline_that_is_not_mapped_is_reported(patched: Kernel, raw: Raw) -> None:
    ops = raw.klp_ops(patched.address_of("area_of"))
    at = raw.member("ftrace_ops", raw.member("klp_ops", ops, "fops"), "trampoline")
    raw.put(at, 0xFFFF_FFFF_C0DE_0000)
    (finding,) = found(patched, "nothing_freed_is_reachable")
    assert finding.address == 0xFFFF_FFFF_C0DE_0000
    assert finding.what == "the trampoline of a registered ops is not mapped"


@pytest.mark.parametrize(
    "line", ["'fix_area': starting unpatching transition", "'fix_area2': unpatching complete"]
)
def test_a_log_that_says_something_else_is_reported(patched: Kernel, line: str) -> None:
    patched.machine.log.pr_notice(f"livepatch: {line}")
    (finding,) = found(patched, "log_agrees_with_the_patches")
    assert finding.what.endswith("by its structs it is: patching complete")
