"""Modules as user space sees them: /sys/module and the parameters in it."""

import errno

import pytest
from command_line import ROOT

from emu.errno import KernelErrno
from klpemu import Func, Kernel, Patch

PARAMETERS = "/sys/module/options/parameters"


@pytest.fixture
def kernel() -> Kernel:
    return Kernel.load()


def errno_of(kernel: Kernel, path: str, text: str | None = None) -> int:
    with pytest.raises(KernelErrno) as raised:
        kernel.read(path) if text is None else kernel.write(path, text)
    return raised.value.number


def test_a_parameter_is_read_and_written_by_the_modules_own_code(kernel: Kernel) -> None:
    kernel.modprobe("builtin:options.ko", "number=12")
    assert kernel.read(f"{PARAMETERS}/number") == "12\n"
    kernel.write(f"{PARAMETERS}/number", "-7\n")
    assert kernel.read(f"{PARAMETERS}/number") == "-7\n"
    kernel.write(f"{PARAMETERS}/on", "y")
    assert kernel.read(f"{PARAMETERS}/on") == "Y\n"


def test_parameters_have_their_own_rights_and_those_without_any_no_file(kernel: Kernel) -> None:
    kernel.modprobe("builtin:options.ko")
    files = kernel.machine.kernfs
    modes = {name: files.stat(f"{PARAMETERS}/{name}").mode for name in ("number", "mask", "write_only")}
    assert modes == {"number": 0o644, "mask": 0o444, "write_only": 0o200}
    assert not files.exists(f"{PARAMETERS}/hidden")


@pytest.mark.parametrize(
    ("name", "text", "number"),
    [
        ("mask", "1", errno.EACCES),
        ("write_only", None, errno.EACCES),
        ("number", "twelve", errno.EINVAL),
        ("byte", "256", errno.ERANGE),
        ("hidden", "1", errno.ENOENT),
    ],
)
def test_what_a_parameter_refuses(kernel: Kernel, name: str, text: str | None, number: int) -> None:
    kernel.modprobe("builtin:options.ko")
    assert errno_of(kernel, f"{PARAMETERS}/{name}", text) == number


def test_a_module_without_parameters_has_no_directory_of_them(kernel: Kernel) -> None:
    kernel.load_module("builtin:lamp.ko")
    assert "parameters" not in kernel.machine.kernfs.listdir("/sys/module/lamp")


def test_the_directory_comes_before_init_runs_and_goes_with_the_module(kernel: Kernel) -> None:
    """What its init function does, here to enable a patch, finds the module COMING."""
    kernel.load_module("builtin:lamp.ko")
    states: dict[str, str] = {}
    files = kernel.machine.kernfs
    kernel.machine.log.listeners.append(
        lambda line: states.__setitem__(line, files.read("/sys/module/klp_lamp/initstate"))
    )
    kernel.insmod("builtin:klp_lamp.ko")
    assert states["livepatch: enabling patch 'klp_lamp'"] == "coming\n"
    assert kernel.read("/sys/module/klp_lamp/initstate") == "live\n"
    kernel.disable("klp_lamp")
    assert files.listdir("/sys/module") == ["lamp"]


def test_a_module_that_goes_says_so_while_what_was_patched_in_it_is_reverted(kernel: Kernel) -> None:
    funcs = [Func("checked_perimeter_of", "fixed_perimeter_of")]
    build = ROOT / "fixtures" / "build"
    kernel.enable(Patch("fix_area", {"fix_shapes": funcs}, code=build / "fix_area.o"))
    kernel.load_module(build / "fix_shapes.o")
    states: dict[str, str] = {}
    files = kernel.machine.kernfs
    kernel.machine.log.listeners.append(
        lambda line: states.__setitem__(line, files.read("/sys/module/fix_shapes/initstate"))
    )
    kernel.unload_module("fix_shapes")
    assert states == {
        "livepatch: reverting patch 'fix_area' on unloading module 'fix_shapes'": "going\n",
    }


def test_an_enabled_patch_is_a_user_of_its_module(kernel: Kernel) -> None:
    """As a real 6.1 kernel shows it: refcnt 1 while it is enabled, 0 once it is disabled."""
    kernel.load_module("builtin:lamp.ko")
    kernel.modprobe("builtin:klp_lamp.ko")
    assert kernel.read("/sys/module/klp_lamp/refcnt") == "1\n"
    kernel.disable("klp_lamp")
    assert kernel.read("/sys/module/klp_lamp/refcnt") == "0\n"
    kernel.rmmod("klp_lamp")
    assert not kernel.machine.kernfs.exists("/sys/module/klp_lamp")


def test_the_taint_of_a_livepatch_is_what_debian_shows(kernel: Kernel) -> None:
    """Recorded from 6.1.192: out of tree, unsigned, and a livepatch."""
    kernel.load_module("builtin:lamp.ko")
    kernel.insmod("builtin:klp_lamp.ko")
    assert kernel.read("/sys/module/klp_lamp/taint") == "OEK\n"
    assert kernel.read("/sys/module/lamp/taint") == "OE\n"


def test_proc_modules_has_the_form_that_was_recorded(kernel: Kernel) -> None:
    """Recorded from 6.1.192: livepatch_sample 16384 1 - Live 0xffffffffc0201000 (OEK)."""
    kernel.load_module("builtin:lamp.ko")
    kernel.insmod("builtin:klp_lamp.ko")
    machine = kernel.machine
    structs = {
        name: machine.view("module", machine.modules.objects[name].struct) for name in ("lamp", "klp_lamp")
    }
    lamp, klp_lamp = (structs[name].core_layout for name in ("lamp", "klp_lamp"))
    assert kernel.read("/proc/modules") == (
        f"klp_lamp {klp_lamp.size} 1 - Live {klp_lamp.base:#x} (OEK)\n"
        f"lamp {lamp.size} 0 - Live {lamp.base:#x} (OE)\n"
    )


def test_proc_modules_names_the_users(kernel: Kernel) -> None:
    kernel.modprobe("builtin:importer.ko")
    lines = {line.split()[0]: line.split()[2:5] for line in kernel.read("/proc/modules").splitlines()}
    assert lines["exporter"] == ["1", "importer,", "Live"]
    assert lines["importer"] == ["0", "-", "Live"]


def test_a_refused_module_leaves_no_directory(kernel: Kernel) -> None:
    with pytest.raises(KernelErrno):
        kernel.modprobe("builtin:init_fails.ko")
    assert kernel.machine.kernfs.listdir("/sys/module") == []


def test_a_module_has_room_for_its_symbols_behind_its_sections(kernel: Kernel) -> None:
    """Recorded from 6.1.192, a livepatch with a page each of text, read-only data and data: 16384."""
    kernel.modprobe("builtin:own_a.ko")
    assert kernel.read("/proc/modules").split()[:2] == ["own_a", "16384"]
