"""What a real kernel did, recorded command by command, is what the emulated one does.

recordings/qemu64-1.json is of Debian's 6.1.0-55-amd64 in QEMU.  With that very kernel the addresses and sizes
are compared, too; with a later one only what another build has in common.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from klpemu import Kernel
from klpemu import stock_kernel as stock
from klpemu.livepatch_modules import LivepatchModules
from klpemu.module_tree import ModuleTree
from klpemu.recording import read_recording
from klpemu.replay import Difference, Replay
from klpemu.stock_kernel import StockKernel

RECORDINGS = Path(__file__).parent / "recordings"
QEMU64 = RECORDINGS / "qemu64-1.json"


def replayed(
    path: Path,
    stock_kernel: StockKernel,
    modules: LivepatchModules,
    handler: str = "kernel",
    cpu: str = "",
    cpus: int = 0,
    same_build: bool | None = None,
) -> dict[str, list[Difference]]:
    """The steps that differ, by name, and each one's differences."""
    recording = read_recording(path)
    kernel = Kernel.load(
        stock_kernel.vmlinuz,
        handler=handler,
        cpus=cpus or recording.cpus,
        cpu=cpu or recording.cpu,
        command_line=recording.boot_line,
    )
    tree = ModuleTree([modules.directory], stock_kernel.release)
    replay = Replay(recording, kernel, tree, own_handler=handler == "own")
    assert same_build in (None, replay.same_build)
    steps = list(replay.steps())
    assert len(steps) == len(recording.sequence) + 2
    assert all(each.compared for each in steps)
    assert kernel.machine.modules.objects.keys() == {""}
    kernel.verify("replayed").raise_for_findings()
    return {each.name: each.differences for each in steps if each.differences}


