"""/sys/kernel/livepatch at each stage of a patch's life: what is there, what it says, what may be written."""

import errno

import pytest
from livepatches import AREA, BUILD, fix_area, fix_area2, fix_shapes, livepatch
from sleepers import NAP, sleeper, steps

from emu.errno import KernelErrno
from klpemu import Func, Kernel, Patch

ROOT = "/sys/kernel/livepatch"
FTRACE_ENABLED = "/proc/sys/kernel/ftrace_enabled"


def tree(kernel: Kernel) -> list[str]:
    """What is below /sys/kernel/livepatch, sorted."""
    return sorted(path.removeprefix(f"{ROOT}/") for path in kernel.machine.kernfs.walk(ROOT))


def says(kernel: Kernel, patch: str, *files: str) -> str:
    """What files of a patch show, without the newlines they end with."""
    shown = [kernel.read(f"{ROOT}/{patch}/{file}") for file in files or ("enabled", "transition")]
    assert all(each.endswith("\n") for each in shown)
    return "".join(each.removesuffix("\n") for each in shown)


def errno_of(kernel: Kernel, path: str, text: str | None = None) -> int:
    with pytest.raises(KernelErrno) as raised:
        kernel.read(path) if text is None else kernel.write(path, text)
    return raised.value.number


# What is there.


def test_a_patch_has_its_files_its_objects_and_their_functions(kernel: Kernel) -> None:
    kernel.enable(fix_area())
    assert tree(kernel) == [
        "fix_area",
        "fix_area/enabled",
        "fix_area/force",
        "fix_area/transition",
        "fix_area/vmlinux",
        "fix_area/vmlinux/area_of,1",
        "fix_area/vmlinux/patched",
        "fix_area/vmlinux/perimeter_of,1",
    ]
    modes = {name: kernel.machine.kernfs.stat(f"{ROOT}/fix_area/{name}").mode for name in tree_files()}
    assert modes == {"enabled": 0o644, "transition": 0o444, "force": 0o200, "vmlinux/patched": 0o444}
    kernel.disable("fix_area")
    assert tree(kernel) == []


def tree_files() -> tuple[str, ...]:
    return "enabled", "transition", "force", "vmlinux/patched"


def test_a_function_is_shown_with_its_sympos(kernel: Kernel) -> None:
    funcs = [Func("same_name", "fixed_same_name_one", 1), Func("same_name", "fixed_same_name_two", 2)]
    kernel.enable(livepatch("fix_same_name", *funcs))
    assert kernel.machine.kernfs.listdir(f"{ROOT}/fix_same_name/vmlinux") == [
        "patched",
        "same_name,1",
        "same_name,2",
    ]


def test_an_object_that_is_not_loaded_is_there_and_not_patched(kernel: Kernel) -> None:
    funcs = [Func("checked_perimeter_of", "fixed_perimeter_of")]
    kernel.enable(Patch("fix_area", {"fix_shapes": funcs}, code=BUILD / "fix_area.o"))
    patched = ["fix_shapes/patched"]
    assert says(kernel, "fix_area", *patched) == "0"
    kernel.load_module(BUILD / "fix_shapes.o")
    assert says(kernel, "fix_area", *patched) == "1"
    kernel.unload_module("fix_shapes")
    assert says(kernel, "fix_area", *patched) == "0"
    assert "fix_area/fix_shapes/checked_perimeter_of,1" in tree(kernel)


def test_enabled_and_transition_through_a_patchs_life(kernel: Kernel) -> None:
    sleeper(kernel, "nap(3000)")
    kernel.enable(steps(NAP))
    assert says(kernel, "fix_steps", "enabled", "transition", "vmlinux/patched") == "111"
    kernel.tasks.wait_for_transition()
    assert says(kernel, "fix_steps", "enabled", "transition", "vmlinux/patched") == "101"
    kernel.tasks.run(1000)
    kernel.write(f"{ROOT}/fix_steps/enabled", "0\n")
    assert says(kernel, "fix_steps", "enabled", "transition", "vmlinux/patched") == "011"
    kernel.write(f"{ROOT}/fix_steps/enabled", "1\n")  # reverse
    assert says(kernel, "fix_steps") == "11"
    kernel.tasks.wait_for_transition()
    assert says(kernel, "fix_steps") == "10"
    kernel.verify("reversed").raise_for_findings()


