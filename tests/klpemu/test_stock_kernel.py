"""The stock kernel is found, chosen and unpacked; apt and dpkg-deb are small scripts here."""

import os
import shutil
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elf.errors import KlpemuError
from klpemu import stock_kernel
from klpemu.debian_packages import debian_version_key

NEWEST = "6.1.0-10-amd64_6.1.40-1"

APT_CACHE = """
test -e "$FAKE/lists" || exit 0
case "$1" in
pkgnames)
    printf 'linux-image-%s-unsigned\\n' 6.1.0-9-amd64 6.1.0-10-amd64 6.1.0-10-rt-amd64 6.1.0-10-cloud-amd64
    echo linux-image-6.1.0-11-amd64-dbg ;;
madison)
    shift
    for name; do
        case $name in *rt*|*cloud*|*dbg*) exit 1 ;; esac
        case $name in *-9-*) version=6.1.9-1 ;; *) version=6.1.40-1 ;; esac
        echo " $name | $version | http://mirror bookworm/main amd64 Packages"
        echo " $name | 9.9-1 | http://mirror bookworm/main Sources"
    done ;;
esac
"""
APT_GET = """
echo "$*" >> "$FAKE/calls"
case "$1" in
update) touch "$FAKE/lists" "$FAKE/there" ;;
download)
    test -e "$FAKE/there" || { echo "E: Failed to fetch it  404" >&2; exit 100; }
    sleep ${SLOWLY:-0}
    touch package.deb ;;
esac
"""
DPKG_DEB = """
test -z "$BROKEN" || { echo "dpkg-deb: error: unexpected end of file" >&2; exit 2; }
release=6.1.0-10-amd64
mkdir -p "$3/boot" "$3/lib/modules/$release/kernel/lib" "$3/usr/share/doc"
touch "$3/boot/vmlinuz-$release" "$3/lib/modules/$release/kernel/lib/crc-7_x.ko" "$3/usr/share/doc/much"
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose files say what apt knows (lists) and can deliver (there); calls is apt-get's log."""
    for tool, script in (("apt-cache", APT_CACHE), ("apt-get", APT_GET), ("dpkg-deb", DPKG_DEB)):
        path = tmp_path / "bin" / tool
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}")
        path.chmod(0o755)
    for name in ("lists", "there", "calls"):
        (tmp_path / name).touch()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("KLPEMU_CACHE", str(tmp_path / "cache"))
    return tmp_path


def calls(fake: Path) -> list[str]:
    """The first word of each call of apt-get."""
    return [line.split()[0] for line in (fake / "calls").read_text().splitlines()]


def in_cache(fake: Path) -> list[str]:
    return sorted(path.name for path in (fake / "cache").iterdir())


def put_in_cache(fake: Path, release: str, version: str) -> None:
    directory = fake / "cache" / f"{release}_{version}"
    (directory / "lib/modules" / release / "kernel").mkdir(parents=True)
    (directory / "boot").mkdir()
    (directory / "boot" / f"vmlinuz-{release}").touch()


def test_the_newest_kernel_of_the_plain_flavour_is_unpacked(fake: Path) -> None:
    kernel = stock_kernel.fetch()
    assert (kernel.release, kernel.directory) == ("6.1.0-10-amd64", fake / "cache" / NEWEST)
    assert stock_kernel.find() == kernel
    assert sorted(path.name for path in kernel.directory.iterdir()) == ["boot", "lib"]
    assert in_cache(fake) == [NEWEST, "lock"]
    assert "=6.1.40-1" in (fake / "calls").read_text()


def test_what_is_in_the_cache_is_not_downloaded_again(fake: Path) -> None:
    assert stock_kernel.fetch() == stock_kernel.fetch()
    assert calls(fake) == ["download"]


def test_a_newer_kernel_is_fetched_beside_an_older_one(fake: Path) -> None:
    put_in_cache(fake, "6.1.0-9-amd64", "6.1.9-1")
    assert stock_kernel.fetch().release == "6.1.0-10-amd64"
    assert in_cache(fake) == [NEWEST, "6.1.0-9-amd64_6.1.9-1", "lock"]


def test_names_are_looked_up_as_the_kernel_does(fake: Path) -> None:
    kernel = stock_kernel.fetch()
    assert kernel.module("crc_7-x") == kernel.modules[0]
    assert kernel.vmlinuz.is_file()
    with pytest.raises(KlpemuError, match="no module 'crc7' among 1"):
        kernel.module("crc7")


@pytest.mark.parametrize(("user", "expected"), [(0, ["update", "download"]), (1000, [])])
def test_only_root_updates_empty_lists(
    fake: Path, monkeypatch: pytest.MonkeyPatch, user: int, expected: list[str]
) -> None:
    (fake / "lists").unlink()
    monkeypatch.setattr(os, "geteuid", lambda: user)
    if expected:
        stock_kernel.fetch()
    else:
        with pytest.raises(KlpemuError, match="run `apt-get update` as root"):
            stock_kernel.fetch()
    assert calls(fake) == expected


