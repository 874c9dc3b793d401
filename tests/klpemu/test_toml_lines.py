"""The lines of keys in a TOML file."""

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klpemu.toml_lines import Path, key_lines

DOCUMENT = '''\
title = "a # b = c"   # no key = here
"quoted key".'other' = 1

[[patch]]
name = """
lines = "in" a [[string]]
"""
objects.vmlinux = [
    { old = "a", new = "b" },   # }, ]
    { old = 'c"', new = "d\\\\", sympos = 2 },
]

[patch.more]
deep.er = [1, [2,
  3], {x = [
    4]}]

[[patch]]
  name = \'\'\'it's ]\'\'\'
[patch.more]
when = 1979-05-27 07:32:00
'''


def places(value: Any, path: Path = ()) -> list[Path]:
    """Every path in what tomllib returned, but that of the whole."""
    found: list[Path] = [path] if path else []
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, each in entries:
        found += places(each, (*path, key))
    return found


def test_keys_tables_and_elements_have_the_line_they_stand_on() -> None:
    lines = key_lines(DOCUMENT)
    expected = {
        ("title",): 1,
        ("quoted key", "other"): 2,
        ("patch", 0): 4,
        ("patch", 0, "name"): 5,
        ("patch", 0, "objects", "vmlinux"): 8,
        ("patch", 0, "objects", "vmlinux", 0, "new"): 9,
        ("patch", 0, "objects", "vmlinux", 1): 10,
        ("patch", 0, "objects", "vmlinux", 1, "sympos"): 10,
        ("patch", 0, "more"): 13,
        ("patch", 0, "more", "deep", "er", 1, 1): 15,
        ("patch", 0, "more", "deep", "er", 2, "x", 0): 16,
        ("patch", 1): 18,
        ("patch", 1, "name"): 19,
        ("patch", 1, "more", "when"): 21,
    }
    assert {path: lines[path] for path in expected} == expected


def test_exactly_the_places_that_tomllib_finds_are_found() -> None:
    assert set(key_lines(DOCUMENT)) == set(places(tomllib.loads(DOCUMENT)))


def written(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case dict():
            return "{" + ", ".join(f'"{key}" = {written(each)}' for key, each in value.items()) + "}"
        case list():
            return "[" + "".join(f"\n  {written(each)}, # [{{" for each in value) + "\n]"
        case str():
            return (
                '"'
                + "".join(f"\\u{ord(char):04x}" if char in '"\\' or char < " " else char for char in value)
                + '"'
            )
    return str(value)


KEYS = st.text("ab-_ .#=[]", min_size=1, max_size=4)
VALUES = st.recursive(
    st.integers(-9, 99) | st.booleans() | st.text("xy #=[]{}\"'\\", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


@given(
    st.dictionaries(KEYS, VALUES, max_size=4), st.lists(st.dictionaries(KEYS, VALUES, max_size=3), max_size=3)
)
def test_any_document_can_be_walked(top: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    text = "".join(f'"{key}" = {written(each)} # end\n' for key, each in top.items())
    for step in steps:
        text += "[[steps]]\n" + "".join(f'"{key}" = {written(each)}\n' for key, each in step.items())
    lines = key_lines(text)
    assert set(lines) == set(places(tomllib.loads(text)))
    for path, line in lines.items():
        if isinstance(path[-1], str):
            assert path[-1] in text.split("\n")[line - 1]


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment", "a=1"])
def test_small_documents_can_be_walked(text: str) -> None:
    assert set(key_lines(text)) == set(places(tomllib.loads(text)))
