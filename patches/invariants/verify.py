"""Running all invariants over one state."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from elf.errors import KlpemuError
from emu.memory import MemoryFault
from patches.invariants.finding import Finding, Report
from patches.invariants.lists import func_stacks_hold_the_patches, lists_are_well_formed, patches_are_listed
from patches.invariants.log import log_agrees_with_the_patches
from patches.invariants.reachable import nothing_freed_is_reachable
from patches.invariants.redirection import (
    ipmodify_is_exclusive,
    newest_wins,
    objects_know_their_modules,
    one_ops_per_function,
)
from patches.invariants.relocations import klp_relocations_are_right
from patches.invariants.remains import heap_is_intact, nothing_remains, tasks_are_settled
from patches.invariants.shadow import no_shadow_variable_remains, shadow_variables_are_hashed
from patches.invariants.streams import calls_reach_the_expected_function
from patches.invariants.subject import Subject
from patches.invariants.sysfs import sysfs_shows_the_patches
from patches.invariants.text import records_match_ops, text_matches_records, trampolines_are_copies

__all__ = ["INVARIANTS", "verify"]

# Yields None for each single check that held and a Finding for each that did not.
Invariant = Callable[[Subject], Iterator[Finding | None]]

INVARIANTS: tuple[Invariant, ...] = (
    text_matches_records,
    records_match_ops,
    trampolines_are_copies,
    klp_relocations_are_right,
    calls_reach_the_expected_function,
    lists_are_well_formed,
    patches_are_listed,
    func_stacks_hold_the_patches,
    one_ops_per_function,
    ipmodify_is_exclusive,
    newest_wins,
    objects_know_their_modules,
    nothing_freed_is_reachable,
    tasks_are_settled,
    heap_is_intact,
    nothing_remains,
    shadow_variables_are_hashed,
    no_shadow_variable_remains,
    sysfs_shows_the_patches,
    log_agrees_with_the_patches,
)


def verify(subject: Subject, step: str = "") -> Report:
    """Check every invariant on one state; `step` is what the findings say happened last."""
    checks: dict[str, int] = {}
    findings: list[Finding] = []
    for invariant in INVARIANTS:
        name = invariant.__name__
        checks[name] = 0
        try:
            for result in invariant(subject):
                checks[name] += 1
                if result is not None:
                    findings.append(replace(result, step=step))
        except KlpemuError as error:
            checks[name] += 1
            address = error.address if isinstance(error, MemoryFault) else 0
            findings.append(
                Finding(name, f"cannot be checked, {error.what}", address, error.where, step=step)
            )
    return Report(step, checks, tuple(findings))
