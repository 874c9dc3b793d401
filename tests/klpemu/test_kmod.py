"""modprobe, rmmod and the others: what they do, say and return; modinfo is compared with kmod's own."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from klpemu import Kernel
from klpemu.command import Session, UsageError
from klpemu.control import COMMANDS
from klpemu.fixtures import fixture
from klpemu.module_tree import ModuleFile, ModuleTree
from klpemu.system_commands import release_of
from klpemu.user_space import UserSpace


class Shell:
    """Runs the commands on a kernel, without processes."""

    def __init__(self, *directories: Path) -> None:
        self.kernel = Kernel.load()
        self.user_space = UserSpace(self.kernel, complain=lambda _: None)
        self.modules = ModuleTree(directories, release_of(self.kernel))

    def __call__(self, line: str, directory: str = "/") -> tuple[int, str, str]:
        name, *arguments = line.split()
        session = Session(name, self.user_space, self.modules, directory)
        status = COMMANDS[name](session, arguments)
        return status, "".join(session.out), "".join(session.err)


@pytest.fixture
def shell() -> Shell:
    return Shell()


def test_modprobe_loads_what_a_module_is_and_a_livepatch_needs(shell: Shell) -> None:
    assert shell("modprobe lamp") == (0, "", "")
    assert shell("modprobe klp-lamp") == (0, "", "")
    shell.kernel.tasks.wait_for_transition()
    assert shell.kernel.read("/sys/kernel/livepatch/klp_lamp/enabled") == "1\n"
    out = shell("lsmod")[1].splitlines()
    assert out[0] == "Module                  Size  Used by"
    assert [re.split(r"\s+", line)[::2] for line in out[1:]] == [["klp_lamp", "1"], ["lamp", "0"]]


def test_modprobe_of_what_is_loaded_does_nothing(shell: Shell) -> None:
    shell("modprobe lamp")
    assert shell("modprobe lamp") == (0, "", "")
    assert shell("modprobe --first-time lamp") == (
        1,
        "",
        "modprobe: ERROR: could not insert 'lamp': Module already in kernel\n",
    )


def test_modprobe_dry_run_only_says_whether_there_is_such_a_module(shell: Shell) -> None:
    assert shell("modprobe --dry-run lamp") == (0, "", "")
    assert shell("modprobe -nv lamp")[1] == f"insmod {fixture('lamp.ko')} \n"
    assert "lamp" not in shell.kernel.machine.modules.objects


def test_modprobe_says_that_it_finds_nothing(shell: Shell) -> None:
    said = "modprobe: FATAL: Module nosuch not found in directory /lib/modules/6.1.0-klpemu\n"
    assert shell("modprobe nosuch") == (1, "", said)
    assert shell("modprobe -q nosuch") == (1, "", "")
    assert shell("modprobe") == (1, "", "modprobe: ERROR: missing parameters. See -h.\n")


def test_what_the_kernel_returns_is_what_modprobe_says(shell: Shell) -> None:
    shell.kernel.write("/proc/sys/kernel/ftrace_enabled", "0")
    assert shell("modprobe klp_area") == (
        1,
        "",
        "modprobe: ERROR: could not insert 'klp_area': Device or resource busy\n",
    )
    assert shell("lsmod")[1].count("\n") == 1


def test_rmmod_says_why_it_does_not(shell: Shell) -> None:
    assert shell("rmmod") == (1, "", "rmmod: ERROR: missing module name.\n")
    assert shell("rmmod nosuch") == (1, "", "rmmod: ERROR: Module nosuch is not currently loaded\n")
    shell("modprobe klp_area")
    assert shell("rmmod klp_area") == (1, "", "rmmod: ERROR: Module klp_area is in use\n")
    shell.kernel.disable("klp_area")
    shell.kernel.tasks.wait_for_transition()
    assert shell("rmmod klp-area") == (0, "", "")
    assert shell("modprobe -r klp_area") == (0, "", "")
    assert shell("modprobe -r nosuch") == (1, "", "modprobe: FATAL: Module nosuch not found.\n")


def test_insmod_takes_a_file_as_seen_from_its_directory(shell: Shell, tmp_path: Path) -> None:
    shutil.copy(fixture("lamp.ko"), tmp_path / "lamp.ko")
    (tmp_path / "text.ko").write_text("text")
    assert shell("insmod") == (1, "", "insmod: ERROR: missing filename.\n")
    missing = "insmod: ERROR: could not load module lamp.ko: No such file or directory\n"
    assert shell("insmod lamp.ko") == (1, "", missing)
    assert shell("insmod ./lamp.ko", str(tmp_path)) == (0, "", "")
    assert shell("insmod lamp.ko", str(tmp_path))[2] == (
        "insmod: ERROR: could not insert module lamp.ko: File exists\n"
    )
    assert shell("insmod text.ko", str(tmp_path))[2] == (
        "insmod: ERROR: could not insert module text.ko: Invalid module format\n"
    )


def test_a_file_in_a_modules_directory_goes_before_a_builtin_one(tmp_path: Path) -> None:
    copied = tmp_path / "kernel" / "klp-lamp.ko"
    copied.parent.mkdir()
    shutil.copy(fixture("klp_lamp.ko"), copied)
    assert Shell(tmp_path)("modinfo -n klp_lamp") == (0, f"{copied}\n", "")


def test_modinfo_shows_livepatch_where_scripts_look_for_it(shell: Shell) -> None:
    out = shell("modinfo klp_lamp")[1]
    assert "\nlivepatch:      Y\n" in out
    assert shell("modinfo -F livepatch klp_lamp") == (0, "Y\n", "")
    assert shell("modinfo nosuch") == (1, "", "modinfo: ERROR: Module nosuch not found.\n")


@pytest.mark.skipif(shutil.which("modinfo") is None, reason="no modinfo (package kmod)")
@pytest.mark.parametrize("options", ["", "-0", "-F depends", "-p", "-n", "-l"])
def test_modinfo_prints_what_kmods_does(shell: Shell, options: str) -> None:
    for name in ("lamp.ko", "klp_lamp.ko", "klp_area.ko"):
        path = fixture(name)
        real = subprocess.run(["modinfo", *options.split(), path], capture_output=True, text=True, check=True)
        assert shell(f"modinfo {options} {path}")[1] == real.stdout


def test_parameters_come_with_their_types(tmp_path: Path) -> None:
    fields = ModuleFile(fixture("klp_lamp.ko")).fields()
    assert dict(fields)["license"] == "GPL"
    assert all(":" in value for key, value in fields if key == "parm")


def test_dmesg_prints_the_virtual_time_of_each_line(shell: Shell) -> None:
    log = shell.kernel.machine.log
    log.clock = lambda: 2_504_000_000
    log.pr_info("hello")
    assert shell("dmesg")[1].endswith("[    2.504000] hello\n")
    assert shell("dmesg -t")[1].endswith("\nhello\n") or shell("dmesg -t")[1] == "hello\n"
    with pytest.raises(UsageError, match="unrecognized option '--nosuch'"):
        shell("dmesg --nosuch")


def test_sysctl_shows_and_sets(shell: Shell) -> None:
    assert shell("sysctl kernel.ftrace_enabled") == (0, "kernel.ftrace_enabled = 1\n", "")
    assert shell("sysctl kernel/ftrace_enabled") == (0, "kernel.ftrace_enabled = 1\n", "")
    assert shell("sysctl --values kernel.ftrace_enabled") == (0, "1\n", "")
    assert shell("sysctl -w kernel.ftrace_enabled=0") == (0, "kernel.ftrace_enabled = 0\n", "")
    assert shell("sysctl -q kernel.ftrace_enabled=1") == (0, "", "")
    assert shell("sysctl -a") == (0, "kernel.ftrace_enabled = 1\n", "")


def test_sysctl_says_what_the_kernel_refuses(shell: Shell) -> None:
    shell("modprobe klp_area")
    assert shell("sysctl -q kernel.ftrace_enabled=0") == (
        1,
        "",
        'sysctl: setting key "kernel.ftrace_enabled": Device or resource busy\n',
    )
    missing = "sysctl: cannot stat /proc/sys/kernel/nosuch: No such file or directory\n"
    assert shell("sysctl kernel.nosuch") == (1, "", missing)
    assert shell("sysctl -e kernel.nosuch") == (0, "", "")


def test_uname_names_the_emulated_kernel(shell: Shell) -> None:
    assert shell("uname") == (0, "Linux\n", "")
    assert shell("uname -r") == (0, "6.1.0-klpemu\n", "")
    assert shell("uname -sr") == (0, "Linux 6.1.0-klpemu\n", "")
