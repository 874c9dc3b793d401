"""A patch that cannot be enabled leaves no trace, and the log says what the kernel says.

The lines are those of kernel/livepatch/core.c, patch.c and transition.c, in their order.
"""

from typing import Any

import pytest
from livepatches import AREA, BUILD, PERIMETER, Raw, fix_area, fix_area2, livepatch

from elf.errors import KlpemuError
from emu.errno import KernelErrno
from emu.ftrace import FtraceOpsFl
from klpemu import Func, Kernel, Patch
from patches import core

NO_SITE = Func("notrace_add", "fixed_sum_many")
GOOD = (Func("fib", "fixed_fib"), Func("tail_inner", "fixed_tail_inner"))


def trace_of(kernel: Kernel) -> dict[str, object]:
    """Everything a failed enable could leave behind."""
    machine = kernel.machine
    records = {record.ip: record.flags for record in machine.ftrace.records}
    return {
        "text": [machine.space.read(text.address, len(text.contents)) for text in kernel.subject().texts],
        "slab": {at: size for at, (size, _) in machine.slab.live.items()},
        "contents": {
            at: machine.space.read(at, size)
            for at, (size, tag) in machine.slab.live.items()
            if "task" not in tag
        },
        "area": dict(machine.area.live),
        "records": records,
        "globals": [
            machine.space.read(machine.vmlinux.symbols[name], 16)
            for name in ("klp_patches", "klp_ops", "modules", "ftrace_ops_trampoline_list")
        ],
        "pointers": [
            machine.space.read(machine.vmlinux.symbols[name], 8)
            for name in ("ftrace_ops_list", "ftrace_trace_function", "klp_transition_patch")
        ],
        "target": machine.space.read(machine.vmlinux.symbols["klp_target_state"], 4),
        "modules": list(machine.modules.objects),
        "enabled": [each.patch.name for each in kernel.enabled],
    }


def refused(kernel: Kernel, patch: Patch) -> tuple[KlpemuError, list[str]]:
    """Enable a patch that must be refused without a trace; returns the error and the lines logged."""
    before, lines = trace_of(kernel), len(kernel.log)
    with pytest.raises(KlpemuError) as caught:
        kernel.enable(patch)
    assert trace_of(kernel) == before
    assert kernel.verify().holds
    assert kernel.machine.warnings == []
    return caught.value, kernel.log[lines:]


def errno_of(error: KlpemuError) -> str:
    assert isinstance(error, KernelErrno)
    return error.name


def failed_to_patch(name: str, why: str, objname: str = "vmlinux") -> list[str]:
    return [
        f"livepatch: enabling patch '{name}'",
        f"livepatch: '{name}': initializing patching transition",
        f"livepatch: {why}",
        f"livepatch: failed to patch object '{objname}'",
        f"livepatch: failed to enable patch '{name}'",
        f"livepatch: '{name}': canceling patching transition, going to unpatch",
        f"livepatch: '{name}': completing unpatching transition",
        f"livepatch: '{name}': unpatching complete",
    ]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("below", [False, True], ids=["on an unpatched kernel", "on a patched kernel"])
def test_a_third_function_without_a_site_undoes_the_first_two(
    below: bool, replace: bool, kernel: Kernel
) -> None:
    if below:
        kernel.enable(fix_area())
        kernel.enable(livepatch("fix_all", *GOOD, name="older"))
    error, lines = refused(kernel, livepatch("fix_all", *GOOD, NO_SITE, replace=replace))
    assert errno_of(error) == "EINVAL"
    assert lines == failed_to_patch("fix_all", "failed to find location for function 'notrace_add'")
    assert kernel.call("fib", 10) == (123 if below else 55)


def test_a_second_object_that_fails_unpatches_the_first(kernel: Kernel) -> None:
    kernel.load_module(BUILD / "no_site.o")
    objects = {"vmlinux": GOOD, "no_site": (Func("form_twice", "fixed_fib"),)}
    error, lines = refused(kernel, Patch("fix_all", objects, code=BUILD / "fix_all.o"))
    assert errno_of(error) == "EINVAL"
    assert lines == failed_to_patch("fix_all", "failed to find location for function 'form_twice'", "no_site")


def foreign_ipmodify(kernel: Kernel, function: str) -> Any:
    """An ops of somebody else that changes where `function` goes."""
    machine = kernel.machine
    ops = machine.view(
        "ftrace_ops", machine.slab.kzalloc(machine.layouts.sizeof("ftrace_ops"), "foreign ops")
    )
    ops.func = machine.symbol("trace_count")
    ops.private = machine.slab.kzalloc(8, "counter")
    ops.flags = FtraceOpsFl.DYNAMIC | FtraceOpsFl.IPMODIFY
    location = machine.ftrace.ftrace_location(kernel.address_of(function))

    def register() -> None:
        machine.ftrace.ftrace_set_filter_ip(ops, location, remove=False)
        machine.ftrace.register_ftrace_function(ops)

    machine.service("register", register)
    kernel.patches.baseline = set(kernel.patches.allocations())  # it is not livepatch's to free
    return ops


