"""Kobjects: objects with a count of references, a name, and a directory in sysfs (lib/kobject.c).

A `kobj` is a view of a `struct kobject` in guest memory: count, name, parent and state are there.  What has
no place there is which files its directory has (`KobjType`), and the directory itself (emu/kernfs.py), which
hangs at `kobj->sd` in the kernel.

When the last reference goes, the directory goes first, which waits for those who are reading or writing a
file of it, then `release` is called, and then the parent loses the reference that its child had.
"""

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from emu.errno import KernelErrno
from emu.list import init_list_head
from emu.memory import read_string

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = [
    "Attribute",
    "KobjType",
    "Kobjects",
    "add_attribute",
    "kobject_add",
    "kobject_create_and_add",
    "kobject_del",
    "kobject_get",
    "kobject_init",
    "kobject_put",
    "kstrtobool",
]

SYSFS_ROOT = "/sys"
STATE_INITIALIZED = 1 << 0
STATE_IN_SYSFS = 1 << 1


@dataclass(frozen=True, slots=True)
class Attribute:
    """A file of a kobject's directory: its functions get the address of the kobject."""

    name: str
    mode: int
    show: Callable[[int], str] | None = None
    store: Callable[[int, str], None] | None = None


@dataclass(frozen=True, slots=True)
class KobjType:
    """struct kobj_type: what is called with the address of a kobject that nobody refers to any more, and the
    files that its directory has from the start.
    """

    release: Callable[[int], None] = lambda kobj: None
    default_attrs: Callable[[], Sequence[Attribute]] = tuple


@dataclass(eq=False, slots=True)
class Kobjects:
    """What belongs to the kobjects of one machine and is not in guest memory, by address of the kobject.

    `sd` are the directories, as paths.
    """

    ktypes: dict[int, KobjType] = field(default_factory=dict)
    sd: dict[int, str] = field(default_factory=dict)


def kobject_init(machine: "Machine", kobj: Any, ktype: KobjType) -> None:
    """One reference, no name, no directory."""
    kobj.kref.refcount.refs.counter = 1
    init_list_head(kobj.entry)
    _set_state(machine, kobj, STATE_INITIALIZED)
    machine.kobjects.ktypes[kobj.address_] = ktype


def kobject_add(machine: "Machine", kobj: Any, parent: Any, name: str) -> None:
    """Name it and make its directory in that of `parent` (None: in /sys), to which it refers from now on.

    Raises EEXIST, with the kernel's lines in the log, if the directory has something of that name.  Whether
    this fails or not, `kobject_put` gives back what is allocated here.
    """
    try:
        kobj.name = machine.slab.kstrdup(name.replace("/", "!"), "name of a kobject")
    except KernelErrno:
        machine.log.pr_err("kobject: can not set name properly!")
        raise
    kobj.parent = kobject_get(machine, parent) if parent is not None else 0
    directory = machine.kobjects.sd.get(parent.address_, "") if parent is not None else SYSFS_ROOT
    try:
        _create_dir(machine, kobj, directory)
    except KernelErrno:
        kobj.parent = 0
        if parent is not None:
            kobject_put(machine, parent)
        raise
    _set_state(machine, kobj, _state(machine, kobj) | STATE_IN_SYSFS)


def kobject_create_and_add(machine: "Machine", name: str, parent: Any) -> Any:
    """A kobject that is nothing but a directory; it is freed with the last reference."""
    size = machine.layouts.sizeof("kobject")
    kobj = machine.view("kobject", machine.slab.kzalloc(size, f"kobject {name}"))
    kobject_init(machine, kobj, KobjType(release=machine.slab.kfree))
    kobject_add(machine, kobj, parent, name)
    return kobj


def kobject_get(machine: "Machine", kobj: Any) -> Any:
    """One more reference; returns the kobject."""
    machine.shared.fetch_add(_counter(kobj), 1)
    return kobj


def kobject_put(machine: "Machine", kobj: Any) -> None:
    """One reference less, and with the last one the kobject's end (kobject_cleanup())."""
    if machine.shared.fetch_add(_counter(kobj), -1) != 1:
        return
    parent = None
    if _state(machine, kobj) & STATE_IN_SYSFS:
        parent = kobj.follow_("parent")
        _kobject_del(machine, kobj)
    name = kobj.name
    machine.kobjects.ktypes.pop(kobj.address_).release(kobj.address_)
    if name:
        machine.slab.kfree(name)
    if parent is not None:
        kobject_put(machine, parent)


def kobject_del(machine: "Machine", kobj: Any) -> None:
    """Take its directory away, and the reference to its parent; the kobject itself stays."""
    parent = kobj.follow_("parent")
    _kobject_del(machine, kobj)
    if parent is not None:
        kobject_put(machine, parent)


def kstrtobool(text: str) -> bool:
    """What a text says (lib/kstrtox.c): its first letter decides, of "on" and "off" the second; else EINVAL.

    Whatever follows is not looked at.
    """
    word = text[:2].lower()
    if word[:1] in ("y", "t", "1") or word == "on":
        return True
    if word[:1] in ("n", "f", "0") or word == "of":
        return False
    raise KernelErrno(errno.EINVAL, f"'{text.strip()}' is neither true nor false", advice="write 0 or 1")


def _create_dir(machine: "Machine", kobj: Any, directory: str) -> None:
    """create_dir(): the directory, and the files it has from the start."""
    name, address = read_string(machine.shared, kobj.name), kobj.address_
    path = f"{directory}/{name}"
    shown = directory.removeprefix(SYSFS_ROOT)
    try:
        machine.kernfs.create_dir(path)
    except KernelErrno as error:
        if error.number != errno.EEXIST:
            raise
        machine.log.pr_warn(f"sysfs: cannot create duplicate filename '{shown}/{name}'")
        machine.log.pr_err(
            f"kobject_add_internal failed for {name} with -EEXIST, "
            "don't try to register things with the same name in the same directory."
        )
        raise KernelErrno(
            errno.EEXIST,
            f"'{name}' is there twice",
            where=shown,
            advice="name each thing once; of a function the sympos 0 and 1 are the same",
        ) from error
    machine.kobjects.sd[address] = path
    for attribute in machine.kobjects.ktypes[address].default_attrs():
        add_attribute(machine, address, path, attribute)


def add_attribute(machine: "Machine", kobj: int, directory: str, attribute: Attribute) -> None:
    """A file about the kobject at an address."""
    show, store = attribute.show, attribute.store
    machine.kernfs.create_file(
        f"{directory}/{attribute.name}",
        attribute.mode,
        show=None if show is None else lambda: show(kobj),
        store=None if store is None else lambda text: store(kobj, text),
    )


def _kobject_del(machine: "Machine", kobj: Any) -> None:
    path = machine.kobjects.sd.pop(kobj.address_, None)
    if path is not None:
        machine.kernfs.remove(path)
    _set_state(machine, kobj, _state(machine, kobj) & ~STATE_IN_SYSFS)
    kobj.parent = 0


def _state(machine: "Machine", kobj: Any) -> int:
    return int.from_bytes(machine.shared.read(_counter(kobj) + 4, 4), "little")


def _set_state(machine: "Machine", kobj: Any, bits: int) -> None:
    """The one-bit members behind the count: state_initialized is bit 0, state_in_sysfs bit 1."""
    machine.shared.write(_counter(kobj) + 4, bits.to_bytes(4, "little"))


def _counter(kobj: Any) -> int:
    return int(kobj.address_ + kobj.layouts_.offsetof("kobject", "kref"))
