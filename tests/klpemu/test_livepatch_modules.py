"""The kernel's own livepatch modules are built in the cache; apt-get, dpkg-deb and make are scripts here."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from elf.errors import KlpemuError
from klpemu import livepatch_modules, stock_kernel
from klpemu.stock_kernel import StockKernel

RELEASE, VERSION = "6.1.0-10-amd64", "6.1.40-1"
PACKAGES = (
    "linux-headers-6.1.0-10-amd64",
    "linux-headers-6.1.0-10-common",
    "linux-kbuild-6.1",
    "linux-source-6.1",
)

APT_GET = """
test "$GONE" != "${4%%=*}" || { echo "E: Version '6.1.40-1' for '$GONE' was not found" >&2; exit 100; }
echo "$4" >> "$FAKE/calls"
touch "${4%%=*}.deb"
"""
DPKG_DEB = """
headers="$3/usr/src/linux-headers-6.1.0-10-amd64"
case "$2" in
*/linux-headers-*-amd64.deb) mkdir -p "$headers"
    echo "include /usr/src/linux-headers-6.1.0-10-common/Makefile" > "$headers/Makefile" ;;
*/linux-source-*) mkdir -p "$3/usr/src"; cp "$FAKE/linux-source-6.1.tar.xz" "$3/usr/src" ;;
esac
"""
# It makes a module of each source, the intermediate files of a real build, and a complaint if it is told to.
MAKE = """
printf '%s\\n' "$@" > "$FAKE/make"
env > "$FAKE/environment"
cp "$2/Makefile" "$FAKE/Makefile"
test -z "$BROKEN" || { echo "  CC [M]  x.o"; echo "$BROKEN"; exit 2; }
for source in "${3#M=}"/lib/*.c "${3#M=}"/samples/*.c; do
    test "$(basename "$source")" = "$MISSING" || touch "${source%.c}.ko"
    touch "${source%.c}.mod.c" "${source%.c}.o"
done
echo "WARNING: modpost: something is odd"
echo "Skipping BTF generation"
"""
SOURCES = {
    "lib/livepatch/Makefile": "obj-m += a.o",
    "lib/livepatch/test_klp_a.c": "// a",
    "samples/livepatch/livepatch-sample.c": "// sample",
    "tools/testing/selftests/livepatch/functions.sh": "# functions",
    "kernel/livepatch/core.c": "// not wanted",
}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the tools' scripts in bin, and what they have been called with."""
    scripts = {"apt-get": APT_GET, "dpkg-deb": DPKG_DEB, "make": MAKE, "gcc-12": ""}
    for tool, script in scripts.items():
        path = tmp_path / "bin" / tool
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}")
        path.chmod(0o755)
    (tmp_path / "calls").touch()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("KLPEMU_CACHE", str(tmp_path / "cache"))
    archive(tmp_path, SOURCES)
    return tmp_path


def archive(fake: Path, sources: dict[str, str]) -> None:
    """What the package linux-source-6.1 will hold."""
    with tarfile.open(fake / "linux-source-6.1.tar.xz", "w:xz") as tar:
        for name, text in sources.items():
            member = tarfile.TarInfo(f"linux-source-6.1/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))


@pytest.fixture
def kernel(fake: Path) -> StockKernel:
    """A kernel in the cache, without its livepatch modules."""
    directory = fake / "cache" / f"{RELEASE}_{VERSION}"
    (directory / "lib/modules" / RELEASE / "kernel").mkdir(parents=True)
    (directory / "boot").mkdir()
    (directory / "boot" / f"vmlinuz-{RELEASE}").touch()
    return StockKernel(RELEASE, directory)


def built(kernel: StockKernel) -> livepatch_modules.LivepatchModules:
    """What is there now, whatever was there before."""
    return livepatch_modules.LivepatchModules(kernel.directory / "livepatch")


def in_cache(fake: Path) -> list[str]:
    return sorted(path.name for path in (fake / "cache").iterdir())


def test_modules_samples_and_scripts_are_there_afterwards(fake: Path, kernel: StockKernel) -> None:
    assert kernel.livepatch.why_not.endswith("`make real` builds them")
    stock_kernel.build_livepatch_modules(kernel)
    found = built(kernel)
    assert found.why_not == ""
    assert list(found.test_modules) == ["test_klp_a"]
    assert list(found.samples) == ["livepatch_sample"]
    assert (found.selftests / "functions.sh").read_text() == "# functions"
    assert found.source("livepatch_sample") == "// sample"


def test_only_what_is_wanted_is_kept(fake: Path, kernel: StockKernel) -> None:
    stock_kernel.build_livepatch_modules(kernel)
    root = built(kernel).directory
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) == [
        "build.log",
        "lib/test_klp_a.c",
        "lib/test_klp_a.ko",
        "samples/livepatch-sample.c",
        "samples/livepatch-sample.ko",
        "selftests/functions.sh",
    ]
    assert in_cache(fake) == [kernel.directory.name, "lock"]


def test_packages_of_the_kernels_version_are_downloaded_once(fake: Path, kernel: StockKernel) -> None:
    for _ in range(2):
        stock_kernel.build_livepatch_modules(StockKernel(kernel.release, kernel.directory))
    assert (fake / "calls").read_text().split() == [f"{name}={VERSION}" for name in PACKAGES]


def test_the_build_is_told_where_all_is_and_nothing_of_the_make_around_it(
    fake: Path, kernel: StockKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAKEFLAGS", "-n")
    monkeypatch.setenv("MAKELEVEL", "1")
    stock_kernel.build_livepatch_modules(kernel)
    arguments = (fake / "make").read_text().split()
    work = Path(arguments[2].removeprefix("M=")).parent
    assert work.parent == fake / "cache"
    assert {"CC=gcc-12", "ARCH=x86", "CONFIG_TEST_LIVEPATCH=m", "CONFIG_SAMPLE_LIVEPATCH=m", "modules"} < set(
        arguments
    )
    assert (fake / "Makefile").read_text().split() == [
        "include",
        f"{work}/root/usr/src/linux-headers-6.1.0-10-common/Makefile",
    ]
    assert "MAKEFLAGS" not in (fake / "environment").read_text()


def test_what_modpost_warns_of_is_said(fake: Path, kernel: StockKernel) -> None:
    said: list[str] = []
    stock_kernel.build_livepatch_modules(kernel, said.append)
    assert "WARNING: modpost: something is odd" in said
    assert "Skipping BTF generation" in (built(kernel).directory / "build.log").read_text()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("GONE", PACKAGES[0], "apt-get download failed: E: Version"),
        ("GONE", PACKAGES[3], "apt-get download failed: E: Version"),
        ("BROKEN", "x.c:1:1: error: expected ';'", "make failed: x.c:1:1: error: expected ';'"),
        ("BROKEN", 'ERROR: modpost: "nobody" [x.ko] undefined!', 'make failed: ERROR: modpost: "nobody"'),
        ("BROKEN", "make: nothing to say", "make failed: exit status 2"),
        ("MISSING", "test_klp_a.c", "test_klp_a.ko: the build made no such module"),
    ],
)
def test_a_failure_leaves_nothing_half_done(
    fake: Path, kernel: StockKernel, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(KlpemuError, match="^.*" + message.replace("(", r"\(").replace("[", r"\[")):
        stock_kernel.build_livepatch_modules(kernel)
    assert in_cache(fake) == [kernel.directory.name, "lock"]
    assert not built(kernel).directory.exists()
    monkeypatch.delenv(variable)
    stock_kernel.build_livepatch_modules(kernel)
    assert built(kernel).why_not == ""


@pytest.mark.parametrize("left_out", ["lib/livepatch", "tools/testing/selftests/livepatch"])
def test_a_source_without_one_of_the_directories_is_refused(
    fake: Path, kernel: StockKernel, left_out: str
) -> None:
    archive(fake, {name: text for name, text in SOURCES.items() if not name.startswith(left_out)})
    with pytest.raises(KlpemuError, match=f"no {left_out} in the kernel's source"):
        stock_kernel.build_livepatch_modules(kernel)
    assert not built(kernel).directory.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"no archive",
        lambda data: data[:100],
        lambda data: data[:60] + bytes(60) + data[120:],
    ],
)
def test_a_damaged_archive_is_refused(
    fake: Path, kernel: StockKernel, change: Callable[[bytes], bytes]
) -> None:
    path = fake / "linux-source-6.1.tar.xz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(KlpemuError, match=r"linux-source-6.1.tar.xz: no kernel source: "):
        stock_kernel.build_livepatch_modules(kernel)
    assert not built(kernel).directory.exists()


def test_what_a_killed_run_left_is_put_right(fake: Path, kernel: StockKernel) -> None:
    (fake / "cache" / ".fetch-killed").mkdir()
    (built(kernel).directory / "lib").mkdir(parents=True)
    (built(kernel).directory / "lib" / "test_klp_half.ko").touch()
    stock_kernel.build_livepatch_modules(kernel)
    assert list(built(kernel).test_modules) == ["test_klp_a"]
    assert in_cache(fake) == [kernel.directory.name, "lock"]


@pytest.mark.parametrize("tool", ["make", "gcc-12"])
def test_without_the_tools_it_is_said_which_is_missing(
    fake: Path, kernel: StockKernel, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    (fake / "bin" / tool).unlink()
    monkeypatch.setenv("PATH", str(fake / "bin"))
    with pytest.raises(KlpemuError, match=f"{tool} is not installed.*install {tool}"):
        stock_kernel.build_livepatch_modules(kernel)
    assert (fake / "calls").read_text() == ""