def test_a_third_function_that_somebody_else_redirects_undoes_the_first_two(kernel: Kernel) -> None:
    foreign_ipmodify(kernel, "sum_many")
    third = Func("sum_many", "fixed_sum_many")
    error, lines = refused(kernel, livepatch("fix_all", *GOOD, third))
    assert errno_of(error) == "EBUSY"
    assert lines == failed_to_patch(
        "fix_all", "failed to register ftrace handler for function 'sum_many' (-16)"
    )


@pytest.mark.parametrize(
    ("func", "line"),
    [
        (Func("nobody", "fixed_fib"), "symbol 'nobody' not found in symbol table"),
        (
            Func("fib", "fixed_fib", sympos=2),
            "symbol position 2 for symbol 'fib' in object 'vmlinux' not found",
        ),
        (
            Func("same_name", "fixed_fib"),
            "unresolvable ambiguity for symbol 'same_name' in object '(null)'",
        ),
        (
            Func("same_name", "fixed_fib", sympos=3),
            "symbol position 3 for symbol 'same_name' in object 'vmlinux' not found",
        ),
    ],
    ids=["missing", "sympos too large", "ambiguous", "ambiguous, sympos too large"],
)
def test_a_symbol_that_cannot_be_found_stops_the_patch_before_anything_is_patched(
    func: Func, line: str, kernel: Kernel
) -> None:
    error, lines = refused(kernel, livepatch("fix_all", Func("ack", "fixed_fib"), func))
    assert errno_of(error) == "EINVAL"
    assert lines == [f"livepatch: {line}"]
    assert not kernel.machine.ftrace.enabled_functions()


def test_a_missing_symbol_of_a_module_names_the_module(kernel: Kernel) -> None:
    kernel.load_module(BUILD / "no_site.o")
    func = Func("form_twice", "fixed_fib", sympos=2)
    _, lines = refused(kernel, Patch("fix_all", {"no_site": (func,)}, code=BUILD / "fix_all.o"))
    assert lines == ["livepatch: symbol position 2 for symbol 'form_twice' in object 'no_site' not found"]


@pytest.mark.parametrize("sympos", [0, 1], ids=["as it is", "sympos 1 is the same"])
def test_a_function_named_twice_is_refused_as_sysfs_refuses_it(sympos: int, kernel: Kernel) -> None:
    twice = Func("area_of", "fixed_perimeter_of", sympos=sympos)
    error, lines = refused(kernel, livepatch("fix_area", AREA, PERIMETER, twice))
    assert errno_of(error) == "EEXIST"
    assert lines == [
        "sysfs: cannot create duplicate filename '/kernel/livepatch/fix_area/vmlinux/area_of,1'",
        "kobject_add_internal failed for area_of,1 with -EEXIST, "
        "don't try to register things with the same name in the same directory.",
    ]


def test_a_replacement_that_is_not_there_is_named(kernel: Kernel) -> None:
    error, lines = refused(kernel, livepatch("fix_area", AREA, Func("perimeter_of", "nobody")))
    assert "no function 'nobody' to replace with" in str(error)
    assert lines == []


def test_the_name_of_an_enabled_patch_is_taken(stacked: Kernel) -> None:
    error, lines = refused(stacked, fix_area())
    assert errno_of(error) == "EEXIST"
    assert lines == []


def test_an_object_name_that_no_module_can_have_is_refused(kernel: Kernel) -> None:
    error, _ = refused(kernel, Patch("fix_area", {"m" * 56: (AREA,)}, code=BUILD / "fix_area.o"))
    assert errno_of(error) == "EINVAL"


def test_a_function_name_longer_than_any_symbol_is_refused(kernel: Kernel) -> None:
    error, _ = refused(kernel, livepatch("fix_area", Func("f" * 512, "fixed_area_of")))
    assert errno_of(error) == "EINVAL"


def test_nothing_can_be_enabled_or_disabled_while_a_transition_is_on(stacked: Kernel, raw: Raw) -> None:
    top = stacked.enabled[1]
    at = raw.symbol("klp_transition_patch")
    raw.put(at, top.guest.address_)
    raw.put(raw.symbol("klp_target_state"), 1, 4)
    lines = len(stacked.log)
    with pytest.raises(KernelErrno, match="EBUSY"):
        stacked.enable(fix_area2(name="third"))
    with pytest.raises(KernelErrno, match="EBUSY"):
        stacked.disable("fix_area")
    assert stacked.log[lines:] == [], "the kernel says nothing"
    raw.put(at, 0)
    raw.put(raw.symbol("klp_target_state"), -1, 4)
    assert stacked.verify().holds
    assert stacked.call("area_of", 3, 4) == 120000


