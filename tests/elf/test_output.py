"""Files that are written: headers and notes against readelf, and whole or not at all."""

import errno
import os
from pathlib import Path

import pytest
from objects import run

from elf.errors import KlpemuError
from elf.output import ET_CORE, PF_R, PF_X, PT_LOAD, PT_NOTE, Segment, file_header, note, write_file

BASE = 0xFFFF_FFFF_8100_0000


def test_headers_and_notes_are_what_readelf_reads(tmp_path: Path) -> None:
    notes = note("A", 1, b"12345") + note("LONGER", 2, b"") + note("GNU", 3, b"\xab" * 20)
    segments = [
        Segment(PT_NOTE, 0, 0x100, len(notes)),
        Segment(PT_LOAD, PF_R | PF_X, 0x1000, 0x2000, BASE, 0x5000, 0x1000),
    ]
    header = file_header(ET_CORE, segments, entry=0x1234)
    write_file(tmp_path / "core", 0x3000, [(0, header), (0x100, notes)])
    shown = run("readelf", "-hlnW", tmp_path / "core")
    assert "Type:                              CORE (Core file)" in shown
    assert "Entry point address:               0x1234" in shown
    assert f"LOAD           0x001000 {BASE:#018x} 0x0000000000005000 0x002000 0x002000 R E 0x1000" in shown
    assert [line.split()[:2] for line in shown.splitlines() if " 0x000000" in line and line.startswith("  ")][
        -3:
    ] == [
        ["A", "0x00000005"],
        ["LONGER", "0x00000000"],
        ["GNU", "0x00000014"],
    ]


def test_what_no_piece_covers_is_zero(tmp_path: Path) -> None:
    write_file(tmp_path / "file", 12, [(2, b"ab"), (8, b"c")])
    assert (tmp_path / "file").read_bytes() == b"\0\0ab\0\0\0\0c\0\0\0"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    def pieces() -> object:
        yield 0, b"new"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(KlpemuError, match=r"/file: cannot be written: No space left on device; give a path"):
        write_file(tmp_path / "file", 100, pieces())
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_who_has_the_old_file_open_goes_on_reading_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with open(tmp_path / "file", "rb") as old:
        write_file(tmp_path / "file", 3, [(0, b"new")])
        assert old.read() == b"old"
    assert (tmp_path / "file").read_bytes() == b"new"


def test_an_interrupted_write_leaves_the_old_one_too(tmp_path: Path) -> None:
    def pieces() -> object:
        yield 0, b"new"
        raise KeyboardInterrupt

    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "file", 100, pieces())
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("missing/file", "cannot be written: No such file or directory"),
        ("folder", "not a regular file"),
        ("nul\0byte", "cannot be written: embedded null byte"),
        ("n" * 300, "cannot be written: File name too long"),
    ],
    ids=["no such directory", "a directory", "a NUL byte", "a long name"],
)
def test_a_path_that_cannot_be_written_is_one_line(tmp_path: Path, path: str, what: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(KlpemuError) as caught:
        write_file(f"{tmp_path}/{path}", 1, [(0, b"x")])
    assert caught.value.what == what
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["folder"]


def test_a_device_is_refused_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(KlpemuError, match="not a regular file"):
        write_file(tmp_path / "fifo", 1, [(0, b"x")])
    assert (tmp_path / "fifo").is_fifo()


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_file(tmp_path / "link", 1, [(0, b"x")])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"x"


def test_more_segments_than_the_header_counts_are_refused() -> None:
    with pytest.raises(KlpemuError, match="65535 segments, one file holds 65534"):
        file_header(ET_CORE, [Segment(PT_LOAD, 0, 0, 0)] * 0xFFFF)
