"""Running all invariants over one state."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from elf.errors import KlpemuError
from emu.memory import MemoryFault
from emu.remembered import Remembered
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
from patches.invariants.subject import RememberingSubject, Subject
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


# What is remembered, in groups that read the same parts of a state.  Of the others each state has something
# new: the heap, the tasks, the log.
REMEMBERED: tuple[tuple[Invariant, ...], ...] = (
    (text_matches_records, records_match_ops, trampolines_are_copies, ipmodify_is_exclusive),
    (calls_reach_the_expected_function,),
    (
        klp_relocations_are_right,
        lists_are_well_formed,
        patches_are_listed,
        func_stacks_hold_the_patches,
        one_ops_per_function,
        newest_wins,
        objects_know_their_modules,
        sysfs_shows_the_patches,
    ),
)

# How many single checks were made, and what was found.
Judgement = tuple[int, tuple[Finding, ...]]


def verify(subject: Subject, step: str = "", remembered: Remembered | None = None) -> Report:
    """Check every invariant on one state; `step` is what the findings say happened last.

    With `remembered`, of the same address space, what was judged before is not judged again where all that it
    was judged by is the same.
    """
    judged: dict[str, Judgement] = {}
    if remembered is None:
        judged = _judged(subject, *INVARIANTS)
    else:
        remembered.look()
        watched = RememberingSubject.of(subject, remembered)
        for together in REMEMBERED:
            judged |= remembered.call(_judged, watched.afresh(), *together)
        judged |= _judged(watched.unwatched(), *(each for each in INVARIANTS if each.__name__ not in judged))
    checks = {each.__name__: judged[each.__name__][0] for each in INVARIANTS}
    found = (finding for name in checks for finding in judged[name][1])
    return Report(step, checks, tuple(replace(each, step=step) for each in found))


def _judged(subject: Subject, *invariants: Invariant) -> dict[str, Judgement]:
    """What the invariants say, by their names."""
    return {each.__name__: _judgement(subject, each) for each in invariants}


def _judgement(subject: Subject, invariant: Invariant) -> Judgement:
    results: list[Finding | None] = []
    try:
        results.extend(invariant(subject))
    except KlpemuError as error:  # what came before stays
        address = error.address if isinstance(error, MemoryFault) else 0
        results.append(Finding(invariant.__name__, f"cannot be checked, {error.what}", address, error.where))
    return len(results), tuple(each for each in filter(None, results))
