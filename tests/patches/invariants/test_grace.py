"""Grace periods between taking an ops off the list and freeing it."""

import pytest
from livepatches import fix_area

from klpemu import Kernel
from klpemu.ftrace_users import FtraceUsers
from patches.invariants.grace import GRACE
from patches.variants import replaced


@pytest.fixture
def observed() -> Kernel:
    return Kernel.load(cpus=2, observe=True)


def come_and_go(kernel: Kernel) -> list[str]:
    """An ops of ftrace's and one of livepatch's; what was found."""
    users = FtraceUsers(kernel)
    users.register("first", ["area_of"])
    kernel.enable(fix_area())
    kernel.tasks.wait_for_transition()
    users.unregister("first")
    kernel.disable("fix_area")
    kernel.tasks.wait_for_transition()
    report = kernel.verify("now")
    assert report.checks[GRACE] >= 2
    return [each.what for each in report.findings if each.invariant == GRACE]


def test_an_ops_is_freed_after_a_grace_period(observed: Kernel) -> None:
    assert come_and_go(observed) == []


def test_an_ops_that_is_freed_at_once_is_found_though_nobody_is_in_the_way(observed: Kernel) -> None:
    with replaced(observed.machine.ftrace, "_synchronize", lambda what: None):
        (*_, what) = come_and_go(observed)
    assert "with no grace period since its ops was taken off ftrace_ops_list" in what
