"""A fixture kernel for each test, and raw access to its memory."""

import pytest
from livepatches import Raw, fix_area, fix_area2

from klpemu import Kernel


@pytest.fixture
def kernel() -> Kernel:
    """The built-in kernel, nothing patched."""
    return Kernel.load()


@pytest.fixture
def stacked(kernel: Kernel) -> Kernel:
    """Two versions of area_of and perimeter_of: fix_area2 on top of fix_area."""
    kernel.enable(fix_area())
    kernel.enable(fix_area2())
    return kernel


@pytest.fixture
def raw(kernel: Kernel) -> Raw:
    """Raw access to the kernel of this test."""
    return Raw(kernel)
