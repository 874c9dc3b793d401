"""On the stock image what was judged is remembered, and whatever changes in its 23 MB of text is seen."""

import pytest

from klpemu import Kernel
from klpemu.fixtures import locate
from klpemu.stock_kernel import StockKernel
from patches.invariants.finding import Report
from patches.invariants.verify import verify

PATCH = "stock:test_klp_livepatch.ko"


@pytest.fixture(scope="module")
def kernel(stock_kernel: StockKernel) -> Kernel:
    return Kernel.load(locate("stock:vmlinuz"))


def same(kernel: Kernel) -> Report:
    """What is found with remembering, which must be what is found without."""
    remembered = kernel.verify_what_changed()
    full = kernel.verify()
    assert remembered == full
    return full


def test_patched_and_unpatched_the_same_is_found(kernel: Kernel) -> None:
    for _ in range(2):
        assert same(kernel).holds
        kernel.insmod(locate(PATCH))
        assert same(kernel).holds
        kernel.disable("test_klp_livepatch")
        assert same(kernel).holds


def test_a_byte_of_text_is_seen_whoever_has_written_it(kernel: Kernel) -> None:
    space = kernel.machine.space
    for name in ("schedule", "vfs_read", "linux_banner"):
        address = kernel.machine.symbol(name) + 9
        (before,) = space.read(address, 1)
        physical = space.physical(address)
        assert same(kernel).holds
        space.arena.bytes[physical] ^= 1
        assert [each.invariant for each in same(kernel).findings] == ["text_matches_records"]
        space.arena.bytes[physical] = before
        assert same(kernel).holds


def test_text_that_nobody_wrote_is_not_compared_again(kernel: Kernel) -> None:
    kernel.verify_what_changed()
    judged: list[object] = []
    subject = kernel.remembering(kernel.subject())
    inner = kernel.remembered._within
    kernel.remembered._within = lambda reading, *call: judged.append(call) or inner(reading, *call)  # type: ignore[method-assign,func-returns-value]  # only counts
    try:
        assert verify(subject, "", kernel.remembered).holds
    finally:
        del kernel.remembered._within  # type: ignore[method-assign]  # the class's own again
    assert len(judged) <= 2, "all but what says which state ftrace is in"
