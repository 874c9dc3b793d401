"""The kernel's own livepatch modules, loaded, used, disabled and removed.

The test modules are driven by the kernel's own selftests, the scripts of tools/testing/selftests/livepatch/,
which compare the log with what they expect, line by line.  The samples have no such scripts: what they log is
compared with the formats in their sources.
"""

import re
from collections.abc import Callable, Iterator

import pytest
from selftest_shell import SelftestShell

from klpemu import Kernel
from klpemu.livepatch_modules import LivepatchModules
from klpemu.stock_kernel import StockKernel

# How many tests each script has in 6.1; one more or less is no error of ours, but worth a look.
SCRIPTS = {
    "test-livepatch.sh": 3,
    "test-callbacks.sh": 11,
    "test-shadow-vars.sh": 1,
    "test-state.sh": 4,
    "test-ftrace.sh": 1,
    "test-sysfs.sh": 2,
}


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    """The built-in kernel, which must be as it was in the end."""
    yield from as_it_was(Kernel.load())


@pytest.fixture
def stock(stock_kernel: StockKernel) -> Iterator[Kernel]:
    """The stock kernel's own image, likewise."""
    yield from as_it_was(Kernel.load(stock_kernel.vmlinuz))


def as_it_was(kernel: Kernel) -> Iterator[Kernel]:
    """Hand a kernel out; when it comes back no module, no finding and no byte of text may be different."""
    text = [kernel.machine.space.read(each.address, len(each.contents)) for each in kernel.subject().texts]
    yield kernel
    assert [name for name in kernel.machine.modules.objects if name] == []
    kernel.verify("removed").raise_for_findings()
    assert kernel.machine.warnings == []
    assert text == [
        kernel.machine.space.read(each.address, len(each.contents)) for each in kernel.subject().texts
    ]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_kernels_selftest_passes(
    script: str, kernel: Kernel, livepatch_modules: LivepatchModules
) -> None:
    run_selftest(script, kernel, livepatch_modules)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_kernels_selftest_passes_on_the_stock_image(
    script: str, stock: Kernel, livepatch_modules: LivepatchModules
) -> None:
    run_selftest(script, stock, livepatch_modules)


def run_selftest(script: str, kernel: Kernel, livepatch_modules: LivepatchModules) -> None:
    """Every test of the script says ok, and the script nothing else."""
    done = SelftestShell(kernel, livepatch_modules).run(script)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert re.findall(r"^TEST: .* \.\.\. (.*)$", done.stdout, re.MULTILINE) == ["ok"] * SCRIPTS[script]


class Samples:
    """The samples on one kernel, and what they have logged."""

    def __init__(self, kernel: Kernel, modules: LivepatchModules) -> None:
        self.kernel = kernel
        self.modules = modules

    def modprobe(self, name: str, parameters: str = "") -> list[str]:
        return self._logged(lambda: self.kernel.modprobe(self.modules.samples[name], parameters))

    def rmmod(self, name: str) -> list[str]:
        return self._logged(lambda: self.kernel.rmmod(name))

    def disable(self, name: str) -> list[str]:
        """Write 0 to `enabled`, and wait until the patch is gone."""

        def disable() -> None:
            self.kernel.write(f"/sys/kernel/livepatch/{name}/enabled", "0")
            for _ in range(100):
                if name not in self.kernel.machine.kernfs.listdir("/sys/kernel/livepatch"):
                    return
                self.kernel.tasks.run(100)
            raise AssertionError(f"{name} is still there")

        return self._logged(disable)

    def run(self, seconds: int) -> list[str]:
        return self._logged(lambda: self.kernel.tasks.run(seconds * 1000))

    def _logged(self, do: Callable[[], object]) -> list[str]:
        """The lines that are not livepatch's own; all of them must be in the source of a sample."""
        before = len(self.kernel.log)
        do()
        lines = [line for line in self.kernel.log[before:] if not line.startswith("livepatch: ")]
        formats = [each for name in self.modules.samples for each in formats_of(self.modules, name)]
        assert [line for line in lines if not any(each.fullmatch(line) for each in formats)] == []
        return lines


def formats_of(modules: LivepatchModules, name: str) -> Iterator[re.Pattern[str]]:
    """What the pr_info() calls in a source can print."""
    source = modules.source(name)
    prefix = f"{name}: " if "#define pr_fmt" in source else ""
    conversions = {"%p": "[0-9a-f]{16}", "%lx": "[0-9a-f]+", "%d": r"-?\d+", "%s": ".*"}
    for text in re.findall(r'pr_\w+\("(.*)\\n"', source):
        parts = re.split("(%p|%lx|%d|%s)", prefix + text)
        yield re.compile("".join(conversions.get(part) or re.escape(part) for part in parts))


@pytest.fixture
def samples(kernel: Kernel, livepatch_modules: LivepatchModules) -> Samples:
    return Samples(kernel, livepatch_modules)


def pointers(lines: list[str], pattern: str) -> list[str]:
    """What follows `dummy @` in the lines that contain a text."""
    return [line.split("dummy @ ")[1][:16] for line in lines if pattern in line]


def test_the_sample_replaces_the_command_line(samples: Samples) -> None:
    kernel = samples.kernel
    original = kernel.read("/proc/cmdline")
    samples.modprobe("livepatch_sample")
    assert kernel.read("/proc/cmdline") == "this has been live patched\n"
    kernel.verify("enabled").raise_for_findings()
    samples.disable("livepatch_sample")
    assert kernel.read("/proc/cmdline") == original
    samples.rmmod("livepatch_sample")