def test_nops_have_directories_until_they_are_discarded(kernel: Kernel) -> None:
    """And a replaced patch's directory goes when it is replaced, not before."""
    kernel.enable(livepatch("fix_area", AREA))
    sleeper(kernel, "nap(3000)")
    kernel.enable(steps(NAP, replace=True))
    names = ["area_of,1", "nap,1", "patched", "step_one,1", "step_two,1"]
    assert kernel.machine.kernfs.listdir(f"{ROOT}/fix_steps/vmlinux") == names
    assert kernel.machine.kernfs.listdir(ROOT) == ["fix_area", "fix_steps"]
    kernel.tasks.wait_for_transition()
    assert kernel.machine.kernfs.listdir(f"{ROOT}/fix_steps/vmlinux") == names[1:]
    assert kernel.machine.kernfs.listdir(ROOT) == ["fix_steps"]
    kernel.verify("replaced").raise_for_findings()


def test_an_object_that_was_made_for_nops_goes_with_them(kernel: Kernel) -> None:
    kernel.load_module(BUILD / "fix_shapes.o")
    funcs = [Func("checked_perimeter_of", "fixed_perimeter_of")]
    kernel.enable(Patch("fix_area", {"fix_shapes": funcs}, code=BUILD / "fix_area.o"))
    sleeper(kernel, "nap(3000)")
    kernel.enable(steps(NAP, replace=True))
    assert "fix_steps/fix_shapes/checked_perimeter_of,1" in tree(kernel)
    kernel.tasks.wait_for_transition()
    assert not [path for path in tree(kernel) if "fix_shapes" in path]


def test_the_directories_go_after_the_line_that_the_transition_is_complete(kernel: Kernel) -> None:
    kernel.enable(fix_area())
    there: dict[str, list[str]] = {}
    kernel.machine.log.listeners.append(lambda line: there.__setitem__(line, tree(kernel)))
    kernel.disable("fix_area")
    assert "fix_area/vmlinux/area_of,1" in there["livepatch: 'fix_area': unpatching complete"]
    assert tree(kernel) == []


def test_the_directory_of_a_patch_is_there_before_it_is_enabled(kernel: Kernel) -> None:
    there: list[list[str]] = []
    kernel.machine.log.listeners.append(lambda line: there.append(tree(kernel)))
    kernel.enable(fix_area())
    assert "fix_area/vmlinux/perimeter_of,1" in there[0]


def test_a_refused_patch_leaves_no_directory(kernel: Kernel) -> None:
    before = dict(kernel.machine.slab.live)
    for func in (Func("no_such_function", "fixed_area_of"), Func("area_of", "fixed_area_of", 7)):
        with pytest.raises(KernelErrno):
            kernel.enable(livepatch("fix_area", AREA, func))
        assert tree(kernel) == []
    with pytest.raises(KernelErrno, match="EEXIST"):
        kernel.enable(livepatch("fix_area", AREA, Func("area_of", "fixed_area_of", 1)))
    assert (
        kernel.log[-2]
        == "sysfs: cannot create duplicate filename '/kernel/livepatch/fix_area/vmlinux/area_of,1'"
    )
    assert tree(kernel) == []
    assert kernel.machine.slab.live == before


def test_an_object_cannot_be_called_as_a_file_of_the_patch(kernel: Kernel) -> None:
    """Both would be /sys/kernel/livepatch/fix_area/enabled."""
    with pytest.raises(KernelErrno, match="EEXIST"):
        kernel.enable(Patch("fix_area", {"enabled": [AREA]}, code=BUILD / "fix_area.o"))
    assert tree(kernel) == []


# What may be written.


@pytest.mark.parametrize(
    ("file", "text", "number"),
    [
        ("enabled", "1", errno.EINVAL),  # it is
        ("enabled", "2", errno.EINVAL),
        ("enabled", " 0", errno.EINVAL),
        ("enabled", "o", errno.EINVAL),
        ("force", "1", errno.EINVAL),  # not in transition
        ("force", "maybe", errno.EINVAL),
        ("force", None, errno.EACCES),
        ("transition", "0", errno.EACCES),
        ("vmlinux/patched", "0", errno.EACCES),
        ("vmlinux", None, errno.EISDIR),
        ("vmlinux/area_of,1", None, errno.EISDIR),
        ("no_such_file", None, errno.ENOENT),
        ("enabled/x", "1", errno.ENOTDIR),
    ],
)
def test_what_is_refused_changes_and_logs_nothing(
    kernel: Kernel, file: str, text: str | None, number: int
) -> None:
    kernel.enable(fix_area())
    before = list(kernel.log)
    assert errno_of(kernel, f"{ROOT}/fix_area/{file}", text) == number
    assert (kernel.log, says(kernel, "fix_area")) == (before, "10")
    kernel.verify("refused").raise_for_findings()


