"""The stock Debian kernel for the real tests: found through apt, unpacked into a cache, never installed.

The package is `linux-image-<release>-amd64-unsigned` of the newest 6.1 that apt knows; `make real` fetches
it.  The cache is $KLPEMU_CACHE, or $XDG_CACHE_HOME/klpemu, or ~/.cache/klpemu, and holds one directory
`<release>_<version>` for each kernel.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from elf.errors import KlpemuError
from klpemu.debian_packages import alone, debian_version_key, download, run, unfinished, unpack, update_lists
from klpemu.livepatch_modules import LivepatchModules, build

__all__ = ["StockKernel", "build_livepatch_modules", "cache_directory", "fetch", "find", "why_not"]

# A part that begins with a letter (-rt, -cloud) is another flavour.
_PACKAGE: Final = re.compile(r"linux-image-(6\.1\.[^-]+(?:-\d[^-]*)?-amd64)-unsigned")
_CACHED: Final = re.compile(r"(6\.1\.[^_]+-amd64)_(\d[^_:]*)")
_KEPT: Final = ("boot", "lib/modules")


@dataclass(frozen=True)
class StockKernel:
    """One unpacked kernel package: `release` is what `uname -r` would say, `directory` its root."""

    release: str
    directory: Path

    @property
    def vmlinuz(self) -> Path:
        """The compressed kernel image."""
        return self.directory / "boot" / f"vmlinuz-{self.release}"

    @cached_property
    def livepatch(self) -> LivepatchModules:
        """The kernel's own livepatch modules, built for it; they need not be there."""
        return LivepatchModules(self.directory / "livepatch")

    @cached_property
    def modules(self) -> list[Path]:
        """All `.ko` files, sorted by path."""
        return sorted((self.directory / "lib/modules" / self.release).rglob("*.ko"))

    def module(self, name: str) -> Path:
        """The `.ko` of module `name`, in which `-` and `_` are the same; `KlpemuError` if there is none."""
        try:
            return self._by_name[_module_name(name)]
        except KeyError:
            raise KlpemuError(
                f"no module {name!r} among {len(self.modules)}", where=str(self.directory)
            ) from None

    @cached_property
    def _by_name(self) -> dict[str, Path]:
        return {_module_name(path.stem): path for path in self.modules}


def cache_directory() -> Path:
    """Where the kernels are kept, which need not exist yet."""
    if own := os.environ.get("KLPEMU_CACHE"):
        return Path(own).expanduser().absolute()
    # XDG Base Directory Specification: a relative path is to be ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "klpemu"


def find(release: str = "") -> StockKernel | None:
    """The newest kernel in the cache by package version, or the newest of a release; None without one."""
    try:
        named = [_CACHED.fullmatch(entry.name) for entry in cache_directory().iterdir()]
        packages = [_Package(name[1], name[2]) for name in named if name and release in ("", name[1])]
        cached = [package for package in packages if _is_complete(package.unpacked)]
    except OSError:
        return None
    return max(cached, key=_Package.version_key).unpacked if cached else None


def why_not() -> str:
    """Why `find` finds nothing and what to do about it, in one line; empty if it does find a kernel."""
    if find() is not None:
        return ""
    reason = f"no stock kernel in {cache_directory()}: `make real` fetches one"
    missing = [tool for tool in ("apt-cache", "apt-get", "dpkg-deb") if shutil.which(tool) is None]
    return f"{reason}, but needs {', '.join(missing)} for that" if missing else reason


def fetch(say: Callable[[str], object] = lambda _: None) -> StockKernel:
    """The newest 6.1 kernel that apt knows, downloaded if it is not in the cache yet.

    Where apt knows none, the newest kernel in the cache has to do.  `say` gets a line before each step that
    takes time.  Works for any user; only root can update apt's lists, which is done where they lack the
    package or name one that is no longer there.  Raises `KlpemuError` if there is no kernel to be had.
    """
    if shutil.which("apt-cache") is None and (cached := find()) is not None:
        return cached
    cache = cache_directory()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with alone(cache, say):
            package = _newest_package()
            if package is None and find() is None and update_lists(say):
                package = _newest_package()
            if package is not None and not _is_complete(package.unpacked):
                _download(package, cache, say)
    except OSError as error:
        raise KlpemuError(error.strerror or str(error), where=str(error.filename or cache)) from error
    found = find()
    if found is None:
        raise KlpemuError(
            "apt knows no package linux-image-6.1.*-amd64-unsigned",
            advice="run `apt-get update` as root, on a Debian that has a 6.1 kernel (12, bookworm)",
        )
    return found


def build_livepatch_modules(kernel: StockKernel, say: Callable[[str], object] = lambda _: None) -> None:
    """Build the kernel's own livepatch modules for a kernel of the cache, if they are not there.

    Raises `KlpemuError` if that cannot be done; the kernel can be used all the same.
    """
    named = _CACHED.fullmatch(kernel.directory.name)
    if named is None or not kernel.livepatch.why_not:
        return
    cache = kernel.directory.parent
    try:
        with alone(cache, say):
            build(named[1], named[2], kernel.livepatch.directory, say)
    except OSError as error:
        raise KlpemuError(error.strerror or str(error), where=str(error.filename or cache)) from error


@dataclass(frozen=True)
class _Package:
    """A kernel package as apt names it."""

    release: str
    version: str

    @property
    def unpacked(self) -> StockKernel:
        return StockKernel(self.release, cache_directory() / f"{self.release}_{self.version}")

    def version_key(self) -> tuple[object, ...]:
        return debian_version_key(self.version)


def _newest_package() -> _Package | None:
    names = [
        name for name in run("apt-cache", "pkgnames", "linux-image-6.1.").split() if _PACKAGE.fullmatch(name)
    ]
    packages = []
    for line in run("apt-cache", "madison", *names).splitlines() if names else ():
        name, version, source = (field.strip() for field in line.split("|"))
        named = _PACKAGE.fullmatch(name)
        if named and source.endswith("Packages"):
            packages.append(_Package(named[1], version))
    return max(packages, key=_Package.version_key, default=None)


def _download(package: _Package, cache: Path, say: Callable[[str], object]) -> None:
    """Put the kernel of `package`, or of a newer one that has taken its place, into the cache."""
    with unfinished(cache) as work:
        try:
            deb = _download_deb(package, work / "deb", say)
        except KlpemuError:
            # Lists that are some days old name packages that the archive no longer has.
            if not update_lists(say):
                raise
            package = _newest_package() or package
            deb = _download_deb(package, work / "newer", say)
        unpack(deb, work / "all", say)
        for kept in _KEPT:
            (work / "kernel" / kept).parent.mkdir(parents=True, exist_ok=True)
            os.rename(work / "all" / kept, work / "kernel" / kept)
        kernel = package.unpacked
        if kernel.directory.exists():
            shutil.rmtree(kernel.directory)  # somebody removed a part of it
        os.rename(work / "kernel", kernel.directory)
        if not _is_complete(kernel):
            raise KlpemuError("no kernel image and modules in the package", where=deb.name)


def _download_deb(package: _Package, directory: Path, say: Callable[[str], object]) -> Path:
    return download(f"linux-image-{package.release}-unsigned", package.version, directory, say)


def _is_complete(kernel: StockKernel) -> bool:
    modules = kernel.directory / "lib/modules" / kernel.release / "kernel"
    return kernel.vmlinuz.is_file() and modules.is_dir()


def _module_name(name: str) -> str:
    return name.replace("-", "_")
