"""/sys/kernel/livepatch: a directory for each kobject of the patches, under its name, in its parent's."""

from collections.abc import Iterator

from emu.memory import read_string, read_u64
from patches.invariants.finding import Finding, value_finding
from patches.invariants.subject import Subject
from patches.invariants.walk import entries

__all__ = ["sysfs_shows_the_patches"]

INVARIANT = "sysfs_shows_the_patches"
ROOT = "/sys/kernel/livepatch"
STATE_IN_SYSFS = 1 << 1


def sysfs_shows_the_patches(subject: Subject) -> Iterator[Finding | None]:
    """/sys/kernel/livepatch has a directory for each patch on klp_patches, for its objects and their funcs,
    called as their kobjects are; what else is there belongs to a kobject that somebody still refers to.

    Source: klp_init_patch() and its kobject_add()s; Documentation/ABI/testing/sysfs-kernel-livepatch.
    """
    if subject.directories is None:
        return
    found = dict(subject.directories)
    for patch in entries(subject, subject.symbols["klp_patches"], "klp_patch", "list"):
        yield from _patch(subject, patch, found)
    for path, kobj in found.items():
        counter = kobj + subject.layouts.offsetof("kobject", "kref") if kobj else 0
        word = read_u64(subject.memory, counter) if counter else 0
        if not word & 0xFFFF_FFFF or not word >> 32 & STATE_IN_SYSFS:
            yield Finding(INVARIANT, f"{path} is there, and nothing that it shows", kobj, subject.place(kobj))
    yield None


def _patch(subject: Subject, patch: int, found: dict[str, int]) -> Iterator[Finding | None]:
    """The directories of one patch; they are taken out of `found`."""
    offset = subject.layouts.offsetof
    kobj = patch + offset("klp_patch", "kobj")
    # Its own name: whether that is the module's is what patches_are_listed asks of the module.
    name = read_string(subject.memory, subject.view("kobject", kobj).name)
    yield from _directory(subject, f"{ROOT}/{name}", kobj, 0, found)
    for at in entries(subject, patch + offset("klp_patch", "obj_list"), "klp_object", "node"):
        obj = subject.view("klp_object", at)
        path = f"{ROOT}/{name}/{read_string(subject.memory, obj.name) if obj.name else 'vmlinux'}"
        yield from _directory(subject, path, obj.kobj.address_, kobj, found)
        for func_at in entries(subject, obj.func_list.address_, "klp_func", "node"):
            func = subject.view("klp_func", func_at)
            shown = f"{read_string(subject.memory, func.old_name)},{func.old_sympos or 1}"
            yield from _directory(subject, f"{path}/{shown}", func.kobj.address_, obj.kobj.address_, found)


def _directory(
    subject: Subject, path: str, kobj: int, parent: int, found: dict[str, int]
) -> Iterator[Finding | None]:
    """One directory: it is there, of this kobject, which has its name and `parent` (0: is not looked at)."""
    there = found.pop(path, None)
    view = subject.view("kobject", kobj)
    if there is None:
        yield Finding(INVARIANT, f"{path} is not there", kobj, subject.place(kobj))
    elif there != kobj:
        yield value_finding(
            INVARIANT, f"{path} shows another kobject", kobj, subject.place(kobj), kobj, there
        )
    elif parent and view.parent != parent:
        at = view.member_("parent")
        what = f"the kobject of {path} has another parent"
        yield value_finding(INVARIANT, what, at, subject.place(at), parent, view.parent)
    elif (name := read_string(subject.memory, view.name)) != path.rpartition("/")[2]:
        yield Finding(
            INVARIANT, f"the kobject of {path} is called '{name}'", view.name, subject.place(view.name)
        )
