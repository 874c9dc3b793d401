"""One tree of files: what root may do, which errno everything else has, and who waits for whom at the end."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from machines import boot

from emu.errno import KernelErrno
from emu.kernfs import DEBUGFS, PROCFS, SYSCTL, SYSFS, Kernfs
from emu.machine import Machine
from emu.task import Task


@pytest.fixture
def tree() -> Kernfs:
    found = Kernfs(lambda holds, what: None)
    found.mount("/sys", SYSFS)
    found.mount("/sys/debug", DEBUGFS)
    found.mount("/proc", PROCFS)
    found.mount("/proc/sys", SYSCTL)
    return found


@contextmanager
def fails(number: int) -> Iterator[None]:
    with pytest.raises(KernelErrno) as raised:
        yield
    assert raised.value.number == number


def test_a_file_shows_what_its_function_says_at_that_moment(tree: Kernfs) -> None:
    number = [1]
    tree.create_file("/sys/number", 0o444, show=lambda: f"{number[0]}\n")
    assert tree.read("/sys/number") == "1\n"
    number[0] = 2
    assert tree.read("/sys/number") == "2\n"


def test_an_open_file_is_at_its_end_after_one_read_and_shows_anew_from_the_start(tree: Kernfs) -> None:
    number = [1]
    tree.create_file("/sys/number", 0o444, show=lambda: b"%d\n" % number[0])
    file = tree.open("/sys/number")
    number[0] = 5
    assert [file.read(), file.read()] == ["5\n", ""]
    number[0] = 6
    file.rewind()
    assert file.read() == "6\n"


def test_what_is_written_is_handed_over_as_it_is_and_nothing_is_not_handed_over(tree: Kernfs) -> None:
    written: list[str] = []
    tree.create_file("/sys/switch", 0o200, store=written.append)
    for text in ("1\n", "", " off"):
        tree.write("/sys/switch", text)
    assert written == ["1\n", " off"]


@pytest.mark.parametrize(
    ("mode", "how", "number"),
    [
        (0o444, "w", errno.EACCES),
        (0o200, "r", errno.EACCES),
        (0o644, "r", errno.EIO),
        (0o644, "w", errno.EIO),
    ],
)
def test_in_sysfs_the_mode_counts_for_root_and_a_missing_function_is_an_io_error(
    tree: Kernfs, mode: int, how: str, number: int
) -> None:
    """KERNFS_ROOT_EXTRA_OPEN_PERM_CHECK; kobj_attr_show() and kobj_attr_store()."""
    tree.create_file("/sys/file", mode)
    with fails(number):
        tree.read("/sys/file") if how == "r" else tree.write("/sys/file", "1")


@pytest.mark.parametrize(
    ("directory", "number"),
    [("/proc", errno.EIO), ("/sys/debug", errno.EINVAL), ("/proc/sys", errno.EACCES)],
)
def test_elsewhere_root_may_open_what_it_cannot_write(tree: Kernfs, directory: str, number: int) -> None:
    tree.create_file(f"{directory}/file", 0o444, show=lambda: "x")
    with fails(number):
        tree.write(f"{directory}/file", "1")


def test_paths_that_lead_nowhere(tree: Kernfs) -> None:
    tree.create_file("/sys/file", 0o444, show=lambda: "x")
    for path, number in (
        ("/sys/fil", errno.ENOENT),
        ("sys/file", errno.ENOENT),
        ("/sys/file/x", errno.ENOTDIR),
        ("/sys", errno.EISDIR),
    ):
        with fails(number):
            tree.read(path)
    with fails(errno.ENOTDIR):
        tree.listdir("/sys/file")
    for create in (tree.create_dir, lambda path: tree.create_file(path, 0o444)):
        with fails(errno.EEXIST):
            create("/sys/file")
        with fails(errno.ENOENT):
            create("/sys/no/file")
        with fails(errno.ENOTDIR):
            create("/sys/file/file")
    with fails(errno.ENOENT):
        tree.remove("/sys/no")


def test_a_file_is_only_used_as_it_was_opened(tree: Kernfs) -> None:
    tree.create_file("/sys/file", 0o644, show=lambda: "x", store=lambda text: None)
    reading, closed = tree.open("/sys/file"), tree.open("/sys/file", "rw")
    closed.close()
    for use in (lambda: reading.write("1"), closed.read, lambda: closed.write("1")):
        with fails(errno.EBADF):
            use()


def test_stat_and_listing(tree: Kernfs) -> None:
    tree.create_dir("/sys/b")
    tree.create_file("/sys/a", 0o640, show=lambda: "x")
    assert tree.listdir("/sys/") == ["a", "b", "debug"]
    a, b = tree.stat("/sys/a"), tree.stat("/sys/b")
    assert (a.mode, a.is_dir, a.size, b.mode, b.is_dir) == (0o640, False, 4096, 0o755, True)


def test_what_is_removed_is_gone_with_all_below_it_and_for_who_has_it_open(tree: Kernfs) -> None:
    """kernfs_get_active() fails with ENODEV; the name can be given again at once."""
    tree.create_dir("/sys/dir")
    tree.create_file("/sys/dir/file", 0o644, show=lambda: "old", store=lambda text: None)
    file = tree.open("/sys/dir/file", "rw")
    tree.remove("/sys/dir")
    for path in ("/sys/dir", "/sys/dir/file"):
        with fails(errno.ENOENT):
            tree.stat(path)
    tree.create_dir("/sys/dir")
    tree.create_file("/sys/dir/file", 0o644, show=lambda: "new")
    for use in (file.read, lambda: file.write("1")):
        with fails(errno.ENODEV):
            use()
    assert tree.read("/sys/dir/file") == "new"


def test_removal_waits_for_who_is_in_the_middle_of_a_read() -> None:
    """And a read that fails gives its active reference back."""
    machine = boot(cpus=2)
    order: list[str] = []
    may_go_on = [False]

    def show() -> str:
        order.append("read begins")
        machine.hub.wait(lambda: may_go_on[0], "the test")
        order.append("read ends")
        raise KernelErrno(errno.EIO, "no")

    machine.kernfs.create_file("/sys/slow", 0o444, show=show)
    reading = machine.hub.serve(_other(machine), "read", lambda: machine.kernfs.read("/sys/slow"))

    def remove() -> None:
        machine.hub.wait(lambda: bool(order), "the read")
        order.append("removal begins")
        machine.timers.add_timer(5, lambda: may_go_on.__setitem__(0, True), "go on")
        machine.kernfs.remove("/sys/slow")
        order.append("removal ends")

    with fails(errno.EIO):
        machine.service("remove", remove)
        machine.run(lambda: reading.finished)
        raise reading.error or AssertionError("the read has not failed")
    assert order == ["read begins", "removal begins", "read ends", "removal ends"]


def _other(machine: Machine) -> Task:
    return next(task for task in machine.tasks if task.name == "task2")
