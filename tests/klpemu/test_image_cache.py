"""The cache of kernel images: what is read is what was written, or nothing, whoever writes or dies when."""

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elf.kernel_symbols import KernelSymbols
from klpemu import image_cache
from klpemu.image_cache import CachedImage, ImageCache

ROWS = [("_text", "T", 2**64 - 2**31), ("caf\\xe9", "t", 2**64 - 2**30), ("_end", "B", 2**64 - 1)]
CACHED = CachedImage(b"\x7fELF and more" * 1000, KernelSymbols.sorted(ROWS))
DIGEST = "0f" * 32


@pytest.fixture
def cache(tmp_path: Path) -> ImageCache:
    return ImageCache(tmp_path / "images")


def assert_is_cached(found: CachedImage | None) -> None:
    assert found is not None
    assert found.symbols is not None
    assert found.vmlinux == CACHED.vmlinux
    assert list(found.symbols) == ROWS


def only_file(cache: ImageCache) -> Path:
    (path,) = cache.directory.iterdir()
    return path


def test_what_was_written_is_read(cache: ImageCache) -> None:
    assert cache.read(DIGEST) is None
    cache.write(DIGEST, CACHED)
    assert_is_cached(cache.read(DIGEST))
    assert cache.read("11" * 32) is None


def test_an_image_without_symbols_is_kept_without(cache: ImageCache) -> None:
    cache.write(DIGEST, CachedImage(b"image", None))
    assert cache.read(DIGEST) == CachedImage(b"image", None)


def test_nothing_but_the_entry_is_left(cache: ImageCache) -> None:
    cache.write(DIGEST, CACHED)
    cache.write(DIGEST, CACHED)
    assert only_file(cache).name == f"{DIGEST}.image"


@given(st.data())
def test_a_damaged_entry_is_as_good_as_none(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    cache = ImageCache(tmp_path_factory.mktemp("cache"))
    cache.write(DIGEST, CACHED)
    whole = bytearray(only_file(cache).read_bytes())
    end = data.draw(st.integers(0, len(whole)))
    if end == len(whole):
        whole[data.draw(st.integers(0, end - 1))] ^= data.draw(st.integers(1, 255))
    only_file(cache).write_bytes(whole[:end])
    assert cache.read(DIGEST) is None
    cache.write(DIGEST, CACHED)
    assert_is_cached(cache.read(DIGEST))


def test_an_entry_of_another_form_is_not_read(cache: ImageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write(DIGEST, CACHED)
    monkeypatch.setattr(image_cache, "_MAGIC", b"klpemu kernel image 2\n")
    assert cache.read(DIGEST) is None


def test_a_reader_beside_a_writer_sees_the_old_entry_or_the_new_one(
    cache: ImageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    replace = os.replace

    def watched(source: str, target: Path) -> None:
        seen.append(cache.read(DIGEST))
        replace(source, target)
        seen.append(cache.read(DIGEST))

    monkeypatch.setattr(os, "replace", watched)
    cache.write(DIGEST, CACHED)
    assert seen[0] is None
    assert_is_cached(seen[1])


def _write_often(directory: Path) -> None:
    for _ in range(50):
        ImageCache(directory).write(DIGEST, CACHED)


def test_writers_at_the_same_time_leave_one_whole_entry(cache: ImageCache) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(cache.directory,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert_is_cached(cache.read(DIGEST))
    cache.write(DIGEST, CACHED)
    assert only_file(cache).name == f"{DIGEST}.image"


KILLED = """
import os, signal, sys
from pathlib import Path
from klpemu.image_cache import CachedImage, ImageCache
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
ImageCache(Path(sys.argv[1])).write("0f" * 32, CachedImage(b"half" * 1000, None))
"""


def test_what_a_killed_writer_left_is_not_read_and_is_removed(cache: ImageCache) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(cache.directory)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert only_file(cache).name.startswith(".write-")
    assert cache.read(DIGEST) is None
    cache.write(DIGEST, CACHED)
    assert only_file(cache).name == f"{DIGEST}.image"


def test_what_another_writer_is_writing_is_left_alone(cache: ImageCache) -> None:
    cache.directory.mkdir()
    other = cache.directory / ".write-other"
    with open(other, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cache.write(DIGEST, CACHED)
        assert other.exists()
    cache.write(DIGEST, CACHED)
    assert not other.exists()


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    cache: ImageCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    cache.write(DIGEST, CACHED)
    assert list(cache.directory.iterdir()) == []
    blocked = ImageCache(Path(__file__) / "images")
    blocked.write(DIGEST, CACHED)
    assert blocked.read(DIGEST) is None
