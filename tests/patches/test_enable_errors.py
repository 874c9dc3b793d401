"""What klp_enable_patch() refuses and no scenario can ask for.

The others are in fixtures/scenarios/enable-errors*.toml.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from livepatches import AREA, BUILD, Raw, fix_area2, fix_shapes, livepatch

from emu.errno import KernelErrno
from emu.kallsyms import Kallsyms
from emu.module import ModuleState
from klpemu import Func, Kernel, Patch

PAGE_OF_DOCS = Path(__file__).resolve().parents[2] / "docs" / "errors.md"
SCENARIOS = Path(__file__).resolve().parents[2] / "fixtures" / "scenarios"
REFUSED = BUILD / "klp_refused.ko"
MODULE = BUILD / "fix_shapes.o"


def signed(value: int) -> int:
    """An int as a register holds it."""
    return (value & 0xFFFF_FFFF) - ((value & 0x8000_0000) << 1)


def state(kernel: Kernel) -> dict[str, Any]:
    """What a refused patch could leave behind."""
    machine = kernel.machine
    return {
        "slab": dict(machine.slab.live),
        "area": dict(machine.area.live),
        "text": [machine.space.read(text.address, len(text.contents)) for text in kernel.subject().texts],
        "functions": machine.ftrace.enabled_functions(),
        "modules": list(machine.modules.objects),
        "enabled": [each.patch.name for each in kernel.enabled],
        "sysfs": machine.kernfs.listdir("/sys/kernel/livepatch"),
    }


class NthFails:
    """The nth allocation from when klp_enable_patch() begins finds no memory."""

    def __init__(self, nth: int) -> None:
        self.left = nth
        self.failed = ""

    def __call__(self, tag: str) -> bool:
        self.left -= 1
        if self.left == 0:
            self.failed = tag
        return self.left == 0


@pytest.fixture
def fail_nth(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel, int], NthFails]:
    """As the kernel's /proc/<pid>/fail-nth, but counted in klp_enable_patch() only."""
    from patches import core

    enable = core.klp_enable_patch

    def arm(kernel: Kernel, nth: int) -> NthFails:
        fails = NthFails(nth)

        def klp_enable_patch(klp: Any, patch_: Any) -> None:
            kernel.machine.slab.fails = fails
            try:
                enable(klp, patch_)
            finally:
                kernel.machine.slab.fails = lambda tag: False

        monkeypatch.setattr(core, "klp_enable_patch", klp_enable_patch)
        return fails

    return arm


def is_refused(kernel: Kernel, patch: Patch) -> bool:
    """Enable a patch; False if that works, and it must be ENOMEM if not."""
    try:
        kernel.enable(patch)
    except KernelErrno as error:
        if error.name != "ENOMEM":
            raise
        return True
    return False


def test_whichever_allocation_fails_the_patch_is_refused_without_a_trace(
    kernel: Kernel, fail_nth: Callable[[Kernel, int], NthFails]
) -> None:
    """A replacing patch on top of two others, one for a module that is loaded, one for one that is not."""
    kernel.load_module(MODULE)
    perimeter = Func("checked_perimeter_of", "fixed_perimeter_of")
    both = {"vmlinux": [AREA], "fix_shapes": [perimeter], "absent": [Func("nobody", "fixed_area_of")]}
    kernel.enable(Patch("below", both, code=BUILD / "fix_area.o"))
    before, area, failed = state(kernel), kernel.call("area_of", 3, 4), []
    for nth in range(1, 100):
        fails = fail_nth(kernel, nth)
        if not is_refused(kernel, fix_area2(replace=True)):
            assert not fails.failed, "it went on without that memory"
            break
        assert state(kernel) == before
        kernel.verify(fails.failed).raise_for_findings()
        assert kernel.call("area_of", 3, 4) == area
        failed.append(fails.failed.split(" of ")[0])
    assert {"dynamic klp_object", "name", "nop klp_func", "klp_ops", "ftrace_hash"} <= set(failed)
    kernel.verify().raise_for_findings()
    assert kernel.call("area_of", 3, 4) == 120000


def test_a_module_that_goes_cannot_enable_a_patch(kernel: Kernel) -> None:
    """try_module_get()."""
    kernel.load_module(REFUSED)
    module = kernel.machine.view("module", kernel.machine.modules.objects["klp_refused"].struct)
    count, before = module.refcnt.counter, state(kernel)
    module.state = ModuleState.GOING
    assert signed(kernel.call("klp_refused:try_good")) == -19
    module.state = ModuleState.LIVE
    assert (kernel.log, module.refcnt.counter, state(kernel)) == ([], count, before)


def test_an_error_gives_the_reference_of_the_module_back(kernel: Kernel) -> None:
    kernel.load_module(REFUSED)
    module = kernel.machine.view("module", kernel.machine.modules.objects["klp_refused"].struct)
    count = module.refcnt.counter
    for name in ("long_object", "no_new_func", "two_funcs", "stray"):
        assert signed(kernel.call(f"klp_refused:try_{name}")) < 0
        assert module.refcnt.counter == count, name
    kernel.call("klp_refused:try_good")
    assert module.refcnt.counter == count + 1


def test_a_function_whose_size_is_not_known_is_refused(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel asks, although what it found by name always has a size."""
    before, lookup = state(kernel), Kallsyms.lookup_size_offset
    at = kernel.address_of("area_of")

    def unknown(kallsyms: Kallsyms, address: int) -> tuple[int, int] | None:
        return None if address == at else lookup(kallsyms, address)

    monkeypatch.setattr(Kallsyms, "lookup_size_offset", unknown)
    with pytest.raises(KernelErrno) as caught:
        kernel.enable(livepatch("fix_area", AREA))
    assert caught.value.name == "ENOENT"
    assert kernel.log == ["livepatch: kallsyms size lookup failed for 'area_of'"]
    monkeypatch.undo()
    assert state(kernel) == before


def test_a_refused_replacement_leaves_the_nops_of_no_one(stacked: Kernel, raw: Raw) -> None:
    """The nop funcs are made before the objects are looked at, and must go again."""
    before = state(stacked)
    missing = Func("nobody", "checked_perimeter_of")
    with pytest.raises(KernelErrno):
        stacked.enable(livepatch("fix_shapes", missing, replace=True))
    assert state(stacked) == before
    stacked.enable(fix_shapes())
    stacked.verify().raise_for_findings()


def test_the_documented_scenarios_are_there() -> None:
    """docs/errors.md names a scenario or a test for each path."""
    rows = [line.split("|") for line in PAGE_OF_DOCS.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) >= 20
    here = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for row in rows:
        names = row[4].split("`")[1::2]
        assert names, row
        for name in names:
            assert (SCENARIOS / name).exists() or f"def {name}(" in here, name
