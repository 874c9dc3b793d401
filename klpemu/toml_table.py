"""The tables of a scenario file, read key by key; every error names the file and the line."""

import difflib
from collections.abc import Iterable
from typing import Any, Final

from elf.errors import KlpemuError
from klpemu import toml_lines

__all__ = ["ScenarioError", "Table", "did_you_mean"]

_TYPES: Final = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a float",
    list: "an array",
    dict: "a table",
}


class ScenarioError(KlpemuError):
    """A scenario file that cannot be read or says something that makes no sense; `where` is `file:line`."""


class Table:
    """One table of the file; `finish` refuses the keys that nobody asked for."""

    def __init__(
        self, values: dict[str, Any], path: toml_lines.Path, lines: dict[toml_lines.Path, int], file: str
    ):
        self.file = file
        self._values = values
        self._path = path
        self._lines = lines
        self._known: list[str] = []

    @property
    def line(self) -> int:
        """Where the table begins."""
        return self._line(self._path)

    def line_of(self, key: str) -> int:
        """Where a key stands."""
        return self._line((*self._path, key))

    def has(self, key: str) -> bool:
        """The key is there."""
        return key in self._values

    def names(self) -> list[str]:
        """The keys that are there, in the file's order."""
        return list(self._values)

    def text(self, key: str, default: str | None = None) -> str:
        """A string; without a default it must be there, and not be empty."""
        value = self._value(key, str, "a string", default)
        if not value and default is None:
            raise self.error("is empty", key)
        return str(value)

    def integer(self, key: str) -> int | None:
        """An integer of 64 bits, signed or not; None if it is left out."""
        if not self._asked_for(key):
            return None
        value = int(self._value(key, int, "an integer"))
        self._fits(key, value)
        return value

    def number(self, key: str, least: int, most: int, default: int | None) -> int | None:
        """An integer from `least` to `most`."""
        value = self.integer(key)
        if value is None:
            return default
        if not least <= value <= most:
            raise self.error(f"is {value}; expected {least:,} to {most:,}", key)
        return value

    def boolean(self, key: str, default: bool = False) -> bool:
        """True or false."""
        return bool(self._value(key, bool, "true or false", default))

    def is_boolean(self, key: str) -> bool:
        """The key is there, and true or false: what else it may be is another question."""
        return isinstance(self._values.get(key), bool)

    def texts(self, key: str) -> tuple[str, ...] | None:
        """An array of strings; None if it is left out."""
        if not self._asked_for(key):
            return None
        values = self._value(key, list, "an array of strings")
        return tuple(self._elements(key, values, str, "a string"))

    def text_or_texts(self, key: str) -> tuple[str, ...]:
        """A string, or an array of strings; empty if it is left out."""
        return tuple(self._one_or_more(key, str, "a string"))

    def integer_or_integers(self, key: str) -> tuple[int, ...]:
        """An integer of 64 bits, or an array of them; empty if it is left out."""
        values = self._one_or_more(key, int, "an integer")
        for value in values:
            self._fits(key, value)
        return tuple(values)

    def table(self, key: str) -> "Table":
        """A table, empty if it is left out."""
        values = self._value(key, dict, "a table", {})
        return Table(values, (*self._path, key), self._lines, self.file)

    def tables(self, key: str, *, needed: bool = True) -> list["Table"]:
        """An array of tables."""
        values = self._value(key, list, "an array of tables", None if needed else [])
        return [
            Table(each, (*self._path, key, index), self._lines, self.file)
            for index, each in enumerate(self._elements(key, values, dict, "a table"))
        ]

    def finish(self, what: str) -> None:
        """Refuse every key that was not asked for."""
        for key in self._values:
            if key not in self._known:
                advice = did_you_mean(key, self._known, f"known are {', '.join(self._known)}")
                raise self.error(f"unknown key '{key}' in {what}", key, advice=advice, bare=True)

    def error(
        self, what: str, key: str = "", index: int | None = None, *, advice: str = "", bare: bool = False
    ) -> ScenarioError:
        """An error at the table, at a key of it or at an element of that key's array.

        Its text begins with the key, unless it is `bare`.
        """
        path = (*self._path, key) if key else self._path
        path = path if index is None else (*path, index)
        text = f"'{key}' {what}" if key and not bare else what
        return ScenarioError(text, where=f"{self.file}:{self._line(path)}", advice=advice)

    def _asked_for(self, key: str) -> bool:
        if key not in self._known:
            self._known.append(key)
        return key in self._values

    def _value(self, key: str, wanted: type, what: str, default: Any = None) -> Any:
        if not self._asked_for(key):
            if default is not None:
                return default
            raise self.error(f"'{key}' is missing; expected {what}")
        value = self._values[key]
        if not _is_a(value, wanted):
            raise self._wrong_type(key, value, what)
        return value

    def _one_or_more(self, key: str, wanted: type, what: str) -> list[Any]:
        if not self._asked_for(key):
            return []
        value = self._values[key]
        if isinstance(value, list):
            return self._elements(key, value, wanted, what)
        if not _is_a(value, wanted):
            raise self._wrong_type(key, value, f"{what} or an array of such")
        return [value]

    def _elements(self, key: str, values: list[Any], wanted: type, what: str) -> list[Any]:
        for index, each in enumerate(values):
            if not _is_a(each, wanted):
                raise self._wrong_type(key, each, what, index)
        return values

    def _fits(self, key: str, value: int) -> None:
        if not -(1 << 63) <= value < 1 << 64:
            raise self.error("does not fit 64 bits", key)

    def _wrong_type(self, key: str, value: Any, wanted: str, index: int | None = None) -> ScenarioError:
        found = _TYPES.get(type(value), type(value).__name__)
        name = key if index is None else f"{key}[{index}]"
        return self.error(f"'{name}' is {found}; expected {wanted}", key, index, bare=True)

    def _line(self, path: toml_lines.Path) -> int:
        """The line of a place, or of the nearest one around it that has one."""
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """Advice for a word that is none of the known ones."""
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean '{close[0]}'?" if close else otherwise


def _is_a(value: object, wanted: type) -> bool:
    """TOML's booleans are no integers, Python's are."""
    return isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))
