"""The schedule that forks: how its turns are written down."""

from klpemu.explorer import merged


def test_instructions_of_one_task_that_stay_in_the_guest_make_one_entry() -> None:
    turns = [("a", 1), ("a", 1), ("a", -1), ("a", 10_000), ("b", 1), ("a", 1), ("a", 1)]
    assert merged(turns) == (("a", 2), ("a", 1), ("a", 10_000), ("b", 1), ("a", 2))


def test_what_left_the_guest_is_an_entry_of_its_own() -> None:
    assert merged([("a", -1), ("a", -1), ("a", 1)]) == (("a", 1), ("a", 1), ("a", 1))
