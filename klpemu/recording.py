"""A recording of what a real kernel did: commands with what they printed, and snapshots of its memory.

    meta         `kernel` (release and version of the package), `cmdline`, `base_cpu`, `base_smp`
    symbols      addresses of that kernel's symbols
    sequence     {type: command, cmd, rc, out}, {type: snapshot, label, sites, enabled_functions, livepatch,
                 modules}, in order
    poke_phases  {step, site, addr, before, after, phase}: the text of a site changed at a sync point
    dmesg        the log; lines that begin with ORACLE: say which command or snapshot comes next

It is data from elsewhere: nothing in it is taken for granted.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from elf.errors import KlpemuError

__all__ = ["Command", "LogEntry", "Poke", "Recording", "Snapshot", "read_recording"]

MARKER: Final = "ORACLE: "
_LARGEST: Final = 64 << 20  # bytes
_ADDRESS: Final = re.compile(r"0x[0-9a-fA-F]{1,16}")
_HEX: Final = re.compile(r"(?:[0-9a-fA-F]{2})*")


@dataclass(frozen=True, slots=True)
class Command:
    """A command, its exit status, and the lines that it printed."""

    cmd: str
    rc: int
    out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What memory was like: watched functions by name, enabled_functions, sysfs values, /proc/modules."""

    label: str
    sites: Mapping[str, Mapping[str, Any]]
    enabled_functions: tuple[str, ...]
    livepatch: Mapping[str, Mapping[str, str]]
    modules: str | None


@dataclass(frozen=True, slots=True)
class Poke:
    """One change of the five bytes of a site, `phase` 1 to 3 of text_poke_bp_batch()."""

    step: str
    site: str
    address: int
    before: bytes
    after: bytes
    phase: int


@dataclass(frozen=True, slots=True)
class LogEntry:
    """A line of the log; a `marker` is the recorder's own, and says what comes at this place."""

    text: str
    marker: bool


@dataclass(frozen=True)
class Recording:
    """All of a file."""

    path: str
    kernel: str
    cmdline: str
    cpu: str
    cpus: int
    symbols: Mapping[str, int]
    sequence: Sequence[Command | Snapshot]
    pokes: Sequence[Poke]
    log: Sequence[LogEntry]
    unknown: Collection[str] = ()

    @property
    def boot_line(self) -> str:
        """The command line of the kernel: what its /proc/cmdline showed, if that was recorded."""
        for each in self.sequence:
            if isinstance(each, Command) and each.cmd == "cat /proc/cmdline" and len(each.out) == 1:
                line = each.out[0]
                if self.cmdline and line.startswith(self.cmdline):
                    return line
        return self.cmdline


