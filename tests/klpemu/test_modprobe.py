"""modprobe and rmmod: dependencies, parameters, and livepatch modules as a kernel treats them."""

import shutil
from pathlib import Path

import pytest

from emu.errno import KernelErrno
from klpemu import Func, Kernel, KlpemuError, Patch
from klpemu.scenario_file import read_scenario
from klpemu.step_runner import StepRunner

BUILD = Path(__file__).resolve().parents[2] / "fixtures" / "build"


@pytest.fixture
def kernel() -> Kernel:
    return Kernel.load(observe=True)


def loaded(kernel: Kernel) -> list[str]:
    return [name for name in kernel.machine.modules.objects if name]


def test_what_a_module_depends_on_is_loaded_first(kernel: Kernel) -> None:
    assert kernel.modprobe("builtin:importer.ko") == "importer"
    assert loaded(kernel) == ["exporter", "importer"]
    kernel.verify().raise_for_findings()
    kernel.rmmod("importer")
    kernel.rmmod("exporter")
    assert loaded(kernel) == []
    kernel.verify().raise_for_findings()


def test_dependencies_are_found_in_the_tree_of_modules_by_name_with_dashes(tmp_path: Path) -> None:
    tree = tmp_path / "lib" / "modules" / "6.1.0" / "kernel"
    for folder in ("a", "b/c"):
        (tree / folder).mkdir(parents=True)
    shutil.copy(BUILD / "importer.ko", tree / "a" / "importer.ko")
    data = (BUILD / "importer.ko").read_bytes()
    assert data.count(b"depends=exporter\0") == 1
    shutil.copy(BUILD / "exporter.ko", tree / "b" / "c" / "exporter.ko")
    kernel = Kernel.load()
    kernel.modprobe(tree / "a" / "importer.ko")
    assert loaded(kernel) == ["exporter", "importer"]


def test_modules_that_need_each_other_are_refused(kernel: Kernel) -> None:
    with pytest.raises(KlpemuError, match="cycle_one needs cycle_two needs cycle_one"):
        kernel.modprobe("builtin:cycle_one.ko")
    assert loaded(kernel) == ["exporter"], "as modprobe leaves it"
    kernel.verify().raise_for_findings()


def test_a_module_that_is_loaded_stays_as_it_is(kernel: Kernel) -> None:
    kernel.modprobe("builtin:options.ko", "number=1")
    assert kernel.modprobe("builtin:options.ko", "number=2") == "options"
    assert kernel.read("/sys/module/options/parameters/number") == "1\n"


def test_parameters_are_files_in_sysfs(kernel: Kernel) -> None:
    kernel.modprobe("builtin:options.ko", "number=33 word=hello")
    kernel.write("/sys/module/options/parameters/number", "0x10\n")
    assert kernel.read("/sys/module/options/parameters/number") == "16\n"
    assert kernel.call("number_seen_by_init") == 33
    kernel.verify().raise_for_findings()
    kernel.rmmod("options")
    kernel.verify().raise_for_findings()


def test_a_livepatch_that_modprobe_has_loaded_stays_until_rmmod(kernel: Kernel) -> None:
    kernel.modprobe("builtin:klp_area.ko")
    assert kernel.call("area_of", 3, 4) == 12
    assert kernel.read("/sys/module/klp_area/refcnt") == "1\n"
    with pytest.raises(KernelErrno, match="module 'klp_area' is in use"):
        kernel.rmmod("klp_area")
    kernel.verify().raise_for_findings()
    kernel.disable("klp_area")
    assert loaded(kernel) == ["klp_area"]
    assert kernel.read("/sys/module/klp_area/refcnt") == "0\n"
    assert kernel.call("area_of", 3, 4) == 7
    kernel.verify().raise_for_findings()
    kernel.rmmod("klp_area")
    assert loaded(kernel) == []
    kernel.verify().raise_for_findings()


def test_a_livepatch_that_insmod_has_loaded_goes_with_its_patch(kernel: Kernel) -> None:
    kernel.insmod("builtin:klp_area.ko")
    kernel.disable("klp_area")
    assert loaded(kernel) == []
    kernel.verify().raise_for_findings()


def test_modprobe_and_insmod_can_follow_each_other(kernel: Kernel) -> None:
    for _ in range(3):
        kernel.modprobe("builtin:klp_area.ko")
        kernel.disable("klp_area")
        kernel.rmmod("klp_area")
        kernel.insmod("builtin:klp_area.ko")
        kernel.disable("klp_area")
    kernel.verify().raise_for_findings()
    assert loaded(kernel) == []


def test_a_patch_applies_to_a_module_before_its_init_runs(kernel: Kernel) -> None:
    fix = Patch("fix", {"exporter": [Func("first_factor", "fixed_area_of")]}, code="builtin:fix_area.o")
    kernel.enable(fix)
    kernel.modprobe("builtin:exporter.ko")
    # first_factor(2) is fixed_area_of(2, whatever is in rsi): not the 6 that the module computes itself.
    assert "livepatch: applying patch 'fix' to loading module 'exporter'" in kernel.log


def test_scenarios_have_modprobe_and_rmmod(tmp_path: Path) -> None:
    path = tmp_path / "life.toml"
    path.write_text(
        """
[[step]]
modprobe = "builtin:options.ko"
parameters = "number=5 nosuch=1"
log = ["options: unknown parameter 'nosuch' ignored"]
[[step]]
call = "number_seen_by_init()"
returns = 5
[[step]]
modprobe = "builtin:init_fails.ko"
error = "ENODEV"
[[step]]
modprobe = "builtin:klp_area.ko"
[[step]]
rmmod = "klp_area"
error = "in use"
[[step]]
rmmod = "options"
"""
    )
    scenario = read_scenario(path)
    runner = StepRunner(scenario)
    for step in scenario.steps:
        result = runner.perform(step)
        assert result.report.holds, [str(each) for each in result.report.findings]
    assert loaded(runner.kernel) == ["klp_area"]
