"""The table of states that processes share."""

import os

from klpemu.explored_states import Counters, ExploredStates


def test_what_was_stored_is_found_with_as_many_preemptions_left_or_fewer() -> None:
    states = ExploredStates(2)
    states.store(77, [1.0, 5.0])
    assert states.find(77, 1) == [1.0, 5.0]
    assert states.find(77, 0) == [1.0]
    assert states.find(77, 2) is None
    assert states.find(78, 0) is None


def test_more_preemptions_take_the_place_of_fewer_and_not_the_other_way() -> None:
    states = ExploredStates(2)
    states.store(7, [1.0])
    states.store(7, [1.0, 2.0, 3.0])
    states.store(7, [1.0, 2.0])
    assert states.find(7, 2) == [1.0, 2.0, 3.0]
    assert len(states) == 1


def test_states_that_fall_on_one_place_are_kept_apart() -> None:
    states = ExploredStates(0)
    for number in (5, 5 + (1 << 20), 5 + (2 << 20)):
        states.store(number, [float(number)])
    assert states.find(5 + (1 << 20), 0) == [float(5 + (1 << 20))]
    assert states.find(5 + (3 << 20), 0) is None


def test_a_forked_process_adds_to_the_same_table_and_counts_in_the_same_counters() -> None:
    states, counters = ExploredStates(0), Counters("runs", "stop")
    child = os.fork()
    if child == 0:
        states.store(9, [3.0])
        counters["runs"] += 2
        os._exit(0)
    os.waitpid(child, 0)
    assert states.find(9, 0) == [3.0]
    assert (counters["runs"], counters["stop"]) == (2, 0)
