"""Whatever byte of guest memory is damaged, verification comes to an end, says something, and changes
nothing.
"""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from livepatches import fix_area, fix_area2

from klpemu import Kernel
from patches.invariants.finding import Report

PAGE = 4096
STACKS = range(0xFFFF_C900_0000_0000, 0xFFFF_C910_0000_0000)


def pages(kernel: Kernel) -> Iterator[int]:
    """Every mapped page but those of stacks."""
    space = kernel.machine.space
    for page in sorted(space._frames):
        if page << 12 not in STACKS:
            yield page << 12


def contents(kernel: Kernel) -> dict[int, bytes]:
    return {page: kernel.machine.space.read(page, PAGE) for page in pages(kernel)}


@pytest.fixture(scope="module")
def damaged() -> Kernel:
    kernel = Kernel.load()
    kernel.enable(fix_area())
    kernel.enable(fix_area2())
    return kernel


@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_verification_survives_any_damage(damaged: Kernel, data: st.DataObject) -> None:
    kernel = damaged
    candidates = list(pages(kernel))
    where = st.tuples(st.sampled_from(candidates), st.integers(0, PAGE - 1), st.integers(1, 255))
    damage = {page + at: flip for page, at, flip in data.draw(st.lists(where, min_size=1, max_size=12))}
    check(kernel, damage)


@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_verification_survives_damage_of_what_it_reads(damaged: Kernel, data: st.DataObject) -> None:
    """Bytes of live objects and of the kernel's globals: most bytes of memory are nobody's."""
    kernel, symbols = damaged, damaged.machine.vmlinux.symbols
    globals_ = ("klp_patches", "klp_ops", "ftrace_ops_list", "ftrace_pages_start", "init_task", "modules")
    spans = [*((at, size) for at, (size, _) in kernel.machine.slab.live.items())]
    spans += [(symbols[name], 16) for name in globals_]
    spans += [(symbols["klp_ftrace_handler"], 0xD8), (symbols["ftrace_ops_trampoline_list"], 16)]
    span = st.sampled_from(spans).flatmap(
        lambda span: st.tuples(st.just(span[0]), st.integers(0, span[1] - 1), st.integers(1, 255))
    )
    drawn = data.draw(st.lists(span, min_size=1, max_size=6))
    check(kernel, {start + at: flip for start, at, flip in drawn})


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_verification_survives_pointers_that_lead_to_other_objects(
    damaged: Kernel, data: st.DataObject
) -> None:
    """A pointer replaced by another one makes circles and wrong types, which a flipped bit seldom does."""
    kernel, space = damaged, damaged.machine.space
    live = kernel.machine.slab.live
    words = [at + offset for at, (size, _) in live.items() for offset in range(0, size - 7, 8)]
    used = [at for at in words if int.from_bytes(space.read(at, 8), "little") >> 47]
    at, to = data.draw(st.sampled_from(used)), data.draw(st.sampled_from(words))
    before = space.read(at, 8)
    flips = bytes(a ^ b for a, b in zip(before, to.to_bytes(8, "little"), strict=True))
    check(kernel, {at + index: flip for index, flip in enumerate(flips) if flip})


def check(kernel: Kernel, damage: dict[int, int]) -> None:
    space = kernel.machine.space
    for address, flip in damage.items():
        space.write(address, bytes([space.read(address, 1)[0] ^ flip]))
    before = contents(kernel)
    try:
        report = kernel.verify("damaged")
        assert isinstance(report, Report)
        for finding in report.findings:
            assert str(finding).startswith("klpemu: damaged: ")
            finding.details()
        assert contents(kernel) == before
    finally:
        for address, flip in damage.items():
            space.write(address, bytes([space.read(address, 1)[0] ^ flip]))
    assert kernel.verify().holds, "with the damage mended everything holds again"
