"""Every bug of the museum is found by the invariant that it names, and nothing is found without it."""

from contextlib import nullcontext
from dataclasses import replace

import pytest

from klpemu import museum
from klpemu.expectations import SUCCEEDS
from klpemu.museum import museum_scenario, show
from patches.museum import NAMES, bug

OF_THE_REFERENCE = ("relocations-left",)  # the reference itself has the bug
# Where chance decides who goes on when: another seed will do as well.
SEEDED = [name for name in NAMES if museum_scenario(name).seed is not None]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_found_without_the_bug(name: str) -> None:
    shown = show(name, broken=False)
    assert [str(each) for each in shown.findings] == []
    assert shown.holds


@pytest.mark.parametrize("name", NAMES)
def test_the_bug_is_found_by_the_invariant_that_it_names(name: str) -> None:
    shown = show(name, broken=True)
    assert shown.found_by(bug(name).invariant), [str(each) for each in shown.findings]
    assert not shown.holds


@pytest.mark.parametrize("name", ["fork-between", "stale-obj-mod", "plain-store"])
def test_a_bug_that_is_switched_off_is_not_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What finds it is the replaced code, and nothing else of the run."""
    monkeypatch.setattr(museum, "bug", lambda name: replace(bug(name), bug=nullcontext))
    assert show(name, broken=True).holds


def test_where_the_reference_has_the_bug_its_fix_is_what_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = OF_THE_REFERENCE
    monkeypatch.setattr(museum, "bug", lambda name: replace(bug(name), fixed=nullcontext))
    assert show(name, broken=False).found_by(SUCCEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("name", SEEDED)
def test_another_seed_finds_nothing_without_the_bug(name: str, seed: int) -> None:
    assert show(name, broken=False, scenario=replace(museum_scenario(name), seed=seed)).holds
