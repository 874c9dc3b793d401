"""The end of a patch: its kobjects are released by a work, which waits for whoever still uses them."""

import errno
from collections.abc import Callable

import pytest
from livepatches import AREA, fix_area, fix_area2, livepatch

from emu.errno import KernelErrno
from emu.events import EventKind
from emu.kobject import kobject_get, kobject_put
from emu.schedules import Seeded
from emu.task import Activity
from klpemu import Kernel, Patch
from patches import sysfs
from patches.klp import Klp
from patches.variants import replaced

ROOT = "/sys/kernel/livepatch"


@pytest.fixture
def kernel() -> Kernel:
    """Two vCPUs: on the second one somebody else does something."""
    return Kernel.load(cpus=2)


def enable(kernel: Kernel, patch: Patch) -> None:
    kernel.enable(patch)
    kernel.tasks.wait_for_transition()


def disable(kernel: Kernel) -> None:
    """Write, and let time go by: the transition is complete then, and the work has begun."""
    kernel.machine.service("write", lambda: kernel.machine.kernfs.write(f"{ROOT}/fix_area/enabled", "0"))
    kernel.machine.run(lambda: False, 1000)


def elsewhere(kernel: Kernel, body: Callable[[], object]) -> Activity:
    """Another task's service, on the other vCPU."""
    task = next(each for each in kernel.machine.tasks if each.name == "task2")
    return kernel.machine.hub.serve(task, "elsewhere", body)


def test_an_open_file_does_not_keep_the_patch_and_says_that_it_is_gone(kernel: Kernel) -> None:
    """Since kernfs an open file has a reference to its node, not to the kobject."""
    enable(kernel, fix_area())
    files = [kernel.machine.kernfs.open(f"{ROOT}/fix_area/{name}", "r") for name in ("enabled", "transition")]
    assert files[0].read() == "1\n"
    disable(kernel)
    assert "fix_area" not in kernel.machine.modules.objects
    for file in files:
        with pytest.raises(KernelErrno) as raised:
            file.read()
        assert raised.value.number == errno.ENODEV
    enable(kernel, fix_area())  # a new directory of that name is another one
    with pytest.raises(KernelErrno, match="ENODEV"):
        files[1].read()


def test_who_is_in_the_middle_of_a_read_keeps_the_patch_and_its_module(kernel: Kernel) -> None:
    """kernfs_drain(): the work waits, and with it module_put()."""
    go_on: list[bool] = []
    original = sysfs.transition_show

    def transition_show(klp: Klp, kobj: int) -> str:
        klp.machine.hub.wait(lambda: bool(go_on), "the test")
        return original(klp, kobj)

    with replaced(sysfs, "transition_show", transition_show):
        enable(kernel, fix_area())
    reading = elsewhere(kernel, lambda: kernel.machine.kernfs.read(f"{ROOT}/fix_area/transition"))
    kernel.machine.run(lambda: False, 2)
    disable(kernel)
    assert kernel.log[-1] == "livepatch: 'fix_area': unpatching complete"
    assert list(kernel.klp.patches()) == []
    assert kernel.machine.kernfs.listdir(ROOT) == []  # nobody new gets at it
    assert (reading.finished, kernel.machine.view("module", _module(kernel)).refcnt.counter) == (False, 2)
    go_on.append(True)
    kernel.machine.run(lambda: kernel.machine.workqueue.is_empty)
    assert reading.result == "0\n"
    assert "fix_area" not in kernel.machine.modules.objects
    kernel.verify("released").raise_for_findings()


def test_a_reference_to_its_kobject_keeps_the_patch_and_its_module(kernel: Kernel) -> None:
    enable(kernel, fix_area())
    (found,) = kernel.enabled
    kobj = found.guest.kobj
    kobject_get(kernel.machine, kobj)
    disable(kernel)
    assert kernel.machine.view("module", _module(kernel)).refcnt.counter == 2
    assert kernel.machine.kernfs.listdir(f"{ROOT}/fix_area") == ["enabled", "force", "transition"]
    assert kernel.machine.kernfs.read(f"{ROOT}/fix_area/enabled") == "0\n"
    kernel.verify("held").raise_for_findings()
    elsewhere(kernel, lambda: kobject_put(kernel.machine, kobj))
    kernel.machine.run(lambda: kernel.machine.workqueue.is_empty)
    assert "fix_area" not in kernel.machine.modules.objects
    assert kernel.machine.kernfs.listdir(ROOT) == []


def test_the_kobjects_go_from_the_leaves_up_and_the_module_last() -> None:
    """klp_free_patch_start() with klp_mutex held; the rest in the work: kobject, completion, module."""
    kernel = Kernel.load()
    kernel.enable(livepatch("fix_area", AREA))
    (found,) = kernel.enabled
    patch, machine = found.guest, kernel.machine
    kref = machine.layouts.offsetof("kobject", "kref")
    obj = machine.view("klp_object", patch.objs)
    places = {
        machine.view("klp_func", obj.funcs).kobj.address_ + kref: "func",
        obj.kobj.address_ + kref: "object",
        machine.symbol("klp_mutex"): "klp_mutex",
        patch.kobj.address_ + kref: "patch",
        patch.finish.address_: "finish",
        patch.follow_("mod").refcnt.address_: "module",
    }
    before = machine.events.total
    kernel.disable("fix_area")
    stores = [
        (places[event.address], int.from_bytes(event.after, "little"))
        for event in machine.events.since(before)
        if event.kind is EventKind.STORE and event.address in places
    ]
    assert stores[0][0] == "klp_mutex"
    assert [name for name, _ in stores[-2:]] == ["klp_mutex", "klp_mutex"]  # klp_module_going()
    assert stores[1:-2] == [
        ("func", 0),
        ("object", 1),  # the func was its child
        ("object", 0),
        ("patch", 1),
        ("klp_mutex", 0),
        ("patch", 0),
        ("finish", 1),
        ("finish", 0),
        ("module", 1),
    ]


@pytest.mark.parametrize("seed", range(6))
def test_whoever_goes_on_first_everything_is_released(seed: int) -> None:
    kernel = Kernel.load(cpus=2)
    kernel.machine.hub.schedule = Seeded(seed)
    enable(kernel, fix_area())
    enable(kernel, fix_area2(replace=True))
    reader = elsewhere(kernel, lambda: [kernel.machine.kernfs.listdir(ROOT) for _ in range(20)])
    kernel.disable("fix_area2")
    kernel.tasks.wait_for_transition()
    kernel.machine.run(lambda: reader.finished and kernel.machine.workqueue.is_empty)
    assert kernel.machine.kernfs.listdir(ROOT) == []
    kernel.verify("released").raise_for_findings()


def _module(kernel: Kernel) -> int:
    return kernel.machine.modules.objects["fix_area"].struct
