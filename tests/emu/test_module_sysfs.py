"""/sys/module/<name>: there while the module is, and true."""

import pytest
from machines import boot, image

from emu.errno import KernelErrno
from emu.machine import Machine
from emu.module_sysfs import module_flags_taint

LAMP = "/sys/module/lamp"


def load(machine: Machine, name: str = "lamp.ko") -> None:
    machine.service("load", lambda: machine.modules.load_module(image(name)))


def test_a_module_shows_what_its_struct_says(machine: Machine) -> None:
    load(machine)
    module = machine.view("module", machine.modules.objects["lamp"].struct)
    assert machine.kernfs.listdir(LAMP) == ["coresize", "initsize", "initstate", "refcnt", "taint"]
    assert machine.kernfs.read(f"{LAMP}/initstate") == "live\n"
    assert machine.kernfs.read(f"{LAMP}/refcnt") == "0\n"
    assert machine.kernfs.read(f"{LAMP}/coresize") == f"{module.core_layout.size}\n" != "0\n"
    assert module.mkobj.mod == module.address_
    module.refcnt.counter = module.refcnt.counter + 2
    assert machine.kernfs.read(f"{LAMP}/refcnt") == "2\n"


def test_a_module_that_goes_takes_its_directory_with_it(machine: Machine) -> None:
    load(machine)
    file = machine.kernfs.open(f"{LAMP}/refcnt")
    machine.service("unload", lambda: machine.modules.unload_module("lamp"))
    assert not machine.kernfs.exists(LAMP)
    with pytest.raises(KernelErrno, match="ENODEV"):
        file.read()
    load(machine)
    assert machine.kernfs.exists(LAMP)


def test_a_module_on_its_way_says_so(machine: Machine) -> None:
    load(machine)
    module = machine.view("module", machine.modules.objects["lamp"].struct)
    shown = []
    for state in (1, 2):
        module.state = state
        shown.append(machine.kernfs.read(f"{LAMP}/initstate"))
    assert shown == ["coming\n", "going\n"]


def test_unloading_waits_for_who_is_in_the_middle_of_a_read() -> None:
    """And module memory stays until then: what the reader looks at is the module's own struct."""
    machine = boot(cpus=2)
    load(machine)
    go_on: list[bool] = []
    machine.kernfs.create_file(
        f"{LAMP}/slow", 0o444, show=lambda: str(machine.hub.wait(lambda: bool(go_on), "the test"))
    )
    task = next(each for each in machine.tasks if each.name == "task2")
    reading = machine.hub.serve(task, "read", lambda: machine.kernfs.read(f"{LAMP}/slow"))
    machine.run(lambda: False, 2)
    machine.timers.add_timer(50, lambda: go_on.append(True), "go on")
    began = machine.timers.now
    machine.service("unload", lambda: machine.modules.unload_module("lamp"))
    assert reading.finished
    assert machine.timers.now - began >= 50


@pytest.mark.parametrize(
    ("taints", "letters"),
    [(0, ""), (1 << 12 | 1 << 13 | 1 << 15, "OEK"), (1 | 1 << 18, "PN"), (1 << 9, "")],
)
def test_taints_are_letters_in_the_order_of_their_bits(taints: int, letters: str) -> None:
    """taint_flags[]; "OEK" is what a Debian kernel says of a livepatch that one has built oneself."""
    assert module_flags_taint(taints) == letters
