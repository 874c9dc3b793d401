"""`klpemu replay` on the built-in kernel: a recording made here, replayed, and with errors in it."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import klpemu

from klpemu import Kernel
from klpemu.recording import Snapshot
from klpemu.snapshot import take_snapshot

ENABLED = "/sys/kernel/livepatch/own_a/enabled"
WATCHED = {"cmdline_proc_show": "", "own_a_cmdline_proc_show": "own_a"}


def snapshot_entry(kernel: Kernel, label: str) -> dict[str, Any]:
    watched = {name: module for name, module in WATCHED.items() if module in kernel.machine.modules.objects}
    taken: Snapshot = take_snapshot(kernel, label, watched)
    return {
        "type": "snapshot",
        "label": label,
        "sites": taken.sites,
        "enabled_functions": list(taken.enabled_functions),
        "livepatch": taken.livepatch,
        "modules": taken.modules,
    }


def command(cmd: str, *out: str, rc: int = 0) -> dict[str, Any]:
    return {"type": "command", "cmd": cmd, "rc": rc, "out": list(out)}


@pytest.fixture(scope="module")
def recording() -> dict[str, Any]:
    """What one of our kernels did."""
    kernel = Kernel.load()
    sequence = [snapshot_entry(kernel, "before"), command("insmod own_a.ko")]
    kernel.modprobe("builtin:own_a.ko")
    sequence += [snapshot_entry(kernel, "patched"), command("cat /proc/cmdline", "own A")]
    sequence += [command(f"echo 0 > {ENABLED}"), command("gone own_a"), command("rmmod own_a")]
    kernel.write(ENABLED, "0")
    kernel.rmmod("own_a")
    return {
        "meta": {"kernel": "built-in", "cmdline": "", "base_cpu": "qemu64", "base_smp": 1},
        "symbols": {"klp_ftrace_handler": "0xffffffff81001000"},
        "sequence": [*sequence, snapshot_entry(kernel, "after")],
        "dmesg": kernel.log,
    }


def replay(folder: Path, recording: dict[str, Any], *options: str) -> Any:
    path = folder / "recording.json"
    path.write_text(json.dumps(recording))
    return klpemu("replay", str(path), "--kernel", "builtin:kernel.o", *options)


def test_the_same_is_status_0(tmp_path: Path, recording: dict[str, Any]) -> None:
    outcome = replay(tmp_path, recording)
    assert (outcome.status, outcome.err) == (0, ""), outcome.out
    assert outcome.out.splitlines()[-1].endswith("facts in 9 steps compared: all the same")


def test_a_difference_is_status_1_and_shown_as_expected_and_found(
    tmp_path: Path, recording: dict[str, Any]
) -> None:
    changed = json.loads(json.dumps(recording))
    changed["sequence"][3]["out"] = ["own B"]
    outcome = replay(tmp_path, changed)
    assert outcome.status == 1
    lines = outcome.out.splitlines()
    at = lines.index("cat /proc/cmdline  2 facts")
    assert lines[at + 1 : at + 4] == ["  line 1", "    expected  own B", "    found     own A"]
    assert lines[-1].endswith(" 1 differ")


def test_json_has_each_step_with_its_differences(tmp_path: Path, recording: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(recording))
    changed["sequence"][1]["rc"] = 1
    outcome = replay(tmp_path, changed, "--json")
    assert outcome.status == 1
    found = outcome.object
    assert (found["verb"], found["holds"], found["same_build"]) == ("replay", False, False)
    assert [each["step"] for each in found["steps"] if each["differences"]] == ["insmod own_a.ko"]
    assert found["steps"][1]["differences"] == [{"what": "exit status", "expected": "1", "found": "0"}]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (command("reboot now"), "sequence[8]: 'reboot now' cannot be replayed"),
        (command("insmod own_x.ko"), "there is no module 'own_x.ko'; --modules DIR says where"),
        (command("task holder"), "sequence[8]: 'task holder' has printed nothing"),
    ],
)
def test_what_cannot_be_replayed_is_said_before_anything_runs(
    tmp_path: Path, recording: dict[str, Any], entry: dict[str, Any], said: str
) -> None:
    outcome = replay(tmp_path, recording | {"sequence": [*recording["sequence"], entry]})
    assert outcome.status == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert "insmod own_a.ko" not in outcome.out


@pytest.mark.parametrize(("key", "value"), [("base_cpu", "i386"), ("base_smp", 0), ("base_smp", 1000)])
def test_a_machine_that_cannot_be_emulated_is_bad_input(
    tmp_path: Path, recording: dict[str, Any], key: str, value: Any
) -> None:
    outcome = replay(tmp_path, recording | {"meta": recording["meta"] | {key: value}})
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)


def test_a_cpu_that_is_given_stands_in_for_the_recorded_one(
    tmp_path: Path, recording: dict[str, Any]
) -> None:
    meta = recording["meta"] | {"base_cpu": "i386"}
    assert replay(tmp_path, recording | {"meta": meta}, "--cpu", "skylake").status == 0


def test_a_task_that_nothing_holds_is_a_difference(tmp_path: Path, recording: dict[str, Any]) -> None:
    looked = command(
        "task holder_x", "patch_state=-1 wchan=msleep stack=msleep+0x29/0x40", "other+0x5/0x9 [own_x]"
    )
    outcome = replay(tmp_path, recording | {"sequence": [looked], "dmesg": []})
    assert outcome.status == 1
    assert outcome.out.count("found     (nothing)") == 4


def test_a_held_task_sleeps_where_it_was_seen_and_goes_on_when_the_patch_cannot_go_otherwise(
    tmp_path: Path, recording: dict[str, Any]
) -> None:
    sequence = recording["sequence"]
    stack = ["own_a_cmdline_proc_show+0x5f/0xfd0 [own_a]", "seq_read_iter+0x122/0x450"]
    looked = command("task holder_1 x", "patch_state=-1 wchan=msleep stack=msleep+0x29/0x40", *stack)
    held = [
        *sequence[1:3],
        looked,
        command("cat /proc/cmdline", "own A"),
        command(f"echo 0 > {ENABLED}"),
        command("cat /sys/kernel/livepatch/own_a/transition", "1"),
        command("gone own_a"),
        command("rmmod own_a"),
    ]
    outcome = replay(tmp_path, recording | {"sequence": held, "dmesg": []})
    assert outcome.status == 0, outcome.out
