"""Reading recordings: what is wrong with one is said in one line, with the place in it."""

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import klpemu
from hypothesis import given
from hypothesis import strategies as st

from elf.errors import KlpemuError
from klpemu.recording import Command, read_recording

SITE = {"addr": "0xffffffff81000000", "module": "", "bytes16": "0f1f440000", "kind": "nop5"}
SNAPSHOT = {"type": "snapshot", "label": "one", "sites": {"area_of": SITE}, "modules": ""}
COMMAND = {"type": "command", "cmd": "cat /proc/cmdline", "rc": 0, "out": ["quiet oracle=1 "]}
POKE = {
    "step": "enable",
    "site": "a",
    "addr": "0x1",
    "before": "0f1f440000",
    "after": "cc1f440000",
    "phase": 1,
}
RECORDING: dict[str, Any] = {
    "meta": {"kernel": "Debian 6.1.0-1-amd64 (6.1.1-1)", "cmdline": "quiet", "base_smp": 2},
    "symbols": {"_text": "0xffffffff81000000"},
    "sequence": [SNAPSHOT, COMMAND],
    "poke_phases": [POKE],
    "dmesg": ["booted", "ORACLE: SNAP one", "ORACLE: cat /proc/cmdline rc=0 quiet", "    going on", "a line"],
}


def written(folder: Path, recording: Any) -> Path:
    path = folder / "recording.json"
    path.write_text(recording if isinstance(recording, str) else json.dumps(recording))
    return path


def changed(place: str, value: Any) -> Any:
    """RECORDING with another value at a place; None takes the key away."""
    recording = copy.deepcopy(RECORDING)
    *above, last = [int(key) if key.isdigit() else key for key in place.split("/")]
    owner: Any = recording
    for key in above:
        owner = owner[key]
    if value is None:
        del owner[last]
    else:
        owner[last] = value
    return recording


def test_all_of_a_recording_is_read(tmp_path: Path) -> None:
    read = read_recording(written(tmp_path, RECORDING))
    assert (read.kernel, read.cpu, read.cpus) == ("Debian 6.1.0-1-amd64 (6.1.1-1)", "qemu64", 2)
    assert read.symbols == {"_text": 0xFFFFFFFF81000000}
    assert read.sequence[1] == Command("cat /proc/cmdline", 0, ("quiet oracle=1 ",))
    assert (read.pokes[0].address, read.pokes[0].after[0]) == (1, 0xCC)
    assert read.unknown == {}.keys()


def test_the_command_line_is_what_proc_cmdline_showed_if_it_begins_like_that_of_the_boot(
    tmp_path: Path,
) -> None:
    assert read_recording(written(tmp_path, RECORDING)).boot_line == "quiet oracle=1 "
    patched = changed("sequence/1/out", ["this has been live patched"])
    assert read_recording(written(tmp_path, patched)).boot_line == "quiet"


def test_a_line_that_goes_on_with_a_marker_is_part_of_it(tmp_path: Path) -> None:
    log = read_recording(written(tmp_path, RECORDING)).log
    assert [(each.text, each.marker) for each in log] == [
        ("booted", False),
        ("SNAP one", True),
        ("cat /proc/cmdline rc=0 quiet", True),
        ("a line", False),
    ]


def test_keys_that_a_later_recorder_has_added_are_told_and_not_refused(tmp_path: Path) -> None:
    recording = changed("sequence/0/sites/area_of/colour", "green")
    recording["meta"]["host"] = "x"
    assert list(read_recording(written(tmp_path, recording)).unknown) == ["meta.host", "site.colour"]


BAD = [
    ("meta", None, "recording: no key 'meta'"),
    ("meta/kernel", None, "meta: no key 'kernel'"),
    ("meta/base_smp", "two", "meta.base_smp: a number is wanted, not a string"),
    ("meta/base_smp", True, "meta.base_smp: a number is wanted, not true or false"),
    ("symbols/_text", "1234", "symbols._text: '1234' is no address (0x...)"),
    ("symbols/_text", 7, "symbols._text: a string is wanted, not a number"),
    ("sequence", {}, "recording.sequence: a list is wanted, not an object"),
    ("sequence/0", [], "sequence[0]: no object, but a list"),
    ("sequence/0/type", "photo", "sequence[0].type: 'photo' is neither command nor snapshot"),
    ("sequence/0/label", None, "sequence[0]: no key 'label'"),
    ("sequence/0/sites/area_of/bytes16", "0f1", "'0f1' are no hexadecimal bytes"),
    ("sequence/0/sites/area_of/bytes16", "0f1f", "bytes16: fewer than five bytes"),
    ("sequence/0/sites/area_of/addr", "0xzz", "sites.area_of.addr: '0xzz' is no address"),
    ("sequence/0/sites/area_of/kind", None, "sites.area_of: no key 'kind'"),
    ("sequence/0/sites/area_of/tramp_bytes", "90", "sites.area_of: no key 'target'"),
    ("sequence/0/sites/area_of/fops", {"func": "x"}, "fops: no key 'flags'"),
    ("sequence/0/sites/area_of/func_stack", [{}], "func_stack[0]: no key 'old_name'"),
    ("sequence/0/livepatch", {"one": {"enabled": 1}}, "livepatch.one.enabled: a string is wanted"),
    ("sequence/0/modules", 3, "sequence[0].modules: a string is wanted, not a number"),
    ("sequence/1/cmd", None, "sequence[1]: no key 'cmd'"),
    ("sequence/1/rc", None, "sequence[1]: no key 'rc'"),
    ("sequence/1/out/0", 3, "sequence[1].out[0]: a string is wanted, not a number"),
    ("poke_phases/0/before", "cc", "poke_phases[0]: before and after are five bytes each"),
    ("dmesg", "text", "recording.dmesg: a list is wanted, not a string"),
]


@pytest.mark.parametrize(("place", "value", "said"), BAD, ids=lambda value: str(value)[:40])
def test_what_is_wrong_with_a_recording_is_said_with_its_place(
    tmp_path: Path, place: str, value: Any, said: str
) -> None:
    with pytest.raises(KlpemuError) as raised:
        read_recording(written(tmp_path, changed(place, value)))
    assert said in str(raised.value)
    assert str(raised.value).count("\n") == 0


@pytest.mark.parametrize("text", ["", "[", json.dumps(RECORDING)[:-200], "[" * 100_000, "\0", "7", "null"])
def test_what_is_no_recording_is_one_line_and_exit_status_2(tmp_path: Path, text: str) -> None:
    outcome = klpemu("replay", str(written(tmp_path, text)), "--kernel", "builtin:kernel.o")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1
    assert "recording.json" in outcome.err


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recording.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KlpemuError, match="this is no JSON"):
        read_recording(path)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    outcome = klpemu("replay", str(tmp_path / "none.json"))
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert "No such file" in outcome.err


PLACES = sorted(
    {
        *(place for place, _, _ in BAD if place.count("bytes16") + place.count("addr") + place.count("kind")),
        *("meta", "symbols", "sequence/0", "sequence/0/sites", "sequence/1/out", "poke_phases/0", "dmesg/0"),
    }
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(PLACES), ANYTHING)
def test_whatever_stands_in_a_recording_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: str, value: Any
) -> None:
    path = written(tmp_path_factory.mktemp("any"), changed(place, value))
    with contextlib.suppress(KlpemuError):
        read_recording(path)
