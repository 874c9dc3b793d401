"""`klpemu demo`: one function through its five stages."""

import re

import pytest
from command_line import klpemu

SITE = re.compile(r"^ +((?:[0-9a-f]{2} ){4}[0-9a-f]{2})  (\w+)", re.MULTILINE)


@pytest.fixture(scope="module")
def stages() -> list[str]:
    """The text of the demonstration, stage by stage."""
    outcome = klpemu("demo")
    assert (outcome.status, outcome.err) == (0, "")
    _, *stages = re.split(r"\n(?=\d\. )", outcome.out)
    return stages


def test_there_are_five_stages_in_order(stages: list[str]) -> None:
    words = ["Unpatched", "Patched", "Patched twice", "Atomically replaced", "Restored"]
    assert [stage.split("\n")[0].partition(". ")[2].partition(":")[0] for stage in stages] == words


def test_each_stage_returns_what_the_function_on_top_returns(stages: list[str]) -> None:
    returned = [re.search(r"area_of\(3, 4\) = (\d+)", stage) for stage in stages]
    assert [found and int(found[1]) for found in returned] == [7, 12, 120000, 7, 7]


def test_each_stage_shows_the_bytes_of_the_site(stages: list[str]) -> None:
    """A NOP, a call while area_of is patched, the same call when patched again, and the NOP again."""
    codes = [SITE.search(stage) for stage in stages]
    assert [found and found[2] for found in codes] == ["nop", "call", "call", "nop", "nop"]
    assert [found and found[1] for found in codes][3:] == ["0f 1f 44 00 00"] * 2
    assert codes[1] is not None
    assert codes[2] is not None
    assert codes[1][1] == codes[2][1]


def test_each_stage_shows_func_stack_and_ftrace_s_line(stages: list[str]) -> None:
    stacks = [re.search(r"func_stack +(.*)", stage) for stage in stages]
    names = [re.sub(r"\+\S+", "", found[1]) if found else "" for found in stacks]
    both = "area_in_cm [fix_area2], fixed_area_of [fix_area]"
    assert names == ["empty", "fixed_area_of [fix_area]", both, "empty", "empty"]
    listed = ["enabled_functions area_of (1)" in stage for stage in stages]
    assert listed == [False, True, True, False, False]


def test_each_stage_says_which_way_the_call_went(stages: list[str]) -> None:
    ways = [re.search(r"a call passes +(.*)\n +(\d+) instructions executed", stage) for stage in stages]
    redirected = "area_of -> ftrace_trampoline -> klp_ftrace_handler -> ftrace_trampoline -> "
    assert [found and found[1] for found in ways] == [
        "area_of",
        redirected + "fixed_area_of",
        redirected + "area_in_cm",
        "area_of",
        "area_of",
    ]
    counts = [int(found[2]) for found in ways if found]
    assert counts[0] == counts[3] == counts[4] == 3
    assert min(counts[1:3]) > 30


def test_the_sum_of_the_stages_checks_is_the_last_line(stages: list[str]) -> None:
    checks = [int(number) for stage in stages for number in re.findall(r"checked +(\d+) checks hold", stage)]
    assert len(checks) == len(stages)
    assert stages[-1].rstrip().endswith(f"\nall {sum(checks)} checks hold")


def test_att_syntax_is_there_for_those_who_read_it() -> None:
    outcome = klpemu("demo", "--att")
    assert outcome.status == 0
    assert "nopl (%rax, %rax)" in outcome.out
    assert "rax + rax" not in outcome.out
