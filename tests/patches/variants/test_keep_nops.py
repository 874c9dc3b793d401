"""Nops kept until the patch goes: what it costs, and that everything still holds; docs/variants.md says the
same.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
from livepatches import AREA, fix_area, fix_area2, fix_shapes, livepatch

from elf.errors import KlpemuError
from klpemu import Func, Kernel
from patches import core, stacks
from patches.variants import replaced
from patches.variants.keep_nops import nops_kept

PAGE_OF_DOCS = Path(__file__).resolve().parents[3] / "docs" / "variants.md"
NOP5 = "0f 1f 44 00 00"


@dataclass(frozen=True)
class Cost:
    """What area_of, which nobody patches any more, costs after fix_shapes has replaced fix_area."""

    site: str
    ops: int
    trampolines: int
    allocations: int
    instructions: int


def cost(kernel: Kernel) -> Cost:
    """Replace fix_area by fix_shapes, which drops area_of, and measure."""
    kernel.enable(fix_area())
    kernel.enable(fix_shapes())
    kernel.verify("replaced").raise_for_findings()
    assert kernel.call("area_of", 3, 4) == 7
    assert kernel.call("perimeter_of", 3, 4) == 14
    return Cost(
        kernel.site_of("area_of")[1].hex(" "),
        len(list(kernel.klp.ops())),
        len([tag for _, tag in kernel.machine.area.live.values() if "trampoline" in tag]),
        len(kernel.machine.slab.live),
        len(kernel.trace("area_of", 3, 4).instructions),
    )


def test_without_the_variant_a_dropped_function_costs_nothing(kernel: Kernel) -> None:
    unpatched = len(kernel.trace("area_of", 3, 4).instructions)
    found = cost(kernel)
    assert (found.site, found.ops, found.trampolines) == (NOP5, 1, 1)
    assert found.instructions == unpatched == 3
    assert kernel.function_stack("area_of") == []


def test_with_the_variant_a_dropped_function_keeps_its_whole_redirect(kernel: Kernel) -> None:
    with nops_kept():
        found = cost(kernel)
        assert found.site.startswith("e8 ")
        assert (found.ops, found.trampolines) == (2, 2)
        assert found.instructions > 50
        assert kernel.function_stack("area_of") == ["nop"]
        lines = [line.split("\t")[0] for line in kernel.machine.ftrace.enabled_functions()]
        assert [line.split()[0] for line in lines] == ["area_of", "perimeter_of"]
        kernel.disable("fix_shapes")
        kernel.verify().raise_for_findings()
        assert kernel.site_of("area_of")[1].hex(" ") == NOP5


def test_the_next_cumulative_patch_inherits_the_nops(kernel: Kernel) -> None:
    """klp_add_nops() finds the nops of the replaced patch among its funcs."""
    with nops_kept():
        kernel.enable(fix_area())
        for number in range(3):
            kernel.enable(fix_shapes(name=f"cumulative_{number}"))
            kernel.verify(f"cumulative {number}").raise_for_findings()
            assert kernel.function_stack("area_of") == ["nop"]
        kernel.enable(livepatch("fix_area", AREA, name="again"))
        kernel.verify().raise_for_findings()
        assert [each.split("+")[0] for each in kernel.function_stack("area_of")] == ["fixed_area_of", "nop"]
        assert kernel.call("area_of", 3, 4) == 12
        kernel.disable("again")
        assert kernel.call("area_of", 3, 4) == 7
        kernel.disable("cumulative_2")
        kernel.verify().raise_for_findings()


def test_a_patch_that_patches_it_again_needs_no_nop(kernel: Kernel) -> None:
    with nops_kept():
        kernel.enable(fix_area())
        kernel.enable(fix_shapes())
        kernel.enable(fix_area2(replace=True))
        kernel.verify().raise_for_findings()
        assert [each.split("+")[0] for each in kernel.function_stack("area_of")] == ["area_in_cm"]
        kernel.disable("fix_area2")
        kernel.verify().raise_for_findings()


def test_the_expectation_of_the_variant_does_not_hold_without_it(kernel: Kernel) -> None:
    """Only the doing is replaced here: verification must say that a nop stayed."""
    with replaced(core, "klp_discard_nops", lambda klp, patch: None):
        kernel.enable(fix_area())
        kernel.enable(fix_shapes())
    found = kernel.verify().findings
    assert [(each.invariant, each.what) for each in found] == [
        ("func_stacks_hold_the_patches", "func_stack is [nop], expected []")
    ]


def test_a_kernel_in_the_variant_does_not_disturb_another(kernel: Kernel) -> None:
    other = Kernel.load()
    with nops_kept():
        for each in (kernel, other):
            each.enable(fix_area())
        kernel.enable(fix_shapes())
        other.enable(fix_area2(name="fix_shapes"))
        kernel.verify().raise_for_findings()
        other.verify().raise_for_findings()


def test_a_variant_is_gone_when_its_block_ends(kernel: Kernel) -> None:
    before = core.klp_discard_nops, stacks.expected_funcs

    def fail_inside() -> None:
        with nops_kept():
            assert core.klp_discard_nops is not before[0]
            assert stacks.expected_funcs is not before[1]
            kernel.enable(livepatch("fix_area", Func("nobody", "fixed_area_of")))

    with pytest.raises(KlpemuError):
        fail_inside()
    assert (core.klp_discard_nops, stacks.expected_funcs) == before


def test_only_a_function_that_is_there_can_be_replaced() -> None:
    with (
        pytest.raises(KlpemuError, match="no function 'klp_discard_everything'"),
        replaced(core, "klp_discard_everything", lambda: None),
    ):
        pass


def test_the_table_in_the_docs_is_what_is_measured(kernel: Kernel) -> None:
    now = cost(kernel)
    with nops_kept():
        then = cost(Kernel.load())
    rows = {
        "bytes at its site": (f"`{now.site}`", f"`{then.site[:2]} rel32`"),
        "`klp_ops`, each with an `ftrace_ops`": (now.ops - 1, then.ops - 1),
        "private trampolines": (now.trampolines - 1, then.trampolines - 1),
        "heap objects": (0, then.allocations - now.allocations),
        "instructions executed by a call": (now.instructions, then.instructions),
    }
    text = PAGE_OF_DOCS.read_text()
    for name, (without, with_nops) in rows.items():
        assert f"| {name} | {without} | {with_nops} |" in text, (name, without, with_nops)
    factor = then.instructions / now.instructions
    assert f"{factor:.0f} times" in text, factor
