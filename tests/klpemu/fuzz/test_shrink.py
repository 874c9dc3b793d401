"""Making a sequence small, judged on tests that need no kernel."""

from hypothesis import given
from hypothesis import strategies as st

from klpemu.fuzz.shrink import preemptions, shrunk
from klpemu.scenario import Action, Step

ENABLE, DISABLE = Step(Action.ENABLE, "fix_area"), Step(Action.DISABLE, "fix_area")
NOISE = [Step(Action.RUN, "2000 ms", msecs=2000), Step(Action.SPAWN, "caller"), Step(Action.FORCE, "other")]


def is_in_order(wanted: list[Step], steps: list[Step]) -> bool:
    rest = iter(steps)
    return all(any(each == other for other in rest) for each in wanted)


@given(st.lists(st.sampled_from([*NOISE, ENABLE, DISABLE]), max_size=20), st.integers(0, 20))
def test_what_is_left_is_needed_and_nothing_else_is_left(noise: list[Step], at: int) -> None:
    steps = [*noise[:at], ENABLE, *noise[at:], DISABLE]
    wanted = [ENABLE, DISABLE]
    assert shrunk(steps, lambda candidate: is_in_order(wanted, candidate)) == wanted


@given(
    st.lists(st.tuples(st.sampled_from(["init", "caller", "swapper/0"]), st.integers(1, 120)), max_size=30),
    st.integers(1, 120),
    st.integers(0, 30),
)
def test_of_a_schedule_only_the_turns_that_matter_are_left(
    turns: list[tuple[str, int]], least: int, at: int
) -> None:
    schedule = (*turns[:at], ("caller", 120), *turns[at:], ("init", 10_000), ("init", 10_000))

    def fails(steps: list[Step]) -> bool:
        names = [
            name for each in steps for name, count in each.schedule if name != "caller" or count >= least
        ]
        return "caller" in names and "init" in names[names.index("caller") :]

    (left,) = shrunk([Step(Action.ENABLE, "fix_area", schedule=schedule), *NOISE], fails)
    assert [turn[0] for turn, _ in preemptions(left)] == ["caller", "init"]
    assert left.schedule[0] == ("caller", least)
    assert len(left.schedule) == 2


def test_less_time_goes_by_and_no_allocation_fails_without_need() -> None:
    steps = [Step(Action.RUN, "20000 ms", msecs=20_000), Step(Action.ENABLE, "fix_area", fail_alloc="nop")]
    run, enable = shrunk(
        steps, lambda steps: len(steps) == 2 and (steps[0].msecs or 0) >= 100 and steps[1] is not None
    )
    assert (run.msecs, run.target) == (100, "100 ms")
    assert not enable.fail_alloc