class _Reader:
    """Takes values out of parsed JSON; errors name the file and the place in it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.unknown: dict[str, None] = {}

    def refuse(self, place: str, what: str) -> NoReturn:
        raise KlpemuError(
            f"{place}: {what}", where=self._path, advice="give a recording of a real kernel (docs/replay.md)"
        )

    def get(self, owner: Any, key: str, kind: type, place: str, default: Any = None) -> Any:
        """`owner[key]`, which must be of a kind; without `default` it must be there."""
        if not isinstance(owner, dict):
            self.refuse(place, f"no object, but {_kind(owner)}")
        if key not in owner:
            if default is None:
                self.refuse(place, f"no key '{key}'")
            return default
        value = owner[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.refuse(f"{place}.{key}", f"{_KINDS[kind]} is wanted, not {_kind(value)}")
        return value

    def only(self, owner: Mapping[str, Any], keys: set[str], what: str) -> None:
        """Note the keys that are not known: what a newer recorder has added is not compared."""
        for key in sorted(owner.keys() - keys):
            self.unknown[f"{what}.{key}"] = None

    def texts(self, owner: Any, key: str, place: str, *, needed: bool = True) -> tuple[str, ...]:
        """A list of strings."""
        values = self.get(owner, key, list, place, None if needed else [])
        for number, each in enumerate(values):
            if not isinstance(each, str):
                self.refuse(f"{place}.{key}[{number}]", f"a string is wanted, not {_kind(each)}")
        return tuple(values)

    def address(self, owner: Any, key: str, place: str) -> int:
        """A string with a hexadecimal number."""
        text = self.get(owner, key, str, place)
        if not _ADDRESS.fullmatch(text):
            self.refuse(f"{place}.{key}", f"'{text[:40]}' is no address (0x...)")
        return int(text, 16)

    def code(self, owner: Any, key: str, place: str) -> bytes:
        """A string of hexadecimal bytes."""
        text = self.get(owner, key, str, place)
        if not _HEX.fullmatch(text):
            self.refuse(f"{place}.{key}", f"'{text[:40]}' are no hexadecimal bytes")
        return bytes.fromhex(text)


_KINDS: Final = {dict: "an object", list: "a list", str: "a string", int: "a number", bool: "true or false"}


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "null" if value is None else type(value).__name__)


def read_recording(path: Path) -> Recording:
    """Read and check a recording; raises KlpemuError that names the place of what is wrong with it."""
    try:
        if path.stat().st_size > _LARGEST:
            raise KlpemuError(f"more than {_LARGEST >> 20} MiB are no recording", where=str(path))
        parsed = json.loads(path.read_text())
    except OSError as error:
        raise KlpemuError(error.strerror or str(error), where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise KlpemuError(
            f"this is no JSON: {error}", where=str(path), advice="the file may be cut off; record it again"
        ) from error
    reader = _Reader(str(path))
    meta = reader.get(parsed, "meta", dict, "recording")
    symbols = reader.get(parsed, "symbols", dict, "recording")
    pokes = reader.get(parsed, "poke_phases", list, "recording", [])
    reader.only(parsed, {"meta", "symbols", "sequence", "poke_phases", "dmesg"}, "recording")
    reader.only(meta, {"kernel", "cmdline", "base_cpu", "base_smp", "accel"}, "meta")
    return Recording(
        path=str(path),
        kernel=reader.get(meta, "kernel", str, "meta"),
        cmdline=reader.get(meta, "cmdline", str, "meta", ""),
        cpu=reader.get(meta, "base_cpu", str, "meta", "qemu64"),
        cpus=reader.get(meta, "base_smp", int, "meta", 1),
        symbols={name: reader.address(symbols, name, "symbols") for name in symbols},
        sequence=[
            _entry(reader, each, f"sequence[{number}]")
            for number, each in enumerate(reader.get(parsed, "sequence", list, "recording"))
        ],
        pokes=[_poke(reader, each, f"poke_phases[{number}]") for number, each in enumerate(pokes)],
        log=_log(reader.texts(parsed, "dmesg", "recording", needed=False)),
        unknown=reader.unknown.keys(),
    )


def _entry(reader: _Reader, entry: Any, place: str) -> Command | Snapshot:
    kind = reader.get(entry, "type", str, place)
    if kind == "command":
        reader.only(entry, {"type", "cmd", "rc", "out"}, "command")
        cmd = reader.get(entry, "cmd", str, place)
        return Command(cmd, reader.get(entry, "rc", int, place), reader.texts(entry, "out", place))
    if kind != "snapshot":
        reader.refuse(f"{place}.type", f"'{kind[:40]}' is neither command nor snapshot")
    keys = {"type", "label", "sites", "enabled_functions", "livepatch", "modules"}
    reader.only(entry, keys, "snapshot")
    livepatch = reader.get(entry, "livepatch", dict, place, {})
    for name, values in livepatch.items():
        for key in reader.get(livepatch, name, dict, f"{place}.livepatch"):
            reader.get(values, key, str, f"{place}.livepatch.{name}")
    sites = reader.get(entry, "sites", dict, place)
    for name in sites:
        _check_site(reader, reader.get(sites, name, dict, f"{place}.sites"), f"{place}.sites.{name}")
    return Snapshot(
        reader.get(entry, "label", str, place),
        sites,
        reader.texts(entry, "enabled_functions", place, needed=False),
        livepatch,
        reader.get(entry, "modules", str, place) if "modules" in entry else None,
    )


def _check_site(reader: _Reader, site: dict[str, Any], place: str) -> None:
    """The keys of a watched function: those of every site, of a call, of a private trampoline, of its ops."""
    reader.only(site, set(_SITE), "site")
    for key in ("addr", "bytes16", "kind"):
        reader.get(site, key, str, place)
    for key in site.keys() & _SITE.keys():
        match _SITE[key]:
            case "address":
                reader.address(site, key, place)
            case "code":
                reader.code(site, key, place)
            case kind:
                reader.get(site, key, kind, place)
    if len(site["bytes16"]) < 10:
        reader.refuse(f"{place}.bytes16", "fewer than five bytes")
    if "tramp_bytes" in site:
        reader.address(site, "target", place)
    if "fops" in site:
        reader.only(site["fops"], {"func", "flags"}, "fops")
        reader.get(site["fops"], "func", str, f"{place}.fops")
        reader.address(site["fops"], "flags", f"{place}.fops")
    for number, func in enumerate(site.get("func_stack", [])):
        where = f"{place}.func_stack[{number}]"
        for key in ("old_name", "new_sym"):
            reader.get(func, key, str, where)
        for key in ("nop", "patched", "transition"):
            reader.get(func, key, int, where)
        for key in ("old_func", "new_func"):
            reader.address(func, key, where)
        keys = {"old_name", "old_func", "new_func", "new_sym", "nop", "patched", "transition"}
        reader.only(func, keys, "func")


_SITE: Final[dict[str, Any]] = {
    "addr": "address",
    "module": str,
    "bytes16": "code",
    "kind": str,
    "target": "address",
    "target_sym": str,
    "per_ops_trampoline": bool,
    "tramp_bytes": "code",
    "ops_load_insn_off": int,
    "ops_ptr_off": int,
    "tramp_len": int,
    "call_off": int,
    "call_target": "address",
    "call_target_sym": str,
    "fops": dict,
    "func_stack": list,
    "tramp_page_rest_zero": bool,
}


def _poke(reader: _Reader, entry: Any, place: str) -> Poke:
    poke = Poke(
        reader.get(entry, "step", str, place),
        reader.get(entry, "site", str, place),
        reader.address(entry, "addr", place),
        reader.code(entry, "before", place),
        reader.code(entry, "after", place),
        reader.get(entry, "phase", int, place),
    )
    if len(poke.before) != 5 or len(poke.after) != 5:
        reader.refuse(place, "before and after are five bytes each")
    return poke


def _log(lines: Sequence[str]) -> list[LogEntry]:
    """The lines, with those that a marker goes on with (indented: what a command has printed) left out."""
    found: list[LogEntry] = []
    for line in lines:
        if found and found[-1].marker and line[:1].isspace():
            continue
        marker = line.startswith(MARKER)
        found.append(LogEntry(line.removeprefix(MARKER) if marker else line, marker))
    return found
