"""Random sequences with the kernel's own livepatch modules on its own image, all checked after each step."""

import random
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from klpemu import Kernel
from klpemu.fixtures import fixture, locate
from klpemu.ftrace_users import FtraceUsers
from klpemu.fuzz.corpus import Corpus
from klpemu.fuzz.grammar import Grammar
from klpemu.fuzz.replay import replayed
from klpemu.fuzz.search import Found, Search
from klpemu.fuzz.sequence_runner import SequenceRunner
from klpemu.fuzz.world import world_of
from klpemu.livepatch_modules import LivepatchModules
from klpemu.scenario import Action, Scenario, Step
from klpemu.scenario_file import read_scenario
from klpemu.stock_kernel import cache_directory
from patches.variants import variants

WORLD = "fuzz-stock.toml"
ALL = 10_000
REFUSE = "/sys/module/test_klp_callbacks_demo/parameters/pre_patch_ret"
WAIT = Step(Action.RUN, "2000 ms", msecs=2000)


def world(*variants: str) -> Scenario:
    return replace(read_scenario(fixture(WORLD)), variants=variants)


def modprobe(name: str, parameters: str = "") -> Step:
    return Step(Action.MODPROBE, f"stock:{name}.ko", parameters=parameters)


@pytest.fixture(scope="module")
def runner(livepatch_modules: LivepatchModules) -> SequenceRunner:
    return SequenceRunner(world())


def events(runner: SequenceRunner) -> list[object]:
    return [*runner._stepper.kernel.machine.events]


def campaign(folder: Path, seed: int, runs: int) -> tuple[Search, list[Found]]:
    search = Search(world(), Corpus(folder), seed)
    return search, [found for found in (search.advance() for _ in range(runs)) if found is not None]


def test_a_campaign_finds_nothing_and_neither_does_an_entry_alone(
    livepatch_modules: LivepatchModules, tmp_path: Path
) -> None:
    search, found = campaign(tmp_path, seed=1, runs=50)
    assert [each.what for each in found] == []
    assert search.tally.executed > 50
    assert search.tally.entries > 20  # it gets somewhere
    entry = max(sorted((tmp_path / "entries").glob("*.toml")), key=lambda path: len(path.read_text()))
    assert replayed(read_scenario(entry)) == []
    written = "".join(each.read_text() for each in (tmp_path / "entries").glob("*.toml"))
    assert 'kernel = "stock:vmlinuz"' in written
    assert str(cache_directory()) not in written, "who has another cache can perform them, too"


@pytest.mark.slow
def test_ten_thousand_sequences_find_nothing(
    livepatch_modules: LivepatchModules, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    began = time.process_time()
    search, found = campaign(tmp_path, seed=4, runs=ALL)
    seconds = time.process_time() - began
    tally = search.tally
    figures = f"{tally.runs} runs, {tally.steps} steps, {tally.executed} of them executed"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{figures}, {len(tally.reached)} reached, {seconds:.0f} s of CPU, {peak} MiB")
    record_property("figures", figures)
    assert [each.what for each in found] == []


def test_a_run_in_the_middle_of_many_is_the_run_alone(runner: SequenceRunner) -> None:
    grammar, random_ = Grammar(runner.world), random.Random(5)
    sequences = [grammar.sequence(random_, 8) for _ in range(7)]
    sequences.append([modprobe("livepatch-shadow-mod"), modprobe("livepatch-shadow-fix1"), WAIT])
    together = []
    for each in sequences:
        run = runner.run(each)
        together.append((run, events(runner)))
    alone = SequenceRunner(runner.world)
    assert (alone.run(sequences[-1]), events(alone)) == together[-1]
    for each, expected in zip(sequences, together, strict=True):
        assert (runner.run(each), events(runner)) == expected


def test_a_sequence_loads_uses_replaces_disables_and_removes(runner: SequenceRunner) -> None:
    steps = [
        modprobe("test_klp_livepatch"),
        WAIT,
        Step(Action.READ, "/proc/cmdline"),
        modprobe("test_klp_atomic_replace", "replace=1"),
        WAIT,
        Step(Action.RMMOD, "test_klp_livepatch"),
        Step(Action.DISABLE, "test_klp_atomic_replace"),
        WAIT,
        Step(Action.RMMOD, "test_klp_atomic_replace"),
    ]
    run = runner.run(steps, thorough=True)
    assert [each.error for each in run.steps] == [""] * len(steps)
    assert not run.findings


@pytest.mark.parametrize(
    ("bug", "invariant", "steps"),
    [
        (
            "nops-for-ever",
            "func_stacks_hold_the_patches",
            [modprobe("test_klp_livepatch"), WAIT, modprobe("test_klp_atomic_replace", "replace=1"), WAIT],
        ),
        (
            "stale-obj-mod",
            "objects_know_their_modules",
            [
                modprobe("test_klp_callbacks_demo"),
                WAIT,
                Step(Action.WRITE, REFUSE, value="-19"),
                modprobe("test_klp_callbacks_mod"),
            ],
        ),
    ],
)
def test_a_bug_of_the_museum_is_a_finding(
    livepatch_modules: LivepatchModules, runner: SequenceRunner, bug: str, invariant: str, steps: list[Step]
) -> None:
    assert not runner.run(steps).findings
    with variants([f"museum:{bug}"]):
        run = SequenceRunner(world()).run(steps)
    assert run.signature == invariant


def test_a_campaign_finds_a_bug_of_the_museum(livepatch_modules: LivepatchModules, tmp_path: Path) -> None:
    buggy = world("museum:missing-sync")
    with variants(buggy.variants):
        search = Search(buggy, Corpus(tmp_path), 0)
        found = next(found for found in (search.advance() for _ in range(60)) if found is not None)
    assert found.signature == "every_fetch_is_an_instruction"
    (path,) = (tmp_path / "findings").glob("*.toml")
    reported = read_scenario(path)
    assert len(reported.steps) <= 2
    assert replayed(reported)


def test_modules_and_patches_of_the_command_line_make_a_world_on_the_image(
    livepatch_modules: LivepatchModules, tmp_path: Path
) -> None:
    patches = [f"stock:{name}.ko" for name in ("test_klp_livepatch", "test_klp_atomic_replace")]
    module = locate("stock:test_klp_callbacks_mod.ko")
    given = world_of(None, locate("stock:vmlinuz"), None, "qemu64", [module], patches, [])
    search = Search(given, Corpus(tmp_path), 1)
    assert [search.advance() for _ in range(5)] == [None] * 5


def test_a_tracer_is_called_beside_a_livepatch_of_the_image(livepatch_modules: LivepatchModules) -> None:
    kernel = Kernel.load(locate("stock:vmlinuz"), observe=True)
    users = FtraceUsers(kernel)
    users.register("first", ["cmdline_proc_show"])
    kernel.read("/proc/cmdline")
    kernel.modprobe(locate("stock:test_klp_livepatch.ko"))
    assert "live patched" in kernel.read("/proc/cmdline")
    ops = users._ops["first"]
    assert int.from_bytes(kernel.machine.space.read(ops.private, 8), "little") == 2
    kernel.verify().raise_for_findings()
    users.unregister("first")
    kernel.read("/proc/cmdline")
    kernel.verify().raise_for_findings()
