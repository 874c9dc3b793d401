"""On which line of a TOML file each key stands: what tomllib does not say, and what an error must.

The text has been accepted by tomllib before, so nothing is checked here: this only walks over it.  A place is
the path of keys and array indices that leads to a value in tomllib's result, `("step", 2, "call")`.
"""

import re
from bisect import bisect_right
from typing import Final

__all__ = ["Path", "key_lines"]

Path = tuple[str | int, ...]

_SPACE: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
_STRINGS: Final = (
    re.compile(r'"""(?:[^\\]|\\.)*?"""{1,3}', re.DOTALL),
    re.compile(r"'''.*?'''{1,3}", re.DOTALL),
    re.compile(r'"(?:[^"\\]|\\.)*"'),
    re.compile(r"'[^']*'"),
)
_SCALAR: Final = re.compile(r"[^,\]}\n#]*")


def key_lines(text: str) -> dict[Path, int]:
    """The line, counted from 1, of every table header, key and array element in a valid TOML text."""
    return _Walk(text).lines


class _Walk:
    """One pass over the text: `at` is the offset reached, `elements` the last index of each table array."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Path, int] = {}
        self.elements: dict[Path, int] = {}
        self.starts = [0, *(found.end() for found in re.finditer("\n", text))]
        table: Path = ()
        while self.peek():
            if self.peek() == "[":
                table = self.header()
            else:
                self.pair(table)

    def peek(self) -> str:
        """The next character that means something, reached; empty at the end."""
        found = _SPACE.match(self.text, self.at)
        assert found is not None
        self.at = found.end()
        return self.text[self.at : self.at + 1]

    def note(self, path: Path, at: int) -> None:
        self.lines.setdefault(path, bisect_right(self.starts, at))

    def key(self) -> list[str]:
        """A dotted key, up to what follows it."""
        names = []
        while True:
            if self.peek() in "\"'":
                names.append(self.string()[1:-1])
            else:
                found = _BARE.match(self.text, self.at)
                assert found is not None
                names.append(found[0])
                self.at = found.end()
            if self.peek() != ".":
                return names
            self.at += 1

    def header(self) -> Path:
        start = self.at
        brackets = 2 if self.text.startswith("[[", start) else 1
        self.at += brackets
        *above, last = self.key()
        self.at += brackets
        path: Path = ()
        for name in above:
            path = (*path, name)
            if path in self.elements:  # a header below an array of tables goes on in its last element
                path = (*path, self.elements[path])
        path = (*path, last)
        self.note(path, start)
        if brackets == 2:
            self.elements[path] = self.elements.get(path, -1) + 1
            path = (*path, self.elements[path])
            self.note(path, start)
        return path

    def pair(self, table: Path) -> None:
        start = self.at
        path = table
        for name in self.key():
            path = (*path, name)
            self.note(path, start)
        self.at += 1  # the equals sign
        self.value(path)

    def value(self, path: Path) -> None:
        match self.peek():
            case "[":
                self.at += 1
                index = 0
                while self.peek() != "]":
                    self.note((*path, index), self.at)
                    self.value((*path, index))
                    index += 1
                    if self.peek() == ",":
                        self.at += 1
                self.at += 1
            case "{":
                self.at += 1
                while self.peek() != "}":
                    self.pair(path)
                    if self.peek() == ",":
                        self.at += 1
                self.at += 1
            case '"' | "'":
                self.string()
            case _:
                found = _SCALAR.match(self.text, self.at)
                assert found is not None
                self.at = found.end()

    def string(self) -> str:
        for form in _STRINGS:
            found = form.match(self.text, self.at)
            if found:
                self.at = found.end()
                return found[0]
        raise AssertionError(f"no string at offset {self.at}")
