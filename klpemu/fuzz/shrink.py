"""Making a sequence with a finding small: no step, no turn of a schedule that could be left out.

Delta debugging (Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", 2002) over the
steps, and then over the turns of each schedule, until nothing can be left out any more; numbers become as
small as they can be.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TypeVar

from klpemu.scenario import Action, Step

__all__ = ["preemptions", "shrunk"]

Item = TypeVar("Item")
Steps = list[Step]
_MSECS = (1, 4, 20, 100, 500, 2000)


def shrunk(steps: Sequence[Step], fails: Callable[[Steps], bool]) -> Steps:
    """The smallest sequence that was found for which `fails` still holds, as it does for `steps`.

    Leaving out any one of its steps, or any one turn or group of equal turns of its schedules, makes it pass.
    """
    found = list(steps)
    while True:
        before = list(found)
        found = _fewer(found, fails)
        for each in (_without_alloc, _without_schedule, _fewer_turns, _fewer_doors, _sooner):
            found = each(found, fails)
        if found == before:
            return found


def preemptions(step: Step) -> list[tuple[tuple[str, int], int]]:
    """The turns of a step's schedule, equal ones together with how many they are."""
    return [(turn, len(list(group))) for turn, group in groupby(step.schedule)]


def _fewer(items: list[Item], fails: Callable[[list[Item]], bool]) -> list[Item]:
    """ddmin: leave out half, a quarter, ... and at last single ones, until no single one can be."""
    size = max(1, len(items) // 2)
    while True:
        at, smaller = 0, False
        while at < len(items):
            candidate = items[:at] + items[at + size :]
            if fails(candidate):
                items, smaller = candidate, True
            else:
                at += size
        if size > 1:
            size //= 2
        elif not smaller:
            return items


def _each(steps: Steps, fails: Callable[[Steps], bool], simpler: Callable[[Step], Iterator[Step]]) -> Steps:
    """Replace each step by the first of its simpler forms that still fails."""
    for index in range(len(steps)):
        for form in simpler(steps[index]):
            candidate = [*steps[:index], form, *steps[index + 1 :]]
            if fails(candidate):
                steps = candidate
                break
    return steps


def _without_alloc(steps: Steps, fails: Callable[[Steps], bool]) -> Steps:
    return _each(steps, fails, lambda step: iter([replace(step, fail_alloc="")] if step.fail_alloc else []))


def _without_schedule(steps: Steps, fails: Callable[[Steps], bool]) -> Steps:
    return _each(steps, fails, lambda step: iter([replace(step, schedule=())] if step.schedule else []))


def _fewer_turns(steps: Steps, fails: Callable[[Steps], bool]) -> Steps:
    """Leave out whole groups of turns."""
    for index, step in enumerate(steps):
        if not step.schedule:
            continue

        def still(
            groups: list[tuple[tuple[str, int], int]], index: int = index, steps: Steps = steps
        ) -> bool:
            return fails(_with_schedule(steps, index, groups))

        steps = _with_schedule(steps, index, _fewer(preemptions(step), still))
    return steps


def _fewer_doors(steps: Steps, fails: Callable[[Steps], bool]) -> Steps:
    """In each group of turns as few turns, and of single ones as few instructions, as still fail."""
    for index in range(len(steps)):
        for at in range(len(preemptions(steps[index]))):
            groups = preemptions(steps[index])
            if at >= len(groups):
                break
            (name, instructions), times = groups[at]

            def still(
                smaller: int, steps: Steps = steps, index: int = index, at: int = at, times: int = times
            ) -> bool:
                groups = preemptions(steps[index])
                (name, instructions), _ = groups[at]
                groups[at] = ((name, instructions), smaller) if times > 1 else ((name, smaller), 1)
                return fails(_with_schedule(steps, index, groups))

            least = _least(times if times > 1 else instructions, still)
            groups[at] = ((name, instructions), least) if times > 1 else ((name, least), 1)
            steps = _with_schedule(steps, index, groups)
    return steps


def _least(most: int, still: Callable[[int], bool]) -> int:
    """A small number for which it still fails: by halves, then one by one."""
    step = most // 2
    while step:
        if most - step >= 1 and still(most - step):
            most -= step
            step = min(step, most // 2)
        else:
            step //= 2
    return most


def _sooner(steps: Steps, fails: Callable[[Steps], bool]) -> Steps:
    """Let less time go by."""

    def simpler(step: Step) -> Iterator[Step]:
        if step.action is Action.RUN and step.msecs is not None:
            for msecs in _MSECS:
                if msecs < step.msecs:
                    yield replace(step, target=f"{msecs} ms", msecs=msecs)

    return _each(steps, fails, simpler)


def _with_schedule(steps: Steps, index: int, groups: Sequence[tuple[tuple[str, int], int]]) -> Steps:
    schedule = tuple(turn for turn, times in groups for _ in range(times))
    return [*steps[:index], replace(steps[index], schedule=schedule), *steps[index + 1 :]]