def test_disabling_the_patch_in_transition_turns_the_transition_around(kernel: Kernel, raw: Raw) -> None:
    kernel.enable(fix_area())
    patch = kernel.enabled[0].guest
    raw.put(raw.symbol("klp_transition_patch"), patch.address_)
    raw.put(raw.symbol("klp_target_state"), 1, 4)
    lines = len(kernel.log)
    kernel.machine.service("write", lambda: core.enabled_store(kernel.klp, patch, False))
    assert kernel.log[lines:] == [
        "livepatch: 'fix_area': reversing transition from patching to unpatching",
        "livepatch: 'fix_area': starting unpatching transition",
    ]
    assert not patch.enabled
    assert kernel.klp.klp_target_state.get() == 0


def test_a_patch_cannot_be_set_to_the_state_that_it_has(kernel: Kernel) -> None:
    kernel.enable(fix_area())
    guest = kernel.enabled[0].guest
    with pytest.raises(KernelErrno, match="EINVAL"):
        kernel.machine.service("write", lambda: core.enabled_store(kernel.klp, guest, True))
    assert kernel.verify().holds


def test_a_patch_that_is_not_enabled_cannot_be_disabled(kernel: Kernel) -> None:
    with pytest.raises(KernelErrno, match="ENOENT"):
        kernel.disable("fix_area")


def test_with_ftrace_dead_nothing_can_be_enabled(kernel: Kernel, raw: Raw) -> None:
    raw.put(raw.symbol("ftrace_disabled"), 1, 4)
    sites = kernel.site_of("area_of"), kernel.site_of("perimeter_of")
    with pytest.raises(KernelErrno) as caught:
        kernel.enable(fix_area())
    assert caught.value.name == "ENODEV"
    assert kernel.log == failed_to_patch(
        "fix_area", "failed to set ftrace filter for function 'area_of' (-19)"
    )
    assert (kernel.site_of("area_of"), kernel.site_of("perimeter_of")) == sites
    assert kernel.call("area_of", 3, 4) == 7
    assert raw.u64(raw.symbol("klp_patches")) == raw.symbol("klp_patches")
    assert raw.u64(raw.symbol("klp_ops")) == raw.symbol("klp_ops")
    assert kernel.machine.warnings == []


def test_with_ftrace_dead_removing_the_last_patch_warns_and_goes_on(kernel: Kernel, raw: Raw) -> None:
    """The kernel frees the klp_ops although the site still calls through it: verification says so."""
    kernel.enable(fix_area())
    raw.put(raw.symbol("ftrace_disabled"), 1, 4)
    kernel.disable("fix_area")
    assert kernel.log[-1] == "livepatch: 'fix_area': unpatching complete"
    conditions = [warning.split(": ", 1)[1] for warning in kernel.machine.warnings]
    assert conditions == 2 * [
        "unregister_ftrace_function(&ops->fops)",
        "ftrace_set_filter_ip(&ops->fops, ftrace_loc, 1, 0)",
    ]
    raw.put(raw.symbol("ftrace_disabled"), 0, 4)
    found = {finding.invariant for finding in kernel.verify().findings}
    assert "lists_are_well_formed" in found


def test_a_site_that_holds_something_else_is_an_ftrace_bug(kernel: Kernel, raw: Raw) -> None:
    site, _ = kernel.site_of("perimeter_of")
    raw.space.write(site, b"\x90" * 5)
    with pytest.raises(KernelErrno) as caught:
        kernel.enable(fix_area())
    assert caught.value.name == "ENODEV"
    lines = kernel.log
    assert lines.index("------------[ ftrace bug ]------------") < lines.index(
        "livepatch: failed to register ftrace handler for function 'perimeter_of' (-19)"
    )
    assert lines[-5:] == failed_to_patch("fix_area", "")[3:]
    assert raw.space.read(site, 5) == b"\x90" * 5


def test_what_klpemu_answers_itself_cannot_be_patched_and_it_says_so() -> None:
    """A kernel has a site in msleep(); the built-in kernel has no code of it at all."""
    kernel = Kernel.load()
    patch = Patch("fix_msleep", {"vmlinux": [Func("msleep", "fixed_area_of")]}, code=fix_area().code)
    error, lines = refused(kernel, patch)
    assert errno_of(error) == "EINVAL"
    assert "klpemu answers 'msleep' in Python" in str(error)
    assert "klpemu: 'msleep' is answered in Python: a patch of it cannot be judged here" in lines
