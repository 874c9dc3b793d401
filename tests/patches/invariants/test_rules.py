"""The table of the invariants in docs/invariants.md is what their docstrings say.

After a change that is meant, this file run with KLPEMU_UPDATE_DOCS=1 writes the table anew.
"""

import os
import re
from pathlib import Path

from klpemu.expectations import INVARIANTS, WARNS
from patches.invariants.rules import RULES

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = ROOT / "docs" / "invariants.md"
TABLE = re.compile(
    r"(?<=^\| invariant \| what must hold \| source of the rule \|\n\|---\|---\|---\|\n)(?:\|.*\n)+", re.M
)


def table() -> str:
    return "".join(
        f"| [`{rule.name}`](../{rule.file}) | {cell(rule.sentence)} | {cell(rule.source)} |\n"
        for rule in RULES
    )


def cell(text: str) -> str:
    return text.replace("|", "\\|").removesuffix(".")


def test_the_table_in_the_documentation_is_that_of_the_docstrings() -> None:
    text = DOCUMENT.read_text()
    if os.environ.get("KLPEMU_UPDATE_DOCS"):
        DOCUMENT.write_text(TABLE.sub(lambda _: table(), text))
        return
    found = TABLE.search(text)
    assert found is not None
    assert found[0] == table()


def test_every_rule_has_a_sentence_and_a_source() -> None:
    for rule in RULES:
        assert re.fullmatch(r"[a-z]+(_[a-z]+)+", rule.name), rule.name
        assert rule.sentence.endswith("."), rule.name
        assert rule.source, rule.name
        assert (ROOT / rule.file).is_file()


def test_what_a_scenario_can_expect_is_in_the_table() -> None:
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    assert {*names, WARNS} == set(INVARIANTS)
    assert f"`{WARNS}`" in DOCUMENT.read_text()
