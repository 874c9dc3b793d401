"""Verification of a saved core finds what verification of the machine finds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from livepatches import Raw, fix_area, fix_area2

from emu.core_memory import CoreMemory
from emu.vmcore import save_core
from klpemu import Kernel
from patches.invariants.finding import Report
from patches.invariants.verify import verify


def of_the_machine(kernel: Kernel) -> Report:
    """Everything that needs no execution."""
    return verify(replace(kernel.subject(), execute=None))


def of_the_core(kernel: Kernel, path: Path) -> Report:
    return verify(replace(kernel.subject(), memory=CoreMemory(path), execute=None))


def nothing(kernel: Kernel, raw: Raw) -> None:
    pass


def a_byte_of_a_site(kernel: Kernel, raw: Raw) -> None:
    raw.flip(kernel.site_of("area_of")[0] + 2)


def a_byte_of_a_trampoline(kernel: Kernel, raw: Raw) -> None:
    raw.flip(raw.trampoline(raw.klp_ops(kernel.address_of("perimeter_of"))) + 20)


def a_func_stack_that_leads_nowhere(kernel: Kernel, raw: Raw) -> None:
    raw.put(raw.member("klp_ops", raw.klp_ops(kernel.address_of("area_of")), "func_stack"), 0x1000)


def a_task_s_patch_state(kernel: Kernel, raw: Raw) -> None:
    raw.put(raw.member("task_struct", raw.current(kernel), "patch_state"), 1, 4)


def a_red_zone(kernel: Kernel, raw: Raw) -> None:
    raw.flip(next(iter(kernel.machine.slab.live)) - 1)


@pytest.mark.parametrize(
    "damage",
    [
        nothing,
        a_byte_of_a_site,
        a_byte_of_a_trampoline,
        a_func_stack_that_leads_nowhere,
        a_task_s_patch_state,
        a_red_zone,
    ],
)
def test_the_findings_are_the_same(
    stacked: Kernel, raw: Raw, tmp_path: Path, damage: Callable[[Kernel, Raw], None]
) -> None:
    damage(stacked, raw)
    save_core(stacked.machine, tmp_path / "vmcore")
    live, saved = of_the_machine(stacked), of_the_core(stacked, tmp_path / "vmcore")
    assert saved == live
    assert sum(live.checks.values()) > 40
    assert bool(live.findings) == (damage is not nothing)


def test_a_core_is_judged_as_it_was(kernel: Kernel, tmp_path: Path) -> None:
    kernel.enable(fix_area())
    save_core(kernel.machine, tmp_path / "vmcore")
    memory = CoreMemory(tmp_path / "vmcore")
    # Which heap objects there are is not in the memory, so it would be the machine's own now.
    expected_then = replace(kernel.subject(), memory=memory, execute=None, slab=None)
    kernel.enable(fix_area2())
    expected_now = replace(kernel.subject(), memory=memory, execute=None, slab=None)
    assert verify(expected_then).holds
    assert not verify(expected_now).holds
