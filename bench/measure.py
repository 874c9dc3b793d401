"""How everything here is measured: sides taken in turn within one run, medians, and ratios of neighbours.

A machine that is busy with something else slows all sides of a comparison alike, if they run one right after
the other.  So a ratio is the median of the ratios of single rounds, never a quotient of two runs.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Result", "Rounds", "as_json", "interleave", "table", "timed"]

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Result:
    """One number: what it is of, its unit, and the most it may be (None: no goal)."""

    bench: str
    name: str
    value: float
    unit: str
    goal: float | None = None

    @property
    def holds(self) -> bool:
        """There is no goal, or it is met."""
        return self.goal is None or self.value <= self.goal


class Rounds:
    """Seconds of each side in each round."""

    def __init__(self, seconds: Mapping[str, Sequence[float]]) -> None:
        self.seconds = seconds

    def median(self, side: str) -> float:
        """The median of a side, in seconds."""
        return statistics.median(self.seconds[side])

    def ratio(self, side: str, other: str) -> float:
        """How many times as long `side` takes as `other`: the median over the rounds."""
        pairs = zip(self.seconds[side], self.seconds[other], strict=True)
        return statistics.median(one / two for one, two in pairs)


def timed(body: Callable[[], Any]) -> float:
    """CPU seconds that `body` takes, the garbage collector kept out."""
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        body()
        return time.process_time() - start
    finally:
        gc.enable()


def interleave(sides: Mapping[str, Callable[[], float]], rounds: int) -> Rounds:
    """Let every side measure itself once a round, A B A B; each returns seconds (per whatever it counts)."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(side())
    return Rounds(seconds)


def table(results: Iterable[Result]) -> str:
    """The results as text, one a line, those that miss their goal marked."""
    lines = []
    bench = ""
    for each in results:
        if each.bench != bench:
            bench = each.bench
            lines.append(f"{bench}")
        goal = "" if each.goal is None else f"   at most {each.goal:g}{'' if each.holds else ': MISSED'}"
        lines.append(f"  {each.name:66} {_number(each.value):>12} {each.unit:18}{goal}".rstrip())
    return "\n".join(lines)


def as_json(results: Iterable[Result]) -> dict[str, Any]:
    """The results as JSON-able data."""
    return {"schema": SCHEMA, "results": [asdict(each) | {"holds": each.holds} for each in results]}


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
