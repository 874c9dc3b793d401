"""All invariants as one table: the name, the sentence that must hold, and where the rule comes from.

It is read from the docstrings of what judges them: the sentence comes first, behind the name for what is not
called by it, and then a paragraph that begins with "Source:".
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from elf.errors import KlpemuError
from patches.invariants.before_and_after import RestoredText, failures_leave_the_state_before
from patches.invariants.consistency import Consistency
from patches.invariants.fetches import FetchedText
from patches.invariants.forced import ForcedPatches
from patches.invariants.grace import GracePeriods
from patches.invariants.moments import EveryMoment
from patches.invariants.reachable import FreedObjects
from patches.invariants.replacement import ReplacedPatches
from patches.invariants.verify import INVARIANTS

__all__ = ["RULES", "Rule"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One invariant; `file` is where it is, from the top of the tree."""

    name: str
    sentence: str
    source: str
    file: str


_JUDGES: Final[tuple[Callable[..., Any], ...]] = (
    *INVARIANTS,
    Consistency._executed,
    Consistency._switched,
    Consistency.about_to_free,
    FreedObjects,
    EveryMoment,
    GracePeriods,
    FetchedText,
    ReplacedPatches,
    ForcedPatches,
    failures_leave_the_state_before,
    RestoredText,
)
_NAMED: Final = re.compile(r"(\w+): ")


def _rule(judge: Callable[..., Any]) -> Rule:
    paragraphs = inspect.cleandoc(judge.__doc__ or "").split("\n\n")
    sentence = " ".join(paragraphs[0].split())
    named = _NAMED.match(sentence)
    source = next((each for each in paragraphs if each.startswith("Source:")), "")
    name = named[1] if named else judge.__name__
    if not source:
        raise KlpemuError(f"the docstring of {name} does not say 'Source: ...'", where=judge.__module__)
    return Rule(
        name,
        sentence.removeprefix(f"{name}: "),
        " ".join(source.removeprefix("Source:").split()),
        judge.__module__.replace(".", "/") + ".py",
    )


RULES: Final = tuple(map(_rule, _JUDGES))