@pytest.mark.parametrize("path", sorted(RECORDINGS.glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.parametrize("handler", ["kernel", "own"])
def test_what_the_real_kernel_did_is_what_we_do(
    handler: str, path: Path, stock_kernel: StockKernel, livepatch_modules: LivepatchModules
) -> None:
    assert replayed(path, stock_kernel, livepatch_modules, handler) == {}


def test_on_the_very_kernel_that_was_recorded_addresses_and_sizes_are_the_same(
    livepatch_modules: LivepatchModules,
) -> None:
    recorded = stock.find("6.1.0-55-amd64")
    if recorded is None:
        pytest.skip("6.1.0-55-amd64 is not in the cache")
    assert replayed(QEMU64, recorded, livepatch_modules, same_build=True) == {}


def test_two_vcpus_do_the_same(stock_kernel: StockKernel, livepatch_modules: LivepatchModules) -> None:
    assert replayed(QEMU64, stock_kernel, livepatch_modules, cpus=2) == {}


def test_a_cpu_that_needs_return_thunks_differs_in_the_return_of_each_trampoline_and_nothing_else(
    stock_kernel: StockKernel, livepatch_modules: LivepatchModules
) -> None:
    steps = replayed(QEMU64, stock_kernel, livepatch_modules, cpu="zen2")
    assert "snapshot 01_sample_after_insmod" in steps
    for name, differences in steps.items():
        assert name.startswith("snapshot ")
        for each in differences:
            assert each.what.endswith("_proc_show trampoline")
            assert each.expected.endswith("c3cc000000")
            assert each.found == each.expected.removesuffix("c3cc000000") + "e9<srso_return_thunk>"


@pytest.mark.parametrize("cpu", ["zen2", "tiger-lake"])
@pytest.mark.parametrize("handler", ["kernel", "own"])
def test_a_trampoline_that_returns_through_a_thunk_breaks_no_invariant(
    stock_kernel: StockKernel, handler: str, cpu: str
) -> None:
    kernel = Kernel.load(stock_kernel.vmlinuz, handler=handler, cpu=cpu)
    kernel.modprobe("builtin:own_a.ko")
    assert kernel.read("/proc/cmdline") == "own A\n"
    kernel.verify("patched").raise_for_findings()


# What is changed in the recording, and as what that is told: place, old and new text; step and fact.
CHANGES = [
    ("0/sites/meminfo_proc_show/bytes16", "0f1f440000", "0f1f440001", "meminfo_proc_show site"),
    ("2/sites/cmdline_proc_show/bytes16", "e85b8a", "e85c8a", "cmdline_proc_show site"),
    ("4/out/0", "this has", "that has", "line 1"),
    ("5/sites/cmdline_proc_show/tramp_bytes", "4889ea", "4889eb", "cmdline_proc_show trampoline"),
    ("8/sites/livepatch_cmdline_proc_show/kind", "nop5", "call", "livepatch_cmdline_proc_show kind"),
    ("14/sites/cmdline_proc_show/fops/flags", "0x11843", "0x11841", "cmdline_proc_show ops"),
    ("14/sites/cmdline_proc_show/ops_ptr_off", 199, 191, "cmdline_proc_show ops_ptr_off"),
    ("18/sites/cmdline_proc_show/func_stack/1/new_sym", "own_a", "own_b", "cmdline_proc_show func_stack 2"),
    ("18/sites/cmdline_proc_show/func_stack/0/old_func", "05a0", "05b0", "cmdline_proc_show func_stack 1"),
    ("20/livepatch/own_b/transition", "0", "1", "/sys/kernel/livepatch/own_b/transition"),
    ("21/out/0", "patch_state=-1", "patch_state=0", "patch_state"),
    ("23/sites/cmdline_proc_show/func_stack/0/nop", 1, 0, "cmdline_proc_show func_stack 1"),
    ("23/enabled_functions/1", "(1)   I", "(2) R I", "enabled_functions 2"),
    ("24/out/1", "own_b_cmdline", "own_a_cmdline", "stack 2"),
    ("27/out/0", "1", "0", "line 1"),
    ("36/rc", 1, 0, "exit status"),
    ("38/modules", "own_c 16384 1", "own_c 16384 2", "/proc/modules 1"),
]


def test_each_change_of_a_recording_is_told_and_nothing_else(
    tmp_path: Path, stock_kernel: StockKernel, livepatch_modules: LivepatchModules
) -> None:
    recording = json.loads(QEMU64.read_text())
    sequence = recording["sequence"]
    expected = set()
    for place, old, new, what in CHANGES:
        change(sequence, place.split("/"), old, new)
        entry = sequence[int(place.partition("/")[0])]
        expected.add((entry.get("cmd") or f"snapshot {entry['label']}", what))
    change(recording["dmesg"], ["62"], "from patching", "from unpatching")
    change(recording["poke_phases"], ["8", "after"], "e85b8adf3e", "e85b8adf3f")
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(recording))
    steps = replayed(path, stock_kernel, livepatch_modules)
    log, pokes = steps.pop("log"), steps.pop("poke_phases")
    assert {(name, each.what) for name, each_of in steps.items() for each in each_of} == expected
    assert [(each.expected, each.found) for each in log] == [
        (
            "livepatch: 'own_c': reversing transition from unpatching to unpatching",
            "livepatch: 'own_c': reversing transition from patching to unpatching",
        )
    ]
    assert [each.found for each in pokes] == [
        "enable cmdline_proc_show phase 3: cc -> ftrace_trampoline becomes e8 -> ftrace_trampoline"
    ]


def change(owner: Any, keys: list[str], old: str | int, new: str | int) -> None:
    """Replace a number, or a part of a text, at a place in parsed JSON."""
    *above, last = [int(key) if key.isdigit() else key for key in keys]
    for key in above:
        owner = owner[key]
    if isinstance(old, str):
        assert owner[last].count(old) >= 1
        owner[last] = owner[last].replace(old, str(new), 1)
    else:
        assert owner[last] == old
        owner[last] = new


def test_a_task_that_was_held_for_longer_than_signals_take_is_held_until_they_have_gone_out(
    tmp_path: Path, stock_kernel: StockKernel, livepatch_modules: LivepatchModules
) -> None:
    recording = json.loads(QEMU64.read_text())
    log = recording["dmesg"]
    at = log.index("ORACLE: rmmod own_b rc=1 rmmod: ERROR: Module own_b is in use")
    log.insert(at + 1, "livepatch: signaling remaining tasks")
    path = tmp_path / "signals.json"
    path.write_text(json.dumps(recording))
    assert replayed(path, stock_kernel, livepatch_modules) == {}


def test_what_never_comes_is_a_difference_and_not_waited_for_for_ever(
    tmp_path: Path, stock_kernel: StockKernel, livepatch_modules: LivepatchModules
) -> None:
    recording = json.loads(QEMU64.read_text())
    recording["sequence"] = [
        {"type": "command", "cmd": "insmod own_a.ko", "rc": 0, "out": []},
        {"type": "command", "cmd": "gone own_a", "rc": 0, "out": []},
    ]
    path = tmp_path / "never.json"
    path.write_text(json.dumps(recording | {"dmesg": [], "poke_phases": []}))
    read = read_recording(path)
    kernel = Kernel.load(stock_kernel.vmlinuz)
    steps = list(Replay(read, kernel, ModuleTree([], "")).steps())
    assert [each.differences for each in steps] == [[], [Difference("exit status", "0", "1")]]
