"""The shape of the house: who imports whom, and what every module has."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the foundation up: a room imports from itself and from the rooms before it.
ROOMS = ("elf", "emu", "patches", "klpemu")
MODULES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
ALL_FILES = MODULES + [
    path for folder in ("bench", "tests") for path in sorted((ROOT / folder).rglob("*.py"))
]

MAX_LINES = 450
NAMES_THAT_SAY_NOTHING = ("common", "helper", "helpers", "manager", "util", "utils")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and top-level package of every import, those inside functions too; "" for a relative one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "" if node.level else (node.module or "").partition(".")[0]


def exports(tree: ast.Module) -> list[str] | None:
    """What `__all__` says, None without one."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == "__all__" for target in node.targets):
            names = ast.literal_eval(node.value)
            assert isinstance(names, list), "__all__ is a list"
            return names
    return None


def is_public(path: Path) -> bool:
    return not path.name.startswith("_") and not any(part.startswith("_") for part in path.parent.parts)


def test_there_are_modules_in_every_room() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_the_rooms_below(room: str) -> None:
    above = {*ROOMS[ROOMS.index(room) + 1 :], "tests", "bench", ""}
    assert [
        f"{name(path)}:{line} imports {package or 'relatively'}"
        for path in MODULES
        if path.is_relative_to(ROOT / room)
        for line, package in imported(ast.parse(path.read_text()))
        if package in above
    ] == []


def test_no_file_is_too_long_to_read_in_one_go() -> None:
    lengths = {name(path): len(path.read_text().splitlines()) for path in ALL_FILES}
    assert {file: lines for file, lines in lengths.items() if lines > MAX_LINES} == {}


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [
        name(path)
        for path in ALL_FILES
        if set(path.relative_to(ROOT).with_suffix("").parts) & set(NAMES_THAT_SAY_NOTHING)
    ] == []


def test_every_module_says_what_it_is_for() -> None:
    assert [name(path) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_every_public_module_says_what_it_exports() -> None:
    assert [
        name(path) for path in MODULES if is_public(path) and exports(ast.parse(path.read_text())) is None
    ] == []


def test_everything_exported_is_there_and_public_definitions_say_what_they_are() -> None:
    wrong = []
    for path in MODULES:
        tree = ast.parse(path.read_text())
        defined = {
            node.name: node
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
        }
        for exported in exports(tree) or ():
            if exported in defined and not ast.get_docstring(defined[exported]):
                wrong.append(f"{name(path)}: {exported} has no docstring")
    assert wrong == []