@pytest.mark.parametrize("text", ["0", "0\n", "n", "No", "off\n", "f"])
def test_every_way_to_say_no_disables_a_patch(kernel: Kernel, text: str) -> None:
    kernel.enable(fix_area())
    kernel.write(f"{ROOT}/fix_area/enabled", text)
    assert tree(kernel) == []
    assert kernel.call("area_of", 3, 4) == 7


def test_to_force_0_does_nothing(kernel: Kernel) -> None:
    sleeper(kernel, "nap(3000)")
    kernel.enable(steps(NAP))
    before = len(kernel.log)
    kernel.write(f"{ROOT}/fix_steps/force", "0")
    assert (kernel.log[before:], says(kernel, "fix_steps")) == ([], "11")


def test_force_ends_the_transition_and_keeps_the_module(kernel: Kernel) -> None:
    sleeper(kernel, "nap(3000)")
    kernel.enable(steps(NAP))
    kernel.tasks.wait_for_transition()
    kernel.tasks.run(1000)
    kernel.write(f"{ROOT}/fix_steps/enabled", "0")
    kernel.write(f"{ROOT}/fix_steps/force", "1\n")
    assert kernel.log[-1] == "livepatch: forcing remaining tasks to the patched state"
    kernel.tasks.wait_for_transition()
    assert tree(kernel) == []
    assert kernel.read("/sys/module/fix_steps/refcnt") == "1\n"


def test_another_patch_cannot_be_disabled_or_forced_while_one_is_in_transition(kernel: Kernel) -> None:
    kernel.enable(fix_area())
    sleeper(kernel, "nap(3000)")
    kernel.enable(steps(NAP))
    assert errno_of(kernel, f"{ROOT}/fix_area/enabled", "0") == errno.EBUSY
    assert errno_of(kernel, f"{ROOT}/fix_area/force", "1") == errno.EINVAL
    assert says(kernel, "fix_area") + says(kernel, "fix_steps") == "1011"


def test_patches_are_disabled_in_any_order(kernel: Kernel) -> None:
    for patch in (fix_area(), fix_area2(), fix_shapes()):
        kernel.enable(patch)
    assert kernel.machine.kernfs.listdir(ROOT) == ["fix_shapes"]  # it replaces
    kernel.enable(fix_area())
    kernel.write(f"{ROOT}/fix_shapes/enabled", "0")
    assert kernel.machine.kernfs.listdir(ROOT) == ["fix_area"]


# kernel.ftrace_enabled.


def test_ftrace_cannot_be_switched_off_while_a_patch_is_enabled(kernel: Kernel) -> None:
    kernel.enable(fix_area())
    assert errno_of(kernel, FTRACE_ENABLED, "0\n") == errno.EBUSY
    assert kernel.read(FTRACE_ENABLED) == "1\n"
    assert kernel.call("area_of", 3, 4) == 12
    kernel.verify("still on").raise_for_findings()
    kernel.disable("fix_area")
    kernel.write(FTRACE_ENABLED, "0\n")
    assert kernel.read(FTRACE_ENABLED) == "0\n"


def test_while_ftrace_is_off_no_patch_is_enabled(kernel: Kernel) -> None:
    kernel.write(FTRACE_ENABLED, "0")
    before = len(kernel.log)
    with pytest.raises(KernelErrno, match="EBUSY"):
        kernel.enable(fix_area())
    assert kernel.log[before:] == [
        "livepatch: enabling patch 'fix_area'",
        "livepatch: 'fix_area': initializing patching transition",
        "livepatch: failed to register ftrace handler for function 'area_of' (-16)",
        "livepatch: failed to patch object 'vmlinux'",
        "livepatch: failed to enable patch 'fix_area'",
        "livepatch: 'fix_area': canceling patching transition, going to unpatch",
        "livepatch: 'fix_area': completing unpatching transition",
        "livepatch: 'fix_area': unpatching complete",
    ]
    assert tree(kernel) == []
    kernel.verify("refused").raise_for_findings()
    kernel.write(FTRACE_ENABLED, "1")
    kernel.enable(fix_area())
    assert kernel.call("area_of", 3, 4) == 12
    kernel.verify("on again").raise_for_findings()
