"""What programs can do with a booted kernel's files."""

import errno
import os
from pathlib import Path

import pytest

from klpemu import Kernel
from klpemu.kmsg import Kmsg
from klpemu.user_space import UserSpace

ENABLED = "/proc/sys/kernel/ftrace_enabled"


@pytest.fixture
def complaints() -> list[str]:
    return []


@pytest.fixture
def user_space(complaints: list[str]) -> UserSpace:
    return UserSpace(Kernel.load(), complain=complaints.append)


def cat(user_space: UserSpace, path: str) -> bytes:
    file = user_space.open(path, os.O_RDONLY)
    found = b""
    while part := user_space.read(file, 7, len(found)):
        found += part
    user_space.close(file)
    return found


def echo(user_space: UserSpace, text: str, path: str) -> None:
    file = user_space.open(path, os.O_WRONLY)
    user_space.write(file, text.encode())
    user_space.close(file)


def test_a_file_is_read_piece_by_piece(user_space: UserSpace) -> None:
    assert cat(user_space, ENABLED) == b"1\n"
    control = "/sys/kernel/debug/dynamic_debug/control"
    assert cat(user_space, control).decode() == user_space.kernel.read(control)


def test_a_read_from_the_start_shows_what_is_now(user_space: UserSpace) -> None:
    file = user_space.open(ENABLED, os.O_RDONLY)
    assert user_space.read(file, 9, 0) == b"1\n"
    echo(user_space, "0\n", ENABLED)
    assert user_space.read(file, 9, 1) == b"\n"
    assert user_space.read(file, 9, 0) == b"0\n"


def test_the_root_has_the_kernels_directories_and_dev(user_space: UserSpace) -> None:
    assert user_space.listdir("/") == [("dev", True), ("proc", True), ("sys", True)]
    assert user_space.listdir("/dev") == [("kmsg", False)]
    assert ("livepatch", True) in user_space.listdir("/sys/kernel")


@pytest.mark.parametrize(
    ("path", "flags", "number"),
    [
        ("/sys/kernel/nosuch", os.O_RDONLY, errno.ENOENT),
        ("/sys/kernel", os.O_RDONLY, errno.EISDIR),
        ("/dev", os.O_RDONLY, errno.EISDIR),
        ("/proc/sys/kernel/ftrace_enabled/x", os.O_RDONLY, errno.ENOTDIR),
    ],
)
def test_what_the_kernel_refuses_a_program_gets_as_errno(
    user_space: UserSpace, complaints: list[str], path: str, flags: int, number: int
) -> None:
    with pytest.raises(OSError, match=os.strerror(number)) as refused:
        user_space.open(path, flags)
    assert refused.value.errno == number
    assert complaints == []


def test_a_store_that_fails_is_the_errno_of_the_write(user_space: UserSpace) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        echo(user_space, "many", ENABLED)


def test_an_error_without_errno_is_eio_and_is_said_in_the_log_and_outside(
    user_space: UserSpace, complaints: list[str]
) -> None:
    kernel = user_space.kernel

    def show() -> str:
        kernel.machine.kallsyms.address_of("no_such_symbol")
        return ""

    kernel.machine.kernfs.create_file("/sys/kernel/broken", 0o444, show=show)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        cat(user_space, "/sys/kernel/broken")
    assert len(complaints) == 1
    assert "no_such_symbol" in complaints[0]
    assert kernel.log[-1] == complaints[0]


def test_a_request_lets_a_hundred_milliseconds_pass_while_there_is_something_to_do(
    user_space: UserSpace,
) -> None:
    kernel = user_space.kernel
    kernel.tasks.spawn("sleeper", ["sleep(50)"], repeat=None)
    before = kernel.machine.timers.seconds
    cat(user_space, ENABLED)
    assert kernel.machine.timers.seconds - before == pytest.approx(0.1, abs=0.005)