def test_without_lists_the_cached_kernel_has_to_do(fake: Path) -> None:
    put_in_cache(fake, "6.1.0-9-amd64", "6.1.9-1")
    (fake / "lists").unlink()
    assert stock_kernel.fetch().release == "6.1.0-9-amd64"
    assert calls(fake) == []


def test_without_apt_the_cached_kernel_has_to_do(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fake))
    with pytest.raises(KlpemuError, match=r"apt-cache is not installed; .* KLPEMU_CACHE"):
        stock_kernel.fetch()
    assert stock_kernel.why_not().endswith("but needs apt-cache, apt-get, dpkg-deb for that")
    put_in_cache(fake, "6.1.0-9-amd64", "6.1.9-1")
    assert stock_kernel.fetch().release == "6.1.0-9-amd64"


@pytest.mark.parametrize(
    ("user", "expected"), [(0, ["download", "update", "download"]), (1000, ["download"])]
)
def test_root_updates_lists_that_name_a_package_which_is_gone(
    fake: Path, monkeypatch: pytest.MonkeyPatch, user: int, expected: list[str]
) -> None:
    (fake / "there").unlink()
    monkeypatch.setattr(os, "geteuid", lambda: user)
    if user == 0:
        stock_kernel.fetch()
    else:
        with pytest.raises(KlpemuError, match="apt-get download failed: E: Failed to fetch it 404"):
            stock_kernel.fetch()
    assert calls(fake) == expected


def test_a_failure_leaves_nothing_half_done(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN", "1")
    with pytest.raises(KlpemuError, match="dpkg-deb -x failed: dpkg-deb: error: unexpected end of file"):
        stock_kernel.fetch()
    assert in_cache(fake) == ["lock"]
    assert stock_kernel.find() is None


@pytest.mark.parametrize("left", ["boot", "lib/modules/6.1.0-10-amd64/kernel"])
def test_what_a_killed_run_or_a_cleaner_left_is_put_right(fake: Path, left: str) -> None:
    (fake / "cache" / ".fetch-killed" / "all").mkdir(parents=True)
    (fake / "cache" / NEWEST / left).mkdir(parents=True)
    assert stock_kernel.find() is None
    stock_kernel.fetch()
    assert in_cache(fake) == [NEWEST, "lock"]


def test_runs_at_the_same_time_download_once(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOWLY", "0.3")
    said: list[str] = []
    runs = [threading.Thread(target=stock_kernel.fetch, args=(said.append,)) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert calls(fake) == ["download"]
    assert said.count("waiting for another run that is fetching the kernel") == 2
    assert in_cache(fake) == [NEWEST, "lock"]


def test_a_cache_that_cannot_be_made_is_one_line_and_status_2(fake: Path) -> None:
    (fake / "cache").touch()
    done = subprocess.run(
        [sys.executable, "-m", "klpemu.fetch_stock_kernel"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {fake / 'cache'}: File exists\n"


def test_why_not_is_empty_once_there_is_a_kernel(fake: Path) -> None:
    assert stock_kernel.why_not() == f"no stock kernel in {fake / 'cache'}: `make real` fetches one"
    stock_kernel.fetch()
    assert stock_kernel.why_not() == ""


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for own, xdg, expected in (
        ("/own", "/xdg", "/own"),
        ("", "/xdg", "/xdg/klpemu"),
        ("", "relative", "/home/somebody/.cache/klpemu"),
        ("", "", "/home/somebody/.cache/klpemu"),
    ):
        monkeypatch.setenv("KLPEMU_CACHE", own)
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        assert stock_kernel.cache_directory() == Path(expected)


def test_versions_are_in_the_order_of_deb_version() -> None:
    ascending = [
        "6.1.1~rc1-1", "6.1.1-1~bpo11+1", "6.1.1-1", "6.1.1-1+b1", "6.1.1-2", "6.1.1-10", "6.1.1a-1",
        "6.1.1+x-1", "6.1.10-1", "1:1-1",
    ]  # fmt: skip
    assert all(debian_version_key(older) < debian_version_key(newer) for older, newer in pairwise(ascending))


# So few characters that versions with a common beginning are frequent.
VERSIONS = st.from_regex(r"1[02a.~]{0,2}(-[02a~]{1,2})?", fullmatch=True)


@pytest.mark.skipif(shutil.which("dpkg") is None, reason="dpkg is not installed")
@settings(deadline=None, max_examples=150)
@given(VERSIONS, VERSIONS)
@example("1", "1-0")
def test_versions_are_in_the_order_of_dpkg(one: str, other: str) -> None:
    done = subprocess.run(["dpkg", "--compare-versions", one, "lt", other], check=False)
    assert (done.returncode == 0) == (debian_version_key(one) < debian_version_key(other))


def test_a_release_can_be_asked_for(fake: Path) -> None:
    for release, version in (("6.1.0-55-amd64", "6.1.192-1"), ("6.1.0-56-amd64", "6.1.192-2")):
        put_in_cache(fake, release, version)
    found = {release: stock_kernel.find(release) for release in ("", "6.1.0-55-amd64", "6.1.0-54-amd64")}
    assert [kernel and kernel.release for kernel in found.values()] == [
        "6.1.0-56-amd64",
        "6.1.0-55-amd64",
        None,
    ]
