"""Where sysfs and the patches in guest memory do not agree, `sysfs_shows_the_patches` says so."""

import pytest
from livepatches import Raw, fix_area, fix_area2

from klpemu import Kernel
from patches.invariants.finding import Finding
from patches.invariants.sysfs import sysfs_shows_the_patches

ROOT = "/sys/kernel/livepatch"
NAME = "sysfs_shows_the_patches"


def findings(kernel: Kernel) -> list[Finding]:
    """What this invariant says, and that `verify` says it, too."""
    found = [each for each in sysfs_shows_the_patches(kernel.subject()) if each is not None]
    assert [each.what for each in kernel.verify().findings if each.invariant == NAME] == [
        each.what for each in found
    ]
    return found


def kobj(kernel: Kernel, path: str) -> int:
    return next(address for address, each in kernel.machine.kobjects.sd.items() if each == f"{ROOT}/{path}")


@pytest.fixture
def patched(kernel: Kernel) -> Kernel:
    kernel.enable(fix_area())
    kernel.enable(fix_area2())
    assert findings(kernel) == []
    return kernel


@pytest.mark.parametrize(
    "path",
    ["fix_area", "fix_area/vmlinux", "fix_area2/vmlinux/area_of,1", "fix_area2/vmlinux/perimeter_of,1"],
)
def test_a_directory_that_is_missing(patched: Kernel, path: str) -> None:
    patched.machine.kernfs.remove(f"{ROOT}/{path}")
    found = findings(patched)
    assert found[0].what == f"{ROOT}/{path} is not there"
    assert all(each.what.startswith(f"{ROOT}/{path}") for each in found)


def test_a_directory_that_shows_nothing(patched: Kernel) -> None:
    patched.machine.kernfs.create_dir(f"{ROOT}/fix_area/vmlinux/area_of,2")
    (found,) = findings(patched)
    assert found.what == f"{ROOT}/fix_area/vmlinux/area_of,2 is there, and nothing that it shows"


def test_a_directory_of_another_kobject(patched: Kernel) -> None:
    sd = patched.machine.kobjects.sd
    one, two = (kobj(patched, f"fix_area/vmlinux/{name},1") for name in ("area_of", "perimeter_of"))
    sd[one], sd[two] = sd[two], sd[one]
    first, second = findings(patched)
    assert first.what == f"{ROOT}/fix_area/vmlinux/area_of,1 shows another kobject"
    assert first.expected == one.to_bytes(8, "little")
    assert first.found == two.to_bytes(8, "little")
    assert second.what == f"{ROOT}/fix_area/vmlinux/perimeter_of,1 shows another kobject"


def test_a_kobject_with_another_parent(patched: Kernel, raw: Raw) -> None:
    at = raw.member("kobject", kobj(patched, "fix_area/vmlinux/area_of,1"), "parent")
    raw.put(at, kobj(patched, "fix_area2/vmlinux"))
    (found,) = findings(patched)
    assert (found.what, found.address) == (
        f"the kobject of {ROOT}/fix_area/vmlinux/area_of,1 has another parent",
        at,
    )


def test_a_kobject_with_another_name(patched: Kernel, raw: Raw) -> None:
    name = raw.u64(raw.member("kobject", kobj(patched, "fix_area2/vmlinux"), "name"))
    raw.put(name, ord("V"), 1)
    (found,) = findings(patched)
    assert found.what == f"the kobject of {ROOT}/fix_area2/vmlinux is called 'Vmlinux'"


def test_a_patch_off_the_list_may_stay_as_long_as_somebody_refers_to_it(patched: Kernel, raw: Raw) -> None:
    patch = patched.enabled[0].guest.address_
    links = raw.member("klp_patch", patch, "list")
    following, before = raw.u64(links), raw.u64(links + 8)
    raw.put(before, following)
    raw.put(following + 8, before)
    assert findings(patched) == []
    counter = raw.member("kobject", kobj(patched, "fix_area"), "kref")
    raw.put(counter, 0, 4)
    (found,) = findings(patched)
    assert found.what == f"{ROOT}/fix_area is there, and nothing that it shows"
