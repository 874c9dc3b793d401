"""What all tests share: the stock kernel, or the reason for its absence, and the built fixtures.

Also the unwinder's points, which are counted over all tests and printed at the end.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from preemption import UnwinderPoints

from klpemu import stock_kernel as stock
from klpemu.livepatch_modules import LivepatchModules
from klpemu.stock_kernel import StockKernel

# How long an example takes says nothing about whether it is right.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

TESTS = Path(__file__).resolve().parent
POINTS = pytest.StashKey[UnwinderPoints]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[POINTS] = UnwinderPoints()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its counts to the process that prints."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["unwinder points"] = session.config.stash[POINTS].counts()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker has come to its end; one that crashed has handed over nothing."""
    output = getattr(node, "workeroutput", {})
    node.config.stash[POINTS].update(output.get("unwinder points", []))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line that no option hides: how many stacks were walked, and how many of them were unreliable."""
    points = terminalreporter.config.stash[POINTS]
    if points.walked:
        terminalreporter.write_line(points.line())


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Everything under tests/real/ is `real`, and what is `real` is skipped where there is no kernel."""
    why_not = stock.why_not()
    for item in items:
        if item.path.is_relative_to(TESTS / "real"):
            item.add_marker("real")
        if why_not and item.get_closest_marker("real"):
            item.add_marker(pytest.mark.skip(reason=why_not))


@pytest.fixture(scope="session")
def stock_kernel() -> StockKernel:
    """The newest stock Debian kernel in the cache; only for tests marked `real`."""
    kernel = stock.find()
    assert kernel is not None, "a test that uses stock_kernel must be marked real"
    return kernel


@pytest.fixture(scope="session")
def livepatch_modules(stock_kernel: StockKernel) -> LivepatchModules:
    """The kernel's own livepatch test modules and samples, built for the stock kernel; skips without them."""
    if why_not := stock_kernel.livepatch.why_not:
        pytest.skip(why_not)
    return stock_kernel.livepatch


@pytest.fixture(scope="session")
def points(pytestconfig: pytest.Config) -> UnwinderPoints:
    """Where tests count the stacks that they compare with the truth."""
    return pytestconfig.stash[POINTS]


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """The committed objects, fixtures/build."""
    return TESTS.parent / "fixtures" / "build"