def test_the_walk_to_a_file_is_one_request_with_opening_it(user_space: UserSpace) -> None:
    kernel = user_space.kernel
    kernel.tasks.spawn("sleeper", ["sleep(50)"], repeat=None)
    before = kernel.machine.timers.seconds
    for path in ("/proc", "/proc/sys", "/proc/sys/kernel", ENABLED, ENABLED):
        user_space.stat(path)
    cat(user_space, ENABLED)
    assert kernel.machine.timers.seconds - before == pytest.approx(0.1, abs=0.005)
    user_space.stat("/proc")
    assert kernel.machine.timers.seconds - before == pytest.approx(0.2, abs=0.005)


def test_time_stands_still_when_there_is_nothing_to_do(user_space: UserSpace) -> None:
    cat(user_space, ENABLED)
    before = user_space.kernel.machine.timers.now
    for _ in range(100):
        user_space.stat("/sys/kernel")
        user_space.stat("/proc/sys")
    assert user_space.kernel.machine.timers.now == before


def test_what_a_program_writes_to_kmsg_is_in_the_log_with_its_priority(user_space: UserSpace) -> None:
    echo(user_space, "plain\n", "/dev/kmsg")
    echo(user_space, "<3>an error\n", "/dev/kmsg")
    echo(user_space, "<30>of a daemon", "/dev/kmsg")
    echo(user_space, "a tab\tand \\ and é\n", "/dev/kmsg")
    assert user_space.kernel.log[-4:] == ["plain", "an error", "of a daemon", "a tab\tand \\ and é"]
    records = cat_records(user_space)
    assert [each.partition(",")[0] for each in records[-4:]] == ["12", "11", "30", "12"]
    assert records[-1].endswith(",-;a tab\\x09and \\x5c and \\xc3\\xa9\n")


def cat_records(user_space: UserSpace) -> list[str]:
    file = user_space.open("/dev/kmsg", os.O_RDONLY)
    records = []
    while record := user_space.read(file, 8192, 0):
        records.append(record.decode())
    return records


def test_kmsg_gives_a_record_a_read_with_its_number_and_time(user_space: UserSpace) -> None:
    log = user_space.kernel.machine.log
    log.clock = lambda: 2_504_000_999
    log.pr_info("hello")
    count = len(log.lines)
    assert cat_records(user_space)[-1] == f"6,{count - 1},2504000,-;hello\n"


def test_kmsg_says_eagain_at_its_end_to_those_who_will_not_wait(user_space: UserSpace) -> None:
    log = user_space.kernel.machine.log
    file = user_space.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    for _ in log.lines:
        user_space.read(file, 8192, 0)
    with pytest.raises(BlockingIOError):
        user_space.read(file, 8192, 0)


def test_a_record_that_does_not_fit_and_a_line_that_is_too_long_are_einval(user_space: UserSpace) -> None:
    log = user_space.kernel.machine.log
    kmsg = Kmsg(log)
    assert kmsg.write(b"x" * 992) == 992
    for attempt in (lambda: kmsg.write(b"x" * 993), lambda: Kmsg(log).read(5, 0)):
        with pytest.raises(Exception, match="EINVAL"):
            attempt()


def test_files_of_ours_lie_beside_the_kernels(tmp_path: Path) -> None:
    from klpemu.control import control_files

    files = control_files(str(tmp_path), lambda: user_space, lambda: None)  # type: ignore[arg-type,return-value]
    user_space = UserSpace(Kernel.load(), files)
    assert user_space.listdir("/klpemu") == [("bin", True), ("control", False)]
    script = cat(user_space, "/klpemu/bin/modprobe")
    assert script.startswith(b"#!/bin/sh\n")
    assert str(tmp_path).encode() in script
    with pytest.raises(PermissionError):
        user_space.open("/klpemu/bin/modprobe", os.O_WRONLY)


def test_to_open_the_same_file_again_is_a_request_of_its_own(user_space: UserSpace) -> None:
    kernel = user_space.kernel
    kernel.tasks.spawn("sleeper", ["sleep(50)"], repeat=None)
    cat(user_space, ENABLED)
    before = kernel.machine.timers.seconds
    for _ in range(3):
        cat(user_space, ENABLED)
        user_space.stat(ENABLED)
    assert kernel.machine.timers.seconds - before == pytest.approx(0.3, abs=0.005)
