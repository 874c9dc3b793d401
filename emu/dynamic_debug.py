"""Dynamic debug: which pr_debug() lines are printed, and the file that switches them (lib/dynamic_debug.c).

Known are the callsites of what is modelled here; those that compiled code brings along are not.  From the
start all are printed: what a scenario shows should say what happens.  A kernel that boots for user space
begins with none, as a real one does.
"""

import errno
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final

from emu.errno import KernelErrno

__all__ = ["CONTROL", "Callsite", "DynamicDebug"]

CONTROL: Final = "/sys/kernel/debug/dynamic_debug/control"
HEADER: Final = "# filename:lineno [module]function flags format\n"
FLAGS: Final = "pmflt"  # in the order in which they are shown; only `p` changes anything here
MAX_WORDS: Final = 9
MAX_WRITE: Final = 4095  # bytes: USER_BUF_PAGE - 1
UINT_MAX: Final = (1 << 32) - 1

_WORD: Final = re.compile(r"""\s*(?:(["'])(.*?)\1|([^\s"'#]\S*))""", re.S)
_ESCAPE: Final = re.compile(r"""\\([0-7]{1,3}|[nrtvfae"\\])""")
_ESCAPED: Final = {"n": "\n", "r": "\r", "t": "\t", "v": "\v", "f": "\f", "a": "\a", "e": "\x1b"}
_SHOWN: Final = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


@dataclass(frozen=True, slots=True)
class Callsite:
    """One pr_debug(): a struct _ddebug.  `format` is as printk gets it, prefix and newline included."""

    file: str
    line: int
    module: str
    function: str
    format: str


@dataclass(slots=True)
class _Query:
    """A struct ddebug_query: what callsites must have; None and 0 leave it open."""

    given: dict[str, str] = field(default_factory=dict)
    first: int = 0
    last: int = 0

    def matches(self, site: Callsite) -> bool:
        """The callsite has all that is asked for."""
        file, wanted = self.given.get("file"), self.given.get("format")
        if file is not None and not (_wildcard(file, site.file) or _wildcard(file, site.file.split("/")[-1])):
            return False
        if wanted is not None:
            anchored = wanted.startswith("^")
            if not (site.format.startswith(wanted[1:]) if anchored else wanted in site.format):
                return False
        return (
            _wildcard(self.given.get("func", "*"), site.function)
            and _wildcard(self.given.get("module", "*"), site.module)
            and (not self.first or site.line >= self.first)
            and (not self.last or site.line <= self.last)
        )


