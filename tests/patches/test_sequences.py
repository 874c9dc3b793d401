"""Random sequences of enable, replace, disable and call, against a model that knows nothing of machine code.

After each step verification holds, calls give what the model says, and the log has the kernel's lines and no
others. When all patches are gone the machine is what it was.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from livepatches import AREA, AREA_IN_CM, BUILD, CHECKED_PERIMETER, PERIMETER, PERIMETER_IN_CM, livepatch

from emu.memory import read_u64
from klpemu import Func, Kernel, Patch

ALL = (
    Func("sum_many", "fixed_sum_many"),
    Func("fib", "fixed_fib"),
    Func("tail_inner", "fixed_tail_inner"),
    Func("tail_outer", "fixed_tail_outer"),
    Func("checked_div", "fixed_checked_div"),
)
SAME_NAME = (
    Func("same_name", "fixed_same_name_one", sympos=1),
    Func("same_name", "fixed_same_name_two", sympos=2),
)
# Code and funcs of the patches there are; a name goes with one of them and whether it replaces.
CHOICES = {
    "area": ("fix_area", (AREA, PERIMETER)),
    "area_only": ("fix_area", (AREA,)),
    "cm": ("fix_area2", (AREA_IN_CM, PERIMETER_IN_CM)),
    "shapes": ("fix_shapes", (CHECKED_PERIMETER,)),
    "all": ("fix_all", ALL),
    "tails": ("fix_all", ALL[2:4]),
    "same_name": ("fix_same_name", SAME_NAME),
    "second": ("fix_same_name", SAME_NAME[1:]),
}


@dataclass
class Model:
    """Which patches are enabled, oldest first, and so what each call gives."""

    enabled: list[tuple[str, str]] = field(default_factory=list)  # name, choice

    def enable(self, name: str, choice: str, *, replace: bool) -> None:
        if replace:
            self.enabled.clear()
        self.enabled.append((name, choice))

    def version(self, old: str, sympos: int = 0) -> str:
        """The newest replacement of a function, "" for the original."""
        for _, choice in reversed(self.enabled):
            for func in CHOICES[choice][1]:
                if (func.old, func.sympos) == (old, sympos):
                    return func.new
        return ""

    def results(self) -> dict[tuple[str | int, ...], int]:
        """Calls, and what they give."""
        area = {"": 7, "fixed_area_of": 12, "area_in_cm": 120000}[self.version("area_of")]
        perimeter = {"": 7, "fixed_perimeter_of": 14, "perimeter_in_cm": 1400, "checked_perimeter_of": 14}[
            self.version("perimeter_of")
        ]
        inner = 3 if self.version("tail_inner") else 2
        outer = 10 if self.version("tail_outer") else 1
        one = 301 if self.version("same_name", 1) else 101
        two = 401 if self.version("same_name", 2) else 201
        return {
            ("area_of", 3, 4): area,
            ("perimeter_of", 3, 4): perimeter,
            ("measure", 3, 4): area * 1000 + perimeter,
            ("many_calls", 5): 5 * area,
            ("sum_many", *range(1, 10)): 285 if self.version("sum_many") else 45,
            ("fib", 10): 123 if self.version("fib") else 55,
            ("tail_outer", 5): (5 + outer) * inner,
            ("checked_div", 9, 0): 0 if self.version("checked_div") else (1 << 64) - 1,
            ("call_same_one", 1): one + 1000,
            ("call_same_two", 1): two + 1000,
            ("ack", 2, 3): 9,
        }


def lines_of(name: str, direction: str) -> list[str]:
    """What the kernel logs for one transition that completes at once (kernel/livepatch, with dynamic debug
    on).
    """
    enabling = [f"livepatch: enabling patch '{name}'"] if direction == "patching" else []
    steps = (
        "initializing {} transition",
        "starting {} transition",
        "completing {} transition",
        "{} complete",
    )
    return enabling + [f"livepatch: '{name}': {step.format(direction)}" for step in steps]


def state(kernel: Kernel) -> dict[str, object]:
    """What must be as it was once all patches are gone."""
    machine = kernel.machine
    return {
        "text": [machine.space.read(text.address, len(text.contents)) for text in kernel.subject().texts],
        "slab": sorted(machine.slab.live.items()),
        "area": sorted(machine.area.live.items()),
        "modules": list(machine.modules.objects),
        "ops": read_u64(machine.space, machine.symbol("ftrace_ops_list")),
        "enabled_functions": machine.ftrace.enabled_functions(),
    }


STEP = st.one_of(
    st.tuples(st.just("enable"), st.sampled_from(sorted(CHOICES)), st.booleans()),
    st.tuples(st.just("disable"), st.integers(0, 5), st.just(False)),
)


def run(kernel: Kernel, steps: list[tuple[str, str | int, bool]], *, checked: bool = True) -> None:
    """Take the steps, judge the kernel after each, and disable what is left at the end."""
    model = Model()
    start = state(kernel)
    number = 0
    for what, choice, replace in [*steps, *[("disable", 0, False)] * len(steps)]:
        lines = len(kernel.log)
        if what == "enable":
            name = f"p{number}"
            number += 1
            code, funcs = CHOICES[str(choice)]
            kernel.enable(livepatch(code, *funcs, replace=replace, name=name))
            model.enable(name, str(choice), replace=replace)
            expected = lines_of(name, "patching")
        elif model.enabled:
            name, _ = model.enabled.pop(int(choice) % len(model.enabled))
            kernel.disable(name)
            expected = lines_of(name, "unpatching")
        else:
            continue
        assert kernel.log[lines:] == expected
        if checked:
            kernel.verify(f"{what} {name}").raise_for_findings()
            for call, result in model.results().items():
                assert kernel.call(call[0], *map(int, call[1:])) == result, call
    assert [each.patch.name for each in kernel.enabled] == []
    assert state(kernel) == start
    assert kernel.machine.warnings == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEP, min_size=1, max_size=12))
def test_any_sequence_of_steps_keeps_every_invariant(steps: list[tuple[str, str | int, bool]]) -> None:
    run(Kernel.load(), steps)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEP, min_size=1, max_size=30))
def test_any_long_sequence_of_steps_keeps_every_invariant(steps: list[tuple[str, str | int, bool]]) -> None:
    run(Kernel.load(), steps)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEP, min_size=1, max_size=10))
def test_the_same_sequence_gives_the_same_events_bytes_and_log(
    steps: list[tuple[str, str | int, bool]],
) -> None:
    kernels = [Kernel.load(), Kernel.load()]
    for kernel in kernels:
        run(kernel, steps, checked=False)
    first, second = ((list(each.machine.events), each.log, memory(each)) for each in kernels)
    assert first == second


def memory(kernel: Kernel) -> bytes:
    return kernel.machine.space.arena.checkpoint()


def module_patch(name: str, *, replace: bool = False) -> Patch:
    """A patch of two objects: vmlinux, and fix_area as the module to be patched."""
    objects = {"vmlinux": (AREA_IN_CM,), "fix_area": (Func("fixed_perimeter_of", "perimeter_in_cm"),)}
    return Patch(name, objects, code=BUILD / "fix_area2.o", replace=replace)


def test_a_patch_of_several_objects_patches_each_of_them(kernel: Kernel) -> None:
    kernel.load_module(BUILD / "fix_area.o")
    start = state(kernel)
    kernel.enable(module_patch("two_objects"))
    assert kernel.verify().holds
    assert kernel.call("area_of", 3, 4) == 120000
    assert kernel.call("fix_area:fixed_perimeter_of", 3, 4) == 1400
    kernel.disable("two_objects")
    assert kernel.verify().holds
    assert kernel.call("fix_area:fixed_perimeter_of", 3, 4) == 14
    assert state(kernel) == start


def test_a_replacing_patch_gives_back_what_it_drops_of_every_object(kernel: Kernel) -> None:
    """The nop for a function of a module needs an object that the new patch does not have (a dynamic
    klp_object).
    """
    kernel.load_module(BUILD / "fix_area.o")
    kernel.enable(module_patch("two_objects"))
    kernel.enable(livepatch("fix_shapes", CHECKED_PERIMETER, replace=True))
    assert kernel.verify().holds
    assert kernel.call("area_of", 3, 4) == 7
    assert kernel.call("fix_area:fixed_perimeter_of", 3, 4) == 14
    assert kernel.site_of("fix_area:fixed_perimeter_of")[1].hex() == "0f1f440000"
    kernel.disable("fix_shapes")
    assert kernel.verify().holds


def test_an_object_that_is_not_loaded_is_left_out(kernel: Kernel) -> None:
    kernel.enable(module_patch("two_objects"))
    assert kernel.verify().holds
    assert kernel.call("area_of", 3, 4) == 120000
    assert len(kernel.machine.ftrace.enabled_functions()) == 1
    kernel.disable("two_objects")
    assert kernel.verify().holds
