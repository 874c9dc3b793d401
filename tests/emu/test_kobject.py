"""Kobjects: references, names, directories, and the order in which one comes to its end."""

import errno
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.errno import KernelErrno
from emu.kobject import (
    Attribute,
    KobjType,
    kobject_add,
    kobject_create_and_add,
    kobject_del,
    kobject_get,
    kobject_init,
    kobject_put,
    kstrtobool,
)
from emu.machine import Machine
from emu.memory import read_string


def new(machine: Machine, name: str, parent: Any, ktype: KobjType | None = None) -> Any:
    address = machine.slab.kzalloc(machine.layouts.sizeof("kobject"), "test")
    kobj = machine.view("kobject", address)
    kobject_init(machine, kobj, ktype or KobjType(release=machine.slab.kfree))
    kobject_add(machine, kobj, parent, name)
    return kobj


def count(kobj: Any) -> int:
    return int(kobj.kref.refcount.refs.counter)


def test_a_kobject_has_a_name_a_parent_it_refers_to_and_a_directory(machine: Machine) -> None:
    parent = kobject_create_and_add(machine, "parent", None)
    child = new(machine, "child", parent)
    assert (read_string(machine.space, child.name), child.parent) == ("child", parent.address_)
    assert (count(parent), count(child)) == (2, 1)
    assert child.state == 0b11  # state_initialized, state_in_sysfs
    assert machine.kernfs.stat("/sys/parent/child").is_dir


def test_the_files_of_its_type_are_in_the_directory_and_know_their_kobject(machine: Machine) -> None:
    written: list[tuple[int, str]] = []
    attributes = (
        Attribute("where", 0o444, lambda kobj: f"{kobj:#x}\n"),
        Attribute("switch", 0o200, store=lambda kobj, text: written.append((kobj, text))),
    )
    kobj = new(machine, "thing", None, KobjType(default_attrs=lambda: attributes))
    assert machine.kernfs.listdir("/sys/thing") == ["switch", "where"]
    assert machine.kernfs.read("/sys/thing/where") == f"{kobj.address_:#x}\n"
    machine.kernfs.write("/sys/thing/switch", "on")
    assert written == [(kobj.address_, "on")]


def test_the_last_reference_takes_directory_name_and_the_parents_reference_with_it(machine: Machine) -> None:
    before = dict(machine.slab.live)
    parent = kobject_create_and_add(machine, "parent", None)
    child = new(machine, "child", parent)
    kobject_get(machine, child)
    kobject_put(machine, child)
    kobject_put(machine, parent)
    assert machine.kernfs.listdir("/sys/parent") == ["child"]  # the child keeps it
    kobject_put(machine, child)
    assert not machine.kernfs.exists("/sys/parent")
    assert machine.slab.live == before


def test_at_the_end_the_directory_goes_before_release_is_called(machine: Machine) -> None:
    there: list[bool] = []

    def release(kobj: int) -> None:
        there.append(machine.kernfs.exists("/sys/thing"))
        there.append(machine.view("kobject", kobj).state == 0b01)

    kobject_put(machine, new(machine, "thing", None, KobjType(release)))
    assert there == [False, True]


def test_a_second_directory_of_one_name_is_refused_with_the_kernels_lines(machine: Machine) -> None:
    parent = kobject_create_and_add(machine, "parent", None)
    new(machine, "twin", parent)
    logged, allocated = len(machine.log.lines), dict(machine.slab.live)
    address = machine.slab.kzalloc(machine.layouts.sizeof("kobject"), "test")
    twin = machine.view("kobject", address)
    kobject_init(machine, twin, KobjType(release=machine.slab.kfree))
    with pytest.raises(KernelErrno, match="'twin' is there twice") as raised:
        kobject_add(machine, twin, parent, "twin")
    assert raised.value.number == errno.EEXIST
    assert machine.log.lines[logged:] == [
        "sysfs: cannot create duplicate filename '/parent/twin'",
        "kobject_add_internal failed for twin with -EEXIST, "
        "don't try to register things with the same name in the same directory.",
    ]
    assert (twin.parent, twin.state, count(parent)) == (0, 0b01, 2)
    kobject_put(machine, twin)
    assert machine.slab.live == allocated
    assert machine.kernfs.exists("/sys/parent/twin")  # the first one's


def test_a_slash_in_a_name_is_an_exclamation_mark(machine: Machine) -> None:
    new(machine, "a/b", None)
    assert machine.kernfs.exists("/sys/a!b")


def test_a_kobject_can_lose_its_directory_before_its_end(machine: Machine) -> None:
    parent = kobject_create_and_add(machine, "parent", None)
    child = new(machine, "child", parent)
    kobject_del(machine, child)
    assert (machine.kernfs.listdir("/sys/parent"), count(parent), count(child)) == ([], 1, 1)
    kobject_put(machine, child)
    assert count(parent) == 1


@pytest.mark.parametrize("text", ["1", "1\n", "y", "Yes", "true", "T", "on", "ON\n", "1234"])
def test_what_kstrtobool_takes_for_true(text: str) -> None:
    assert kstrtobool(text) is True


@pytest.mark.parametrize("text", ["0", "0\n", "n", "No", "false", "F", "off", "Of", "01"])
def test_what_kstrtobool_takes_for_false(text: str) -> None:
    assert kstrtobool(text) is False


@given(st.text(max_size=3).filter(lambda text: text[:1] not in tuple("10yYnNtTfFoO")))
def test_kstrtobool_refuses_everything_else(text: str) -> None:
    for refused in (text, "o", "ox", " 1"):
        with pytest.raises(KernelErrno, match="EINVAL"):
            kstrtobool(refused)
