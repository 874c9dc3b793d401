"""Every exhibit is small, says what it is, and puts back what it has replaced."""

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from elf.errors import KlpemuError
from emu import ftrace, ftrace_code, machine, text_poke, trampoline
from klpemu.expectations import INVARIANTS, SUCCEEDS
from klpemu.museum import museum_scenario
from patches import core, init_patch, museum, patch, shadow, transition
from patches.museum import NAMES, Kind, bug, source, story
from patches.variants import variant

LINES = 40
COMMIT = re.compile(
    r'([0-9a-f]{10,12} )?\("[^"]+"\)( \(in v\d+\.\d+\))?|"[^"]+" \(in v\d+\.\d+\)|kept away by'
)
REPLACED: tuple[ModuleType | type, ...] = (
    core,
    init_patch,
    patch,
    shadow,
    transition,
    ftrace.Ftrace,
    ftrace_code.FtraceCode,
    machine.Machine,
    text_poke.TextPoker,
    trampoline.Trampolines,
)


def functions() -> dict[tuple[str, str], object]:
    """Every function that an exhibit could replace."""
    return {
        (owner.__name__, name): value
        for owner in REPLACED
        for name, value in vars(owner).items()
        if inspect.isfunction(value)
    }


def code_lines(text: str) -> int:
    """Lines that are neither empty nor the story."""
    body = ast.parse(text).body
    lines = text.splitlines()[body[0].end_lineno :]
    return sum(bool(line.strip()) for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_an_exhibit_takes_less_than_forty_lines(name: str) -> None:
    assert code_lines(source(name)) < LINES


@pytest.mark.parametrize("name", NAMES)
def test_an_exhibit_says_what_it_is(name: str) -> None:
    exhibit = bug(name)
    assert isinstance(exhibit.kind, Kind)
    assert COMMIT.match(exhibit.commit), exhibit.commit
    assert exhibit.invariant in (*INVARIANTS, SUCCEEDS)
    assert not exhibit.title.endswith(".")
    assert exhibit.breaks
    assert len(re.findall(r"[.?](?:\s|$)", story(name))) >= 3, "a story of a few sentences"


@pytest.mark.parametrize("name", NAMES)
def test_an_exhibit_has_a_scenario_with_a_title(name: str) -> None:
    scenario = museum_scenario(name)
    assert scenario.title
    assert scenario.steps
    assert not scenario.variants, "the kernel is chosen by whoever runs it"


@pytest.mark.parametrize("name", NAMES)
def test_a_bug_is_gone_behind_its_block(name: str) -> None:
    before = functions()
    with bug(name).bug():
        during = functions()
    assert functions() == before
    assert (during != before) == (name not in ("relocations-left",)), "something else is there inside"


def test_every_exhibit_is_listed() -> None:
    files = {each.stem for each in museum_files()}
    assert files == {name.replace("-", "_") for name in NAMES}


def museum_files() -> list[Path]:
    return [each for each in Path(museum.__file__).parent.glob("*.py") if each.stem != "__init__"]


def test_a_bug_that_does_not_exist_names_a_similar_one() -> None:
    with pytest.raises(KlpemuError, match="did you mean fork-between"):
        bug("fork-in-between")


def test_a_bug_is_a_variant_for_scenarios() -> None:
    before = transition.klp_copy_process
    with variant("museum:fork-between"):
        assert transition.klp_copy_process is not before
    assert transition.klp_copy_process is before
    with pytest.raises(KlpemuError, match="the museum has no bug"):
        variant("museum:nothing")
