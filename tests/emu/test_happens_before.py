"""Runs up to the order of steps that commute."""

from emu.footprint import Footprint
from emu.happens_before import HappensBefore


def _run(*steps: tuple[str, str, int]) -> int:
    """The state after steps of (task, "r" or "w", what)."""
    order = HappensBefore()
    for task, kind, what in steps:
        footprint = Footprint()
        (footprint.writes if kind == "w" else footprint.reads).add(what)
        order.step(task, footprint, 0)
    return order.state()


def test_steps_that_commute_come_to_the_same_in_either_order() -> None:
    assert _run(("a", "w", 1), ("b", "w", 2)) == _run(("b", "w", 2), ("a", "w", 1))
    assert _run(("a", "r", 1), ("b", "r", 1)) == _run(("b", "r", 1), ("a", "r", 1))


def test_steps_that_do_not_commute_come_to_different_states() -> None:
    assert _run(("a", "w", 1), ("b", "r", 1)) != _run(("b", "r", 1), ("a", "w", 1))
    assert _run(("a", "w", 1), ("b", "w", 1)) != _run(("b", "w", 1), ("a", "w", 1))


def test_what_was_read_before_a_write_still_matters_behind_it() -> None:
    before = [("a", "r", 1), ("b", "w", 1), ("c", "w", 1)]
    after = [("b", "w", 1), ("a", "r", 1), ("c", "w", 1)]
    assert _run(*before) != _run(*after)


def test_a_step_that_touches_everything_commutes_with_nothing() -> None:
    states = []
    for order_ in (("a", "everything"), ("everything", "a")):
        order = HappensBefore()
        for task in order_:
            footprint = Footprint()
            footprint.everything = task == "everything"
            order.step(task, footprint, 0)
        states.append(order.state())
    assert states[0] != states[1]


def test_the_jiffy_counts_for_a_step_that_looks_at_the_time_only() -> None:
    def state(now: int, *, looks: bool) -> int:
        order, footprint = HappensBefore(), Footprint()
        footprint.time = looks
        order.step("a", footprint, now)
        return order.state()

    assert state(1, looks=False) == state(2, looks=False)
    assert state(1, looks=True) != state(2, looks=True)
