"""What all tests share: the stock kernel, or the reason for its absence, and the built fixtures."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from klpemu import stock_kernel as stock
from klpemu.stock_kernel import StockKernel

TESTS = Path(__file__).resolve().parent


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
def fixtures_dir() -> Path:
    """The committed objects, fixtures/build."""
    return TESTS.parent / "fixtures" / "build"
