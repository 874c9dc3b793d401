"""The kernel's own livepatch test modules and samples, built for a stock Debian kernel outside its tree.

The sources come from `linux-source-6.1`, of which only three directories are taken: lib/livepatch/,
samples/livepatch/ and the selftests' scripts.  They are built with gcc-12 against the header packages of the
same version.  What is kept beside the kernel in the cache: sources, modules and scripts, and the compiler's
and modpost's output in `build.log`.
"""

import lzma
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Final

from elf.errors import KlpemuError
from klpemu.debian_packages import Say, download, unfinished, unpack

__all__ = ["LivepatchModules", "build"]

# Where it is in the kernel's source, and in the cache.
_TAKEN: Final = {
    "lib/livepatch": "lib",
    "samples/livepatch": "samples",
    "tools/testing/selftests/livepatch": "selftests",
}
_BUILT: Final = ("lib", "samples")
_LOG: Final = "build.log"


@dataclass(frozen=True)
class LivepatchModules:
    """What was built for one kernel, below `directory`."""

    directory: Path

    @cached_property
    def test_modules(self) -> dict[str, Path]:
        """The modules of lib/livepatch/ by name, with underscores."""
        return self._built("lib")

    @cached_property
    def samples(self) -> dict[str, Path]:
        """The modules of samples/livepatch/ by name, with underscores."""
        return self._built("samples")

    @property
    def selftests(self) -> Path:
        """The directory of the scripts that load, use and unload the test modules."""
        return self.directory / "selftests"

    @property
    def why_not(self) -> str:
        """Why they cannot be used, and what to do about it; empty if they are all there."""
        if (self.directory / _LOG).is_file() and self.test_modules and self.samples:
            return ""
        return f"no livepatch test modules in {self.directory}: `make real` builds them"

    def source(self, module: str) -> str:
        """The C source of a module."""
        built = self.test_modules.get(module) or self.samples[module]
        return built.with_suffix(".c").read_text()

    def _built(self, part: str) -> dict[str, Path]:
        return {path.stem.replace("-", "_"): path for path in sorted((self.directory / part).glob("*.ko"))}


def build(release: str, version: str, directory: Path, say: Say) -> LivepatchModules:
    """Build the modules for kernel `release` of package `version` into `directory`, if they are not there.

    The caller holds the lock of the cache, which `directory`'s parent lies in.  Raises KlpemuError if the
    packages or the tools are not to be had, or if the compiler or modpost complains.
    """
    modules = LivepatchModules(directory)
    if not modules.why_not:
        return modules
    for tool in ("make", "gcc-12"):
        if shutil.which(tool) is None:
            raise KlpemuError(
                f"{tool} is not installed: the kernel's livepatch test modules cannot be built",
                advice=f"install {tool}; everything else works without them",
            )
    with unfinished(directory.parents[1]) as work:
        headers = _headers(release, version, work, say)
        _sources(version, work, say)
        built = work / "livepatch"
        for module in _make(headers, built, say):
            if not module.is_file():
                raise KlpemuError("the build made no such module", where=module.name)
        shutil.rmtree(directory, ignore_errors=True)
        os.rename(built, directory)
    return LivepatchModules(directory)


def _headers(release: str, version: str, work: Path, say: Say) -> Path:
    """Unpack the header packages; returns the directory to give to `make -C`."""
    common = f"{release.rsplit('-', 1)[0]}-common"  # all flavours of one ABI share it
    root = work / "root"
    for name in (f"linux-headers-{release}", f"linux-headers-{common}", "linux-kbuild-6.1"):
        unpack(download(name, version, work / name, say), root, say)
    headers = root / "usr/src" / f"linux-headers-{release}"
    makefile = headers / "Makefile"
    text = makefile.read_text()
    # The one absolute path in the packages; all else is found relative to these two.
    makefile.write_text(text.replace(" /usr/src/", f" {root}/usr/src/"))
    return headers


def _sources(version: str, work: Path, say: Say) -> None:
    """Take the directories that are wanted out of the kernel's source."""
    name = "linux-source-6.1"
    deb = download(name, version, work / name, say)
    unpack(deb, work / "source", say)
    deb.unlink()
    archive = work / "source/usr/src" / f"{name}.tar.xz"
    say(f"taking {', '.join(_TAKEN)} out of {archive.name}")
    found = set()
    try:
        with tarfile.open(archive, "r|xz") as source:
            for member in source:
                parent, _, file = member.name.partition("/")[2].rpartition("/")
                contents = source.extractfile(member) if parent in _TAKEN and member.isreg() else None
                if contents is not None:
                    found.add(parent)
                    _keep(contents, work / "livepatch" / _TAKEN[parent] / file)
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise KlpemuError(f"no kernel source: {error}", where=archive.name) from error
    archive.unlink()
    if missing := sorted(_TAKEN.keys() - found):
        raise KlpemuError(f"no {', '.join(missing)} in the kernel's source", where=archive.name)


def _keep(contents: IO[bytes], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents.read())


def _make(headers: Path, built: Path, say: Say) -> Iterator[Path]:
    """Build every module whose source is there; yields the files that must exist now."""
    say(f"building the kernel's livepatch modules with gcc-12 against {headers.name}")
    (built / "Kbuild").write_text("".join(f"obj-m += {part}/\n" for part in _BUILT))
    command = [
        *("make", "-C", str(headers), f"M={built}", "CONFIG_TEST_LIVEPATCH=m", "CONFIG_SAMPLE_LIVEPATCH=m"),
        *("ARCH=x86", "CC=gcc-12", f"-j{os.cpu_count() or 1}", "modules"),
    ]
    # What the run was called with, or calls it: `make real` would hand its own flags down.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    done = subprocess.run(
        command,
        env={**environment, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    complaints = [line for line in done.stdout.splitlines() if "rror:" in line or "ERROR" in line]
    if done.returncode:
        what = complaints[0] if complaints else f"exit status {done.returncode}"
        raise KlpemuError(f"make failed: {what}", where=headers.name)
    for line in done.stdout.splitlines():
        if "WARNING" in line or "warning:" in line:
            say(line)
    for part in _BUILT:
        sources = [path for path in sorted((built / part).glob("*.c")) if not path.name.endswith(".mod.c")]
        modules = [path.with_suffix(".ko") for path in sources]
        yield from modules
        _forget_all_but({*sources, *modules}, built / part)
    _forget_all_but(set(), built)
    (built / _LOG).write_text(done.stdout)


def _forget_all_but(kept: set[Path], directory: Path) -> None:
    """Remove the other files of a directory: what the build left for itself."""
    for path in directory.iterdir():
        if path.is_file() and path not in kept:
            path.unlink()
