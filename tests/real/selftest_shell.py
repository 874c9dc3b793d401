"""Runs the kernel's own livepatch selftests, unchanged but for where they reach the kernel.

bash executes tools/testing/selftests/livepatch/test-*.sh and its functions.sh.  What these do to the machine
they run on goes to an emulated one: commands (modprobe, rmmod, dmesg, sysctl, ...) are shell functions here,
and redirections to files of /sys and /proc and tests for their existence, which no function can stand for,
are rewritten to such functions (`rewritten`).  Each asks this process, one after the other.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from emu.errno import KernelErrno
from klpemu import Kernel
from klpemu.livepatch_modules import LivepatchModules

PRELUDE = r"""
ask() {
    local status answer
    printf '%s\0' "$#" "$@" >&8
    IFS= read -r -d '' status <&9 && IFS= read -r -d '' answer <&9
    printf '%s' "$answer"
    return "$status"
}
of_the_kernel() { case "$1" in /sys/*|/proc/*|/dev/*) return 0 ;; esac; return 1; }
modprobe() { ask modprobe "$@"; }
modinfo() { ask modinfo "$@"; }
rmmod() { ask rmmod "$@"; }
dmesg() { ask dmesg; }
sysctl() { ask sysctl "$@"; }
sleep() { ask sleep "$1"; }
id() { echo 0; }
cat() { if of_the_kernel "$1"; then ask read "$1"; else command cat "$@"; fi; }
grep() {
    of_the_kernel "${@: -1}" || { command grep "$@"; return; }
    ask read "${@: -1}" | command grep "${@:1:$#-1}"
}
stat() { ask stat "${@: -1}"; }
exists() { ask exists "$1"; }
store() { ask write "$1" "$(command cat; echo .)"; }
"""
# File descriptors 8 and 9 are not used by the scripts.
START = """exec 8>&{} 9<&{}; . "${{0%/*}}/prelude.sh"; . "$0" """
# A redirection to a file of the kernel, the test whether one is there, a command that is called by its path.
REWRITES = (
    (re.compile(r"(?<!2)> *(\"?/(?:dev|sys|proc)/(?!null)\S*)"), r"| store \1"),
    (re.compile(r"\[\[ -e (\S+) \]\]"), r"exists \1"),
    (re.compile(r"\[\[ ! -e (\S+) \]\]"), r"! exists \1"),
    (re.compile(r"/bin/stat"), "stat"),
)


def rewritten(script: str) -> str:
    """A script of the selftests that reaches the emulated kernel."""
    return "".join(map(_rewritten_line, script.splitlines(keepends=True)))


def _rewritten_line(line: str) -> str:
    if re.match(r'%|\s*log "%', line):  # what is only printed: it tells the command that comes next
        return line
    for pattern, replacement in REWRITES:
        line = pattern.sub(replacement, line)
    return line


class SelftestShell:
    """Answers what a running script asks for."""

    def __init__(self, kernel: Kernel, modules: LivepatchModules) -> None:
        self._kernel = kernel
        self._modules = modules

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run one script to its end; its standard output and error are kept."""
        with ExitStack() as stack, tempfile.TemporaryDirectory() as directory:
            for name in ("functions.sh", script):
                text = rewritten((self._modules.selftests / name).read_text())
                Path(directory, name).write_text(text)
            Path(directory, "prelude.sh").write_text(PRELUDE)
            questions, ask = os.pipe()
            answers, answer = os.pipe()
            process = subprocess.Popen(
                ["bash", "-c", START.format(ask, answers), f"{directory}/{script}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                pass_fds=(ask, answers),
                env={**os.environ, "LC_ALL": "C", "TMPDIR": directory},
            )
            os.close(ask)
            os.close(answers)
            stack.callback(process.kill)
            with open(questions, "rb") as source, open(answer, "wb", buffering=0) as sink:
                while (question := _question(source.read)) is not None:
                    status, text = self._answer(*question)
                    sink.write(f"{status}\0{text}\0".encode())
            output, error = process.communicate()
            return subprocess.CompletedProcess(process.args, process.returncode, output, error)

    def _answer(self, command: str, *arguments: str) -> tuple[int, str]:
        try:
            answer = getattr(self, f"_{command}")(*arguments)
        except KernelErrno as error:
            return 1, f"{command}: {os.strerror(error.number)}\n"
        return answer if isinstance(answer, tuple) else (0, answer or "")

    def _modprobe(self, name: str, *parameters: str) -> tuple[int, str] | None:
        if name == "--dry-run":
            return int(parameters[0] not in self._modules.test_modules), ""
        try:
            self._kernel.modprobe(self._modules.test_modules[name], " ".join(parameters))
        except KernelErrno as error:
            return 1, f"modprobe: ERROR: could not insert '{name}': {os.strerror(error.number)}\n"
        return None

    def _modinfo(self, name: str) -> str:
        return (
            "livepatch:      Y\n"
            if b"\0livepatch=Y\0" in self._modules.test_modules[name].read_bytes()
            else ""
        )

    def _rmmod(self, name: str) -> None:
        self._kernel.rmmod(name)

    def _dmesg(self) -> str:
        # With a time that tells lines of one text apart.
        return "".join(f"[{number:5}.000000] {line}\n" for number, line in enumerate(self._kernel.log))

    def _sysctl(self, *arguments: str) -> tuple[int, str]:
        key, _, value = arguments[-1].partition("=")
        path = f"/proc/sys/{key.replace('.', '/')}"
        if "=" not in arguments[-1]:
            return 0, self._kernel.read(path)
        try:
            self._kernel.write(path, f"{value}\n")
        except KernelErrno as error:
            return 1, f'sysctl: setting key "{key}": {os.strerror(error.number)}\n'
        return 0, ""

    def _sleep(self, seconds: str) -> None:
        self._kernel.tasks.run(round(float(seconds) * 1000))

    def _read(self, path: str) -> str:
        return self._kernel.read(path)

    def _write(self, path: str, text: str) -> None:
        text = text.removesuffix(".")  # which kept the shell from dropping the newlines
        if path == "/dev/kmsg":
            for line in text.splitlines():
                self._kernel.machine.log.pr_info(line)
        else:
            self._kernel.write(path, text)

    def _exists(self, path: str) -> tuple[int, str]:
        try:
            self._kernel.machine.kernfs.stat(path)
        except KernelErrno:
            return 1, ""
        return 0, ""

    def _stat(self, path: str) -> str:
        found = self._kernel.machine.kernfs.stat(path.rstrip("/"))
        rights = "".join(
            letter if found.mode >> 8 - place & 1 else "-" for place, letter in enumerate("rwxrwxrwx")
        )
        return ("d" if found.is_dir else "-") + rights + "\n"


def _question(read: Callable[[int], bytes]) -> list[str] | None:
    """The words that a shell function asks with; None when the script has ended."""

    def word() -> str | None:
        found = bytearray()
        while (byte := read(1)) != b"\0":
            if not byte:
                return None
            found += byte
        return found.decode()

    count = word()
    if count is None:
        return None
    return [word() or "" for _ in range(int(count))]