def test_the_callbacks_sample_calls_them_back_for_each_object(samples: Samples) -> None:
    demo, mod = "livepatch_callbacks_demo", "livepatch_callbacks_mod"
    live, coming = (
        "[MODULE_STATE_LIVE] Normal state",
        "[MODULE_STATE_COMING] Full formed, running module_init",
    )
    going = "[MODULE_STATE_GOING] Going away"
    assert samples.modprobe(mod) == [f"{mod}: livepatch_callbacks_mod_init"]
    assert samples.modprobe(demo) == [
        f"{demo}: {callback}_callback: {object_}"
        for callback in ("pre_patch", "post_patch")
        for object_ in ("vmlinux", f"{mod} -> {live}")
    ]
    assert samples.rmmod(mod) == [
        f"{mod}: livepatch_callbacks_mod_exit",
        f"{demo}: pre_unpatch_callback: {mod} -> {going}",
        f"{demo}: post_unpatch_callback: {mod} -> {going}",
    ]
    assert samples.modprobe(mod) == [
        f"{demo}: pre_patch_callback: {mod} -> {coming}",
        f"{demo}: post_patch_callback: {mod} -> {coming}",
        f"{mod}: livepatch_callbacks_mod_init",
    ]
    samples.kernel.verify("enabled").raise_for_findings()
    assert samples.disable(demo) == [
        f"{demo}: {callback}_callback: {object_}"
        for callback in ("pre_unpatch", "post_unpatch")
        for object_ in ("vmlinux", f"{mod} -> {live}")
    ]
    assert samples.rmmod(demo) == []
    samples.rmmod(mod)


def test_the_busy_module_stalls_the_transition_until_its_work_is_done(samples: Samples) -> None:
    demo, busy = "livepatch_callbacks_demo", "livepatch_callbacks_busymod"
    transition = f"/sys/kernel/livepatch/{demo}/transition"
    assert samples.modprobe(busy, "sleep_secs=30") + samples.run(1) == [
        f"{busy}: livepatch_callbacks_mod_init",
        f"{busy}: busymod_work_func, sleeping 30 seconds ...",
    ]
    samples.modprobe(demo)
    assert samples.kernel.read(transition) == "1\n"
    assert samples.run(28) == []
    assert samples.kernel.read(transition) == "1\n"
    samples.kernel.verify("in transition").raise_for_findings()
    assert samples.run(5)[0] == f"{busy}: busymod_work_func exit"
    assert samples.kernel.read(transition) == "0\n"
    samples.disable(demo)
    samples.rmmod(demo)
    assert samples.rmmod(busy) == [f"{busy}: livepatch_callbacks_mod_exit"]


def test_the_shadow_samples_leak_prevent_and_count(samples: Samples) -> None:
    """What the comment on top of livepatch-shadow-mod.c promises, over one minute."""
    mod, fix1, fix2 = "livepatch_shadow_mod", "livepatch_shadow_fix1", "livepatch_shadow_fix2"
    kernel = samples.kernel
    assert samples.modprobe(mod) == []
    lines = samples.run(10)
    unfixed = pointers(lines, "dummy_alloc: ")
    assert 8 <= len(unfixed) <= 10, "one a second"
    assert len([line for line in lines if line.startswith("cleanup_work_func: jiffies = ")]) == 3

    samples.modprobe(fix1)
    lines = samples.run(20)
    fixed = pointers(lines, f"{fix1}: livepatch_fix1_dummy_alloc: ")
    assert len(fixed) >= 17
    leaked = pointers(lines, " leaked!")
    assert set(leaked) <= set(unfixed), "they were allocated before the fix"
    assert set(pointers(lines, "prevented leak")) <= set(fixed)

    samples.modprobe(fix2)
    kernel.verify("both").raise_for_findings()
    lines = samples.run(20)
    assert set(pointers(lines, " leaked!")) | set(leaked) == set(unfixed)
    counts = [int(line.rsplit(" ", 1)[1]) for line in lines if "check counter = " in line]
    assert counts
    assert max(counts) == 5, "looked at every 3 seconds for 12 and until the next"
    assert all(f"{fix2}: livepatch_fix2_dummy" in line for line in lines if "check counter" in line)

    samples.disable(fix2)
    samples.disable(fix1)
    samples.rmmod(fix2)
    rest = samples.rmmod(fix1)
    assert all("livepatch_fix1_dummy_leak_dtor: " in line and "prevented leak" in line for line in rest)
    assert rest, "its exit frees what the shadow variables still hold"
    freed = samples.rmmod(mod)
    assert len(pointers(freed, "dummy_free: ")) >= 10
    lines = samples.run(5)
    assert lines == [], "no work is left"
    # What was never attached to anything is lost; all else was given back.
    lost = [tag for _, tag in kernel.machine.slab.live.values() if " by " in tag]
    assert len(lost) == len(unfixed)


def test_nobody_is_in_a_module_whose_exit_function_waits_for_its_work(
    livepatch_modules: LivepatchModules,
) -> None:
    observed = Kernel.load(observe=True)
    samples = Samples(observed, livepatch_modules)
    samples.modprobe("livepatch_callbacks_busymod", "sleep_secs=3")
    busy = "livepatch_callbacks_busymod: busymod_work_func"
    assert samples.rmmod("livepatch_callbacks_busymod") == [
        f"{busy} exit",
        "livepatch_callbacks_busymod: livepatch_callbacks_mod_exit",
    ]
    observed.verify("removed").raise_for_findings()
