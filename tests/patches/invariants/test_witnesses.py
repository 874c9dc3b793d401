"""What is judged while it happens: fetches of text, objects that are freed, patches that are replaced."""

from collections.abc import Iterator

import pytest
from livepatches import fix_area, fix_area2, fix_shapes

from emu.events import EventKind
from emu.machine import Machine
from emu.schedules import Directed
from klpemu import Func, Kernel, Patch
from klpemu.ftrace_users import FtraceUsers
from patches.invariants.fetches import FETCH
from patches.invariants.finding import Report
from patches.invariants.forced import PINS
from patches.invariants.reachable import IN_USE
from patches.invariants.replacement import STAY
from patches.variants import replaced

CALL = bytes.fromhex("e8fb2f003f")


@pytest.fixture
def waiting() -> Iterator[list[bool]]:
    """While its one element is False nobody waits: as if all grace periods and syncs had passed already."""
    synchronize, waits = Machine.synchronize, [True]

    def synchronize_if(machine: Machine, what: str) -> None:
        if waits[0]:
            synchronize(machine, what)

    with replaced(Machine, "synchronize", synchronize_if):
        yield waits


@pytest.fixture
def observed(waiting: list[bool]) -> Kernel:
    return Kernel.load(cpus=2, observe=True)


def what(report: Report, invariant: str) -> list[str]:
    return [each.what for each in report.findings if each.invariant == invariant]


def test_every_poke_is_judged_once_its_last_sync_is_over(observed: Kernel) -> None:
    observed.verify()
    observed.enable(fix_area())
    observed.tasks.wait_for_transition()
    report = observed.verify()
    # The call in each common trampoline, the sites of area_of and perimeter_of; and the trampolines again.
    assert report.checks[FETCH] >= 4
    assert report.holds
    assert observed.verify().checks[FETCH] == 0, "nothing was poked since"


def test_without_any_sync_what_is_fetched_is_not_safe(observed: Kernel, waiting: list[bool]) -> None:
    users = FtraceUsers(observed)
    waiting[0] = False
    users.register("counter", ["area_of"])
    waiting[0] = True
    users.register("other", ["perimeter_of"])
    assert "may fetch" in what(observed.verify(), FETCH)[0]


@pytest.mark.parametrize("synced", [True, False])
def test_a_tail_that_is_stored_first_belongs_to_the_same_change(observed: Kernel, synced: bool) -> None:
    """The change is judged once its first byte is there, and from the bytes before its first store."""
    (site, old), new, events = observed.site_of("area_of"), CALL, observed.machine.events
    for at, data in ((1, new[1:]), (0, new[:1])):
        before = observed.machine.space.read(site + at, len(data))
        observed.machine.space.write(site + at, data)
        events.record(EventKind.POKE, site + at, before, data, "by hand")
        if synced or at == 0:
            events.record(EventKind.SYNC, note="text_poke_sync")
    (finding,) = (each for each in observed.verify().findings if each.invariant == FETCH)
    assert finding.address == site
    assert finding.what.endswith(f"neither {old.hex(' ')} nor {new.hex(' ')} nor an int3")


def test_a_patch_that_is_replaced_is_counted_when_the_transition_is_over(observed: Kernel) -> None:
    observed.verify()
    for patch, transitions in ((fix_area(), 1), (fix_area2(), 1), (fix_shapes(), 1)):
        observed.enable(patch)
        observed.tasks.wait_for_transition()
        report = observed.verify()
        assert report.checks[STAY] == transitions
        assert what(report, STAY) == []


def test_a_force_pins_the_patch_that_is_removed_and_no_other(observed: Kernel) -> None:
    observed.tasks.spawn("sleeper", ["nap(60000)"], repeat=None)
    observed.enable(fix_area())
    observed.tasks.wait_for_transition()
    observed.enable(Patch("fix_steps", {"vmlinux": [Func("nap", "new_nap")]}, code="builtin:fix_steps.o"))
    observed.force("fix_steps")
    observed.tasks.wait_for_transition()
    observed.tasks.run(60_000)
    observed.disable("fix_steps")
    observed.force("fix_steps")
    report = observed.verify()
    assert (report.checks[PINS], what(report, PINS)) == (1, [])
    guest = observed.patches.found("fix_area").guest
    observed.machine.service("pin", lambda: setattr(guest, "forced", True))
    assert what(observed.verify(), PINS) == ["'fix_area' is pinned by a transition that does not remove it"]


@pytest.fixture
def stopped(waiting: list[bool]) -> Kernel:
    """A tracer alone on area_of, so with a trampoline, and a task that calls area_of for ever."""
    kernel = Kernel.load(cpus=2, observe=True)
    kernel.tasks.spawn("caller", ["many_calls(2000)"], cpu=1, repeat=None)
    return kernel


def in_the_trampoline(kernel: Kernel, name: str) -> bool:
    """Let the caller go on until it is in the function of that name."""
    machine = kernel.machine
    caller = next(task for task in machine.tasks if task.name == "caller")
    for _ in range(2000):
        machine.hub.advance(caller, 1)
        symbol = machine.kallsyms.at(caller.cpu.registers()["rip"])
        if symbol is not None and symbol.name == name:
            return True
    return False


@pytest.mark.parametrize("place", ["ftrace_trampoline", "trace_count"])
def test_a_trampoline_that_is_freed_under_a_task_is_reported(
    stopped: Kernel, waiting: list[bool], place: str
) -> None:
    """The task is in it, or returns into it from the callback."""
    users = FtraceUsers(stopped)
    users.register("counter", ["area_of"])
    assert in_the_trampoline(stopped, place)
    stopped.machine.hub.schedule = Directed([("init", 10_000)] * 20_000)
    waiting[0] = False
    users.unregister("counter")
    assert "a trampoline is freed while caller is in it" in what(stopped.verify(), IN_USE)


def test_whoever_waits_finds_nobody_in_the_trampoline(stopped: Kernel) -> None:
    users = FtraceUsers(stopped)
    users.register("counter", ["area_of"])
    assert in_the_trampoline(stopped, "ftrace_trampoline")
    users.unregister("counter")
    report = stopped.verify()
    assert what(report, IN_USE) == []
    assert report.checks[IN_USE] > 0
