"""The machine most tests of this room start with."""

import pytest
from machines import boot

from emu.machine import Machine


@pytest.fixture
def machine() -> Machine:
    """A fresh machine with the fixture kernel and one vCPU."""
    return boot()
