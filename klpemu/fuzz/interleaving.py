"""In which order an operation and the tasks beside it go on: random, but rather such that two of them meet.

A schedule is a list of turns, each a task's name and how many instructions it may execute; a service that is
under way goes on to its next door in a turn, whatever the number (emu/schedules.py).
"""

import random
from collections.abc import Sequence
from typing import Final

from emu.timer import JIFFY_INSTRUCTIONS
from klpemu.scenario import Action

__all__ = ["Turn", "interleaved"]

Turn = tuple[str, int]

# Doors of the service of an operation, about: where it can be stopped.
DOORS: Final = {
    Action.ENABLE: 900,
    Action.MODPROBE: 600,
    Action.RUN: 300,
    Action.FTRACE: 180,
    Action.UNFTRACE: 180,
    Action.LOAD: 140,
    Action.DISABLE: 60,
    Action.REVERSE: 60,
    Action.UNLOAD: 40,
}
FEWER_DOORS: Final = 20
THROUGH: Final = 60  # turns in which a task gets through most of what it can be in the middle of
STRIDE: Final = 120  # instructions: a redirected call takes fewer


def interleaved(
    random_: random.Random, action: Action, spawned: Sequence[str], system: Sequence[str]
) -> tuple[Turn, ...]:
    """Turns of the operation, of tasks that were started for the sequence, and of the kernel's own.

    Most races are between two: the operation stops at a door and somebody goes on for a while, or somebody
    stops somewhere and the operation goes through, or they take turns.
    """
    serving = system[0] if action is Action.RUN else "init"
    others = [each for each in (*spawned, "init", *system) if each != serving]
    doors = DOORS.get(action, FEWER_DOORS)

    def other(turns: int) -> list[Turn]:
        name = spawned[-1] if spawned and random_.random() < 0.7 else random_.choice(others)
        if random_.random() < 0.5:
            return [(name, JIFFY_INSTRUCTIONS)] * turns
        # The first turn of a task that has just come begins what it does.
        return [(name, random_.randint(1, STRIDE)) for _ in range(random_.randint(1, 3))]

    stops = [(serving, JIFFY_INSTRUCTIONS)] * random_.choice(
        (random_.randint(1, doors), _about(random_, doors))
    )
    some = _about(random_, THROUGH)
    match random_.randrange(7):
        case 0 | 1:
            turns = [*stops, *other(random_.choice((some, THROUGH)))]
        case 2 | 3 | 4:
            turns = [*other(some), *[(serving, JIFFY_INSTRUCTIONS)] * doors]
        case 5:
            turns = [*other(some), *stops, *other(some), *other(THROUGH)]
        case _:
            turns = _in_turns(random_, serving, doors, others[:2])
    return tuple(turns)


def _in_turns(random_: random.Random, serving: str, doors: int, others: Sequence[str]) -> list[Turn]:
    """An operation from its beginning to its end, another task again and again in between."""
    name, passed, turns = random_.choice(others), 0, list[Turn]()
    at_once = random_.choice((4, 20, 60))
    while passed < doors:
        count = random_.randint(1, at_once)
        turns += [(serving, JIFFY_INSTRUCTIONS)] * count
        turns.append((name, random_.randint(1, STRIDE)))
        passed += count
    return turns


def _about(random_: random.Random, most: int) -> int:
    """A number of 1 to `most`, smaller ones more often: as many below 10 as from there to 100."""
    return int(most ** random_.random())
