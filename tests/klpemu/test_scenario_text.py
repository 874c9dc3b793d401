"""Scenarios written as TOML and read back."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu.timer import JIFFY_INSTRUCTIONS
from klpemu.call_expression import CallExpression
from klpemu.fixtures import fixture
from klpemu.scenario import Action, DeclaredTask, Scenario, Step
from klpemu.scenario_file import read_scenario
from klpemu.scenario_text import scenario_text
from patches.livepatch import Func, Patch

BUILTIN = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.real] if "stock:" in path.read_text() else [])
    for path in sorted(fixture("demo.toml").parent.rglob("*.toml"))
]


def without_lines(scenario: Scenario) -> Scenario:
    """The scenario without where it stands in its file."""
    return replace(
        scenario,
        path="",
        base=None,
        modules=list(scenario.modules),
        steps=[replace(each, line=0) for each in scenario.steps],
        tasks={name: replace(each, line=0) for name, each in scenario.tasks.items()},
    )


def read_back(scenario: Scenario, folder: Path) -> Scenario:
    path = folder / "written.toml"
    path.write_text(scenario_text(scenario), encoding="utf-8")
    return without_lines(read_scenario(path))


@pytest.mark.parametrize("path", BUILTIN)
def test_a_scenario_that_was_written_reads_back_the_same(path: Path, tmp_path: Path) -> None:
    scenario = read_scenario(path)
    assert read_back(scenario, tmp_path) == without_lines(scenario)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
lines = st.lists(
    st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1).filter(str.strip), max_size=3
)
names = st.sampled_from(["caller", "kworker/0:1", "init", "swapper/0"])
turns = st.lists(st.tuples(names, st.integers(1, 1 << 20) | st.just(JIFFY_INSTRUCTIONS)), max_size=6).map(
    tuple
)
steps = st.one_of(
    st.builds(
        Step,
        st.sampled_from([Action.ENABLE, Action.DISABLE, Action.REVERSE, Action.FORCE]),
        st.just("fix_area"),
        error=texts,
        log=st.none() | lines.map(tuple),
        transition=st.sampled_from([None, "", "fix_area"]),
        tasks=st.dictionaries(names, st.sampled_from([("patched",), ("unpatched", "exited")]), max_size=2),
        returned=st.dictionaries(names, st.lists(st.integers(0, 99), min_size=1).map(tuple), max_size=2),
        schedule=turns,
        fail_alloc=texts,
        stage=texts,
        note=texts,
    ),
    st.builds(
        lambda msecs, schedule: Step(Action.RUN, f"{msecs} ms", msecs=msecs, schedule=schedule),
        st.integers(1, 10**6),
        turns,
    ),
    st.builds(lambda msecs: Step(Action.WAIT, "transition", msecs=msecs), st.none() | st.integers(1, 10**6)),
    st.builds(
        lambda value: Step(Action.WRITE, "/proc/sys/kernel/ftrace_enabled", value=value), texts.filter(len)
    ),
    st.builds(
        lambda function, values: Step(
            Action.CALL, str(call := CallExpression(function, tuple(values))), call
        ),
        st.sampled_from(["area_of", "lamp:lamp_light", "same_name,2"]),
        st.lists(st.integers(-(1 << 63), (1 << 64) - 1), max_size=6),
    ),
    st.builds(lambda functions: Step(Action.FTRACE, "one", functions=tuple(functions)), lines.filter(len)),
)


@given(
    st.builds(
        Scenario,
        title=texts,
        cpus=st.integers(1, 8),
        full_preemption=st.booleans(),
        seed=st.none() | st.integers(0, 1 << 62),
        budget=st.integers(0, 1 << 40),
        patches=st.builds(
            lambda replaces, sympos: {
                "fix_area": Patch(
                    "fix_area",
                    {"vmlinux": [Func("area_of", "fixed_area_of", sympos)]},
                    fixture("fix_area.o"),
                    replaces,
                )
            },
            st.booleans(),
            st.integers(0, 9),
        ),
        tasks=st.builds(
            lambda repeat, count, start: {
                "caller": DeclaredTask("caller", ("nap(1)", "fork"), repeat=repeat, count=count, start=start)
            },
            st.none() | st.integers(1, 9),
            st.integers(1, 9),
            st.booleans(),
        ),
        steps=st.lists(steps, min_size=1, max_size=5),
        variants=st.sampled_from([(), ("nops_kept",), ("museum:nops-first", "nops_kept")]),
    )
)
def test_any_scenario_that_was_written_reads_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, scenario: Scenario
) -> None:
    assert read_back(scenario, tmp_path_factory.getbasetemp()) == without_lines(scenario)
