"""What a service forgets when a call returns, and what it must not forget."""

import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from emu.footprint import Footprint, Recorder
from emu.machine import Machine
from emu.same_state import SameState
from emu.tracked import Tracking
from emu.workqueue import Work
from klpemu.kernel import Kernel


@pytest.fixture
def machine() -> Machine:
    return Kernel.load(cpus=2).machine


@pytest.fixture
def seen(machine: Machine) -> Callable[[Callable[..., Any], int], int]:
    """What a service has seen that runs the function with a guest byte of that value."""
    recorder = Recorder(machine)
    tracking = Tracking(recorder)
    tracking.track(machine)
    same = SameState(machine, recorder, tracking)
    at = machine.symbol("klp_transition_patch")

    def run(function: Callable[..., Any], value: int, *caught: type[Exception]) -> int:
        module = types.ModuleType(__name__)
        module.called = function  # type: ignore[attr-defined]
        replaced: dict[int, tuple[Any, Any]] = {}
        same.returned_calls._wrap(module, replaced)
        called = replaced[id(function)][1] if replaced else function
        machine.log.lines.clear()
        machine.space.write(at, bytes([value]))
        footprint = Footprint()

        def body() -> None:
            with suppress(*caught):
                called(machine, [])

        with recorder.into(footprint):
            machine.service("test", body)
        return footprint.seen

    return run


def _byte(machine: Machine) -> int:
    return machine.shared.read(machine.symbol("klp_transition_patch"), 1)[0]


def test_two_ways_to_one_result_are_one(seen: Callable[..., int]) -> None:
    def is_small(machine: Machine, local: list[int]) -> bool:
        return _byte(machine) < 10

    assert seen(is_small, 1) == seen(is_small, 2) != seen(is_small, 11)


def test_a_new_object_that_is_returned_counts_by_what_it_holds(seen: Callable[..., int]) -> None:
    def halves(machine: Machine, local: list[int]) -> list[tuple[int, ...]]:
        return [(_byte(machine) // 2,)]

    assert seen(halves, 2) == seen(halves, 3) != seen(halves, 4)


def test_what_a_call_leaves_in_a_list_of_its_caller_is_kept(seen: Callable[..., int]) -> None:
    def fills(machine: Machine, local: list[int]) -> None:
        local.append(_byte(machine))

    assert seen(fills, 1) != seen(fills, 2)


def test_what_cannot_be_described_keeps_all_that_was_read(seen: Callable[..., int]) -> None:
    def later(machine: Machine, local: list[int]) -> Iterator[int]:
        byte = _byte(machine)
        return iter([byte])

    assert seen(later, 1) != seen(later, 2)


def test_an_exception_keeps_all_that_was_read(seen: Callable[..., int]) -> None:
    def fails(machine: Machine, local: list[int]) -> None:
        if _byte(machine):
            raise LookupError

    assert len({seen(fails, value, LookupError) for value in (0, 1, 2)}) == 3


def test_a_function_that_stores_to_a_variable_outside_keeps_all_that_was_read(
    seen: Callable[..., int],
) -> None:
    last = 0

    def remembers(machine: Machine, local: list[int]) -> None:
        nonlocal last
        last = _byte(machine)

    assert seen(remembers, 1) != seen(remembers, 2)
    assert last == 2


def test_an_object_that_others_can_change_is_not_its_contents(
    seen: Callable[..., int], machine: Machine
) -> None:
    def puts(machine: Machine, local: list[int]) -> Any:
        machine.log.lines.append(str(_byte(machine)))
        return machine.log.lines

    assert seen(puts, 1) == seen(puts, 2)  # the list was there before, and is part of the state


def test_an_object_that_others_have_met_since_is_not_told_by_what_it_holds(
    seen: Callable[..., int],
) -> None:
    def puts(machine: Machine, local: list[int]) -> Any:
        work = Work("test", _nothing)
        machine.workqueue.insert_work(work)
        _byte(machine)
        return work

    assert seen(puts, 1) != seen(puts, 2)


def _nothing() -> None:
    return
