"""`klpemu boot`: a mounted kernel, and commands that find it where a machine has its own."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import klpemu, process

from klpemu.booted import booted
from klpemu.mount import Mount, why_no_fuse
from klpemu.mount_namespace import why_no_namespace

pytestmark = pytest.mark.skipif(bool(why_no_fuse()), reason=why_no_fuse() or "-")
needs_namespace = pytest.mark.skipif(bool(why_no_namespace()), reason=why_no_namespace() or "-")

PATIENCE = 120


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with booted(tmp_path_factory.mktemp("mount")) as mount:
        yield mount.mountpoint


def sh(script: str, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        ["sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, "LC_ALL": "C", **environment},
    )
    return done.returncode, done.stdout, done.stderr


def boot(script: str) -> tuple[int, str, str]:
    with process(["boot", "--", "sh", "-c", script]) as running:
        out, err = running.communicate(timeout=PATIENCE)
        return running.returncode, out, err


def test_the_files_have_the_kernels_rights_and_types(mounted: Path) -> None:
    assert sorted(os.listdir(mounted)) == ["dev", "klpemu", "proc", "sys"]
    modes = {
        path: sh(f"stat --format %A {mounted}/{path}")[1].strip()
        for path in ("sys/kernel/livepatch", "proc/sys/kernel/ftrace_enabled", "klpemu/bin/modprobe")
    }
    assert modes == {
        "sys/kernel/livepatch": "drwxr-xr-x",
        "proc/sys/kernel/ftrace_enabled": "-rw-r--r--",
        "klpemu/bin/modprobe": "-r-xr-xr-x",
    }


def test_the_shells_tools_read_and_write_them(mounted: Path) -> None:
    enabled = f"{mounted}/proc/sys/kernel/ftrace_enabled"
    assert sh(
        f"cat {enabled}; echo 0 > {enabled}; cat {enabled}; echo 1 >> {enabled}; grep -c 1 {enabled}"
    ) == (
        0,
        "1\n0\n1\n",
        "",
    )


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("cat sys/nosuch", "No such file or directory"),
        ("cat sys/kernel", "Is a directory"),
        ("echo x > sys/kernel/nosuch", "Permission denied|cannot create"),
        ("echo many > proc/sys/kernel/ftrace_enabled", "Invalid argument|I/O error"),
        ("mkdir sys/x", "Operation not permitted"),
        ("rm proc/cmdline", "Operation not permitted"),
        ("mv proc/cmdline proc/x", "Operation not permitted"),
        ("echo x > klpemu/bin/modprobe", "Permission denied|cannot create"),
    ],
)
def test_what_cannot_be_done_fails_as_on_a_real_one(mounted: Path, script: str, said: str) -> None:
    status, out, err = sh(f"cd {mounted}; {script}")
    assert status != 0
    assert out == ""
    assert any(each in err for each in said.split("|")), err


def test_a_command_is_a_process_of_its_own(mounted: Path) -> None:
    bin_ = f"{mounted}/klpemu/bin"
    status, out, err = sh(f"{bin_}/modprobe lamp && {bin_}/lsmod; {bin_}/rmmod lamp; {bin_}/rmmod lamp")
    assert (status, err) == (1, "rmmod: ERROR: Module lamp is not currently loaded\n")
    assert [line.split()[0] for line in out.splitlines()] == ["Module", "lamp"]


def test_output_that_is_longer_than_a_read_arrives_whole(mounted: Path) -> None:
    sh(f"for i in $(seq 100); do printf '%0900d\\n' $i > {mounted}/dev/kmsg; done")
    lines = sh(f"{mounted}/klpemu/bin/dmesg -t | tail -n 100")[1].splitlines()
    assert lines == [f"{number:0900}" for number in range(1, 101)]


def test_a_second_kernel_on_the_same_directory_is_refused(mounted: Path) -> None:
    outcome = klpemu("boot", "--mount", str(mounted), "--", "true")
    assert outcome.status == 2
    assert "a kernel is mounted there already" in outcome.err


def test_only_an_empty_directory_will_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is not empty" in klpemu("boot", "--mount", str(tmp_path), "--", "true").err
    assert "no such directory" in klpemu("boot", "--mount", str(tmp_path / "nosuch"), "--", "true").err
    outcome = klpemu("boot", "--mount", str(tmp_path / "file"), "--", "true")
    assert (outcome.status, outcome.err) == (2, f"klpemu: {tmp_path / 'file'}: Not a directory\n")


def test_neither_a_directory_nor_a_command_is_bad_usage() -> None:
    assert klpemu("boot").status == 2


@contextmanager
def serving(directory: Path) -> Iterator["subprocess.Popen[str]"]:
    with process(["boot", "--mount", str(directory)]) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == f"mounted on {directory}; Ctrl-C ends it\n"
            yield running
        finally:
            running.kill()
            running.wait(PATIENCE)
            sh(f"umount -l {directory} || fusermount3 -uz {directory}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_unmounts_and_ends_it(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path) as running:
        assert os.path.ismount(tmp_path)
        running.send_signal(number)
        assert running.wait(PATIENCE) == 0
    assert os.listdir(tmp_path) == []


def test_it_ends_when_somebody_unmounts_it(tmp_path: Path) -> None:
    with serving(tmp_path) as running:
        assert sh(f"umount {tmp_path} || fusermount3 -u {tmp_path}")[0] == 0
        assert running.wait(PATIENCE) == 0


def test_what_was_killed_leaves_no_mount_that_is_in_the_way(tmp_path: Path) -> None:
    with serving(tmp_path) as running:
        running.kill()
        running.wait(PATIENCE)
        with pytest.raises(OSError, match="not connected"):
            os.listdir(tmp_path)
        with serving(tmp_path):
            assert "sys" in os.listdir(tmp_path)


def test_what_fails_while_it_boots_is_raised(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("no kernel")

    with pytest.raises(ValueError, match="no kernel"), Mount(fail, tmp_path):  # type: ignore[arg-type]
        pass
    assert not os.path.ismount(tmp_path)


@needs_namespace
def test_a_command_finds_the_kernel_where_a_machine_has_its_own() -> None:
    script = """
        uname -r; cat /proc/sys/kernel/ftrace_enabled; ls /sys/kernel; echo hello > /dev/kmsg; dmesg -t
        command -v modprobe; modprobe klp_area && cat /sys/kernel/livepatch/klp_area/enabled
    """
    status, out, err = boot(script)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[:3] == ["6.1.0-klpemu", "1", "debug"]
    assert "hello" in lines
    assert lines[-2].endswith("/klpemu/bin/modprobe")
    assert lines[-1] == "1"


@needs_namespace
def test_its_status_is_the_commands_and_nothing_stays() -> None:
    before = Path("/proc/mounts").read_text()
    assert boot("exit 7")[0] == 7
    assert boot("kill -KILL $$")[0] == 128 + signal.SIGKILL
    assert klpemu("boot", "--", "no_such_command").status == 2
    assert Path("/proc/mounts").read_text() == before


@needs_namespace
def test_debug_lines_are_off_until_they_are_asked_for() -> None:
    control = "/sys/kernel/debug/dynamic_debug/control"
    _, out, _ = boot(f"""
        modprobe klp_area; dmesg -t; echo ==; echo 'file kernel/livepatch/* +p' > {control}
        echo 0 > /sys/kernel/livepatch/klp_area/enabled; dmesg -t
    """)
    before, _, after = out.partition("==\n")
    assert "initializing" not in before
    assert "livepatch: 'klp_area': initializing unpatching transition\n" in after


@needs_namespace
def test_sigterm_is_the_commands_too() -> None:
    with process(["boot", "--", "sh", "-c", "echo up; exec sleep 1000"]) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "up\n"
        running.send_signal(signal.SIGTERM)
        assert running.wait(PATIENCE) == 128 + signal.SIGTERM
