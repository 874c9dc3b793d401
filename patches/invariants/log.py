"""The log: the last that it says of a patch is how the patch stands."""

import re
from collections.abc import Iterator
from functools import lru_cache

from emu.memory import read_string
from patches.invariants.finding import Finding
from patches.invariants.subject import Subject
from patches.invariants.walk import entries

__all__ = ["log_agrees_with_the_patches"]

# What pr_notice() says; the lines of pr_debug() need not be there.
SAID = re.compile(r"livepatch: '([^']+)': (starting (?:un)?patching transition|(?:un)?patching complete)$")
DIRECTIONS = {0: "unpatching", 1: "patching"}


def log_agrees_with_the_patches(subject: Subject) -> Iterator[Finding | None]:
    """What the log has said last of a patch on klp_patches is true: that its transition has started, and in
    which direction, or that it is complete.

    Source: klp_start_transition() and klp_complete_transition() of kernel/livepatch/transition.c.
    """
    said = dict(filter(None, map(_said, subject.log)))
    transition = subject.pointer("klp_transition_patch")
    name_at = subject.layouts.offsetof("module", "name")
    for address in entries(subject, subject.symbols["klp_patches"], "klp_patch", "list"):
        patch = subject.view("klp_patch", address)
        name = read_string(subject.memory, patch.mod + name_at)
        if name not in said:
            continue
        if address == transition:
            at = subject.symbols["klp_target_state"]
            target = int.from_bytes(subject.memory.read(at, 4), "little", signed=True)
            expected = f"starting {DIRECTIONS.get(target, 'no')} transition"
        else:
            expected = f"{DIRECTIONS[bool(patch.enabled)]} complete"
        if said[name] == expected:
            yield None
        else:
            what = f"the log said last of '{name}': {said[name]}; by its structs it is: {expected}"
            yield Finding("log_agrees_with_the_patches", what, address, subject.place(address))


@lru_cache(maxsize=1 << 12)
def _said(line: str) -> tuple[str, str] | None:
    """The patch that a line is about, and what it says of it; most lines were there a step ago."""
    found = SAID.search(line)
    return None if found is None else (found[1], found[2])