class DynamicDebug:
    """The callsites of one kernel and their flags; `complain` gets what it says of a query it refuses."""

    def __init__(self, complain: Callable[[str], None] = lambda _: None) -> None:
        self.complain = complain
        self._flags: dict[Callsite, str] = {}
        self.initial = "p"

    def add(self, callsites: Iterable[Callsite]) -> None:
        """Callsites of code that is there from now on."""
        for site in callsites:
            self._flags.setdefault(site, self.initial)

    def boot(self) -> None:
        """Print none, as a kernel does that has just booted."""
        self.initial = ""
        self._flags = dict.fromkeys(self._flags, "")

    def prints(self, site: Callsite) -> bool:
        """The callsite's lines go to the log."""
        return "p" in self._flags.get(site, self.initial)

    def show(self) -> str:
        """What `control` shows: the callsites of each module, the last one in its source first."""
        modules = list(dict.fromkeys(site.module for site in self._flags))
        ordered = sorted(self._flags, key=lambda site: (modules.index(site.module), site.file, -site.line))
        return HEADER + "".join(f"{self._shown(site)}\n" for site in ordered)

    def store(self, text: str) -> None:
        """What is written to `control`: queries, separated by newlines or semicolons.

        All of them are tried; EINVAL if one was refused, E2BIG if the text is longer than 4095 bytes.
        """
        if len(text) > MAX_WRITE:
            raise KernelErrno(errno.E2BIG, f"{len(text)} bytes are too many", where=CONTROL)
        refused: KernelErrno | None = None
        for query in re.split("[;\n]", text.partition("\0")[0]):
            if (query := query.lstrip()) and not query.startswith("#"):
                try:
                    self._exec_query(query)
                except KernelErrno as error:
                    refused = error
        if refused is not None:
            raise refused

    def _exec_query(self, text: str) -> None:
        words = self._tokenize(text)
        *pairs, flags = words
        operator, letters = self._parse_flags(flags)
        query = self._parse_query(pairs)
        for site, before in self._flags.items():
            if query.matches(site):
                self._flags[site] = _changed(before, operator, letters)

    def _tokenize(self, text: str) -> list[str]:
        words: list[str] = []
        at, end = 0, len(text.rstrip())
        while at < end and not text[at:].lstrip().startswith("#"):
            found = _WORD.match(text, at)
            if found is None:
                raise self._refuse(f"unclosed quote: {text[at:].strip()[1:]}", "tokenize failed")
            if len(words) == MAX_WORDS:
                raise self._refuse(f"too many words, legal max <={MAX_WORDS}", "tokenize failed")
            words.append(found[3] if found[1] is None else found[2])
            at = found.end()
        if not words:
            raise self._refuse("tokenize failed")
        return words

    def _parse_flags(self, text: str) -> tuple[str, str]:
        if text[:1] not in tuple("+-="):
            raise self._refuse(f"bad flag-op {text[:1]}, at start of {text}", "flags parse failed")
        for letter in text[1:]:
            if letter not in f"{FLAGS}_":
                raise self._refuse(f"unknown flag '{letter}'", "flags parse failed")
        return text[0], text[1:].replace("_", "")

    def _parse_query(self, words: Sequence[str]) -> _Query:
        if len(words) % 2:
            raise self._refuse("expecting pairs of match-spec <value>", "query parse failed")
        query = _Query()
        for keyword, value in zip(words[::2], words[1::2], strict=True):
            match keyword:
                case "file":
                    file, colon, rest = value.partition(":")
                    self._set(query, "file", file)
                    if colon and (rest[:1].isalpha() or rest[:1] in ("*", "?")):
                        self._set(query, "func", rest)
                    elif colon:
                        self._parse_linerange(query, rest)
                case "line":
                    self._parse_linerange(query, value)
                case "format":
                    self._set(query, "format", _unescaped(value))
                case "func" | "module" | "class":
                    self._set(query, keyword, value)
                case _:
                    raise self._refuse(f'unknown keyword "{keyword}"', "query parse failed")
        if "class" in query.given:  # none of the callsites has one
            query.given["func"] = ""
        return query

    def _set(self, query: _Query, name: str, value: str) -> None:
        if name in query.given:
            before = query.given[name]
            raise self._refuse(f"match-spec:{name} val:{before} overridden by {value}", "query parse failed")
        query.given[name] = value

    def _parse_linerange(self, query: _Query, text: str) -> None:
        if query.first or query.last:
            raise self._refuse("match-spec: line used 2x", "query parse failed")
        first, dash, last = text.partition("-")
        query.first = self._lineno(first)
        query.last = (self._lineno(last) or UINT_MAX) if dash else query.first
        if query.last < query.first:
            raise self._refuse(f"last-line:{query.last} < 1st-line:{query.first}", "query parse failed")

    def _lineno(self, text: str) -> int:
        if text and not (text.isascii() and text.isdigit() and int(text) <= UINT_MAX):
            raise self._refuse(f"bad line-number: {text}", "query parse failed")
        return int(text or 0)

    def _refuse(self, *lines: str) -> KernelErrno:
        for line in lines:
            self.complain(f"dyndbg: {line}")
        return KernelErrno(errno.EINVAL, lines[0], where=CONTROL)

    def _shown(self, site: Callsite) -> str:
        shown = "".join(_SHOWN.get(letter, letter) for letter in site.format)
        flags = self._flags[site] or "_"
        return f'{site.file}:{site.line} [{site.module}]{site.function} ={flags} "{shown}"'


def _changed(before: str, operator: str, letters: str) -> str:
    if operator == "=":
        return "".join(each for each in FLAGS if each in letters)
    if operator == "-":
        return "".join(each for each in before if each not in letters)
    return "".join(each for each in FLAGS if each in before + letters)


def _wildcard(pattern: str, text: str) -> bool:
    """match_wildcard() of lib/glob.c: `*` and `?`, and nothing else is special."""
    return fnmatchcase(text, pattern.replace("[", "[[]"))


def _unescaped(text: str) -> str:
    def one(found: re.Match[str]) -> str:
        return chr(int(found[1], 8) & 0xFF) if found[1][0].isdigit() else _ESCAPED.get(found[1], found[1])

    return _ESCAPE.sub(one, text)
