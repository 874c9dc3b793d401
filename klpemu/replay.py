"""Replaying a recording of a real kernel on an emulated one, and comparing what both did.

The recording has no times, and it does not say when the task that a livepatch holds was started and let go.
Both follow from what it shows:

- Whatever livepatch had logged before a command or a snapshot has happened by then: virtual time goes by
  until our log has as many of its lines.
- A task that is looked at and not there is started (klpemu/replay_tasks.py).  When what was recorded next
  does not come while it is held, it is let go.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from elf.errors import KlpemuError
from emu.events import Event, EventKind
from emu.text_poke import INSN_SIZE
from klpemu.kernel import Kernel
from klpemu.module_tree import ModuleTree
from klpemu.recording import Command, Poke, Recording, Snapshot
from klpemu.replay_commands import ReplayCommands, Result, parse
from klpemu.replay_tasks import HELD, HeldTasks
from klpemu.snapshot import LIVEPATCH, symbol_at, take_snapshot
from klpemu.snapshot_facts import Names, plain_line, poke_fact, snapshot_facts
from klpemu.system_commands import release_of

__all__ = ["Difference", "Replay", "Step"]

PATIENCE: Final = 60_000  # virtual milliseconds
LOGGED: Final = "livepatch: "
SIGNALING: Final = "livepatch: signaling remaining tasks"
SIGNALS: Final = 20_000  # the kernel's signals go out after 15 s
TRY_SWITCH: Final = "livepatch: klp_try_switch_task: "
REMARK: Final = "klpemu: "
MISSING: Final = "(nothing)"
_LOGGING: Final = ("insmod", "modprobe", "rmmod", "echo", "sysctl")
_DISABLE: Final = re.compile(rf"echo (-n )?0 ?>>? ?{LIVEPATCH}/[^/]+/enabled")


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not as recorded."""

    what: str
    expected: str
    found: str


@dataclass(slots=True)
class Step:
    """One command, snapshot or other part of a recording: how much was compared, and what differs."""

    name: str
    compared: int = 0
    differences: list[Difference] = field(default_factory=list)

    def compare(self, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
        """Each fact of either side."""
        for what in dict.fromkeys([*expected, *found]):
            one, other = expected.get(what, MISSING), found.get(what, MISSING)
            self.compared += 1
            if one != other:
                self.differences.append(Difference(what, one, other))


class Replay:
    """A recording, and the kernel that does the same; `own_handler` says that it redirects with our code."""

    def __init__(
        self, recording: Recording, kernel: Kernel, modules: ModuleTree, *, own_handler: bool = False
    ) -> None:
        self.recording = recording
        self.kernel = kernel
        self.same_build = _is_same_build(recording.kernel, kernel)
        exact = self.same_build and not own_handler
        symbols = kernel.machine.vmlinux.symbols
        self._recorded = Names.recorded(recording, exact=exact)
        self._ours = Names(
            {symbols[name]: name for name in recording.symbols if name in symbols}, exact=exact
        )
        self._commands = ReplayCommands(kernel, modules, self._wait)
        self._tasks = HeldTasks(kernel)
        self._watched = {
            name: str(site.get("module", ""))
            for each in recording.sequence
            if isinstance(each, Snapshot)
            for name, site in each.sites.items()
        }
        self.remarks: list[str] = []  # what klpemu says in the log, which no kernel does
        self._log: list[str] = []
        self._logged = 0  # of livepatch's own lines
        self._pokes: list[tuple[Poke, Names]] = []
        self._poking = ""
        kernel.machine.events.listeners.append(self._poked)
        kernel.machine.log.listeners.append(self._line)
        if not any(each.text.startswith(TRY_SWITCH) for each in recording.log):
            kernel.machine.log.dynamic_debug.store("func klp_try_switch_task -p\n")

    @property
    def left_out(self) -> list[str]:
        """What the recording has that is not compared."""
        said = []
        if not self._ours.exact:
            why = "klpemu's own handler" if self.same_build else "another build of the kernel"
            said.append(f"the bytes behind a site, addresses and sizes of the kernel's functions: {why}")
        if boot := self._boot_lines():
            said.append(f"{boot} log lines from before the first step")
        commands = [each for each in self.recording.sequence if isinstance(each, Command)]
        if any(each.cmd.startswith("task ") for each in commands):
            said.append("of stacks the offsets, and what is below the last function of a module")
        return said + [f"{each}, which is unknown" for each in self.recording.unknown]

    def check(self) -> None:
        """Raise KlpemuError if something of the recording cannot be replayed: commands, modules."""
        for number, each in enumerate(self.recording.sequence):
            if isinstance(each, Command):
                place = f"{self.recording.path}: sequence[{number}]"
                words = parse(each, place)
                if words[0] == "insmod":
                    self._commands.module(words[1])
                elif words[0] == "task" and not each.out:
                    raise KlpemuError(f"'{each.cmd}' has printed nothing", where=place)

    def steps(self) -> Iterator[Step]:
        """Replay; each step with its differences, the log and the changes of text last."""
        self.check()
        due = self._due()
        for number, each in enumerate(self.recording.sequence):
            if isinstance(each, Snapshot):
                yield self._snapshot(each, due[number])
            else:
                yield self._command(each, due[number - 1] if number else 0, due[number])
        if self.recording.log:
            yield self._compare_log()
        if self.recording.pokes:
            yield self._compare_pokes()

    def _snapshot(self, recorded: Snapshot, due: int) -> Step:
        self._wait_for_log(due)
        loaded = self.kernel.machine.modules.objects
        watched = {name: module for name, module in self._watched.items() if module in loaded}
        found = take_snapshot(self.kernel, recorded.label, watched)
        # A recorder looks at the functions of the kernel that it is told to.
        kept = {n: site for n, site in found.sites.items() if site["module"] or n in recorded.sites}
        found = Snapshot(found.label, kept, found.enabled_functions, found.livepatch, found.modules)
        step = Step(f"snapshot {recorded.label}")
        facts = snapshot_facts(found, self._ours)
        if recorded.modules is None:
            facts = {what: text for what, text in facts.items() if not what.startswith("/proc/modules")}
        step.compare(snapshot_facts(recorded, self._recorded), facts)
        return step

    def _command(self, recorded: Command, before: int, due: int) -> Step:
        words = parse(recorded, self.recording.path)
        self._wait_for_log(before if words[0] in _LOGGING else due)
        self._note_poking(words[0], recorded.cmd)
        step = Step(recorded.cmd)
        if words[0] == "task":
            step.compare(*self._tasks.facts(words[1], recorded))
        else:
            _compare_result(step, recorded, self._commands.run(words))
        return step

    # Time.

    def _wait(self, holds: Callable[[], bool], held: int = HELD) -> bool:
        """Let virtual time go by until something holds; tasks are held no longer if it does not."""
        if holds() or self.kernel.tasks.run(held, holds):
            return True
        self._tasks.let_go()
        return self.kernel.tasks.run(PATIENCE, holds)

    def _wait_for_log(self, due: int) -> None:
        if self._logged < due:
            lines = [each.text for each in self.recording.log if each.text.startswith(LOGGED)]
            signals = SIGNALING in lines[self._logged : due]
            self._wait(lambda: self._logged >= due, SIGNALS if signals else HELD)

    def _due(self) -> list[int]:
        """For each entry of the sequence, how many lines livepatch had logged before its marker."""
        due, logged, at = [], 0, 0
        log = self.recording.log
        for each in self.recording.sequence:
            marker = _marker(each)
            there = (n for n in range(at, len(log)) if log[n].marker and _marks(log[n].text, marker))
            ahead = next(there, None)
            if ahead is not None:
                logged += sum(line.text.startswith(LOGGED) for line in log[at:ahead])
                at = ahead + 1
            due.append(logged)
        return due

    # The log, and the changes of text.

    def _line(self, line: str) -> None:
        if line.startswith(REMARK):
            self.remarks.append(line)
            return
        self._log.append(line)
        self._logged += line.startswith(LOGGED)

    def _boot_lines(self) -> int:
        """How many lines stand before the first marker."""
        return next((number for number, each in enumerate(self.recording.log) if each.marker), 0)

    def _compare_log(self) -> Step:
        """All lines in order.  How they lie between the commands depends on how long each took."""
        recorded = self.recording.log[self._boot_lines() :]
        expected = [plain_line(each.text) for each in recorded if not each.marker]
        return _compared_lines("log", expected, [plain_line(each) for each in self._log])

    def _note_poking(self, command: str, cmd: str) -> None:
        """Which step of `poke_phases` begins: they are of the first livepatch's coming and going."""
        if command in ("insmod", "modprobe"):
            self._poking = "over" if self._poking else "enable"
        elif self._poking == "enable" and _DISABLE.fullmatch(cmd):
            self._poking = "disable"

    def _poked(self, event: Event) -> None:
        """A store of the text poker; one that changes nothing cannot be seen from outside."""
        if event.kind is not EventKind.POKE or self._poking in ("", "over"):
            return
        if not event.note.startswith("phase ") or event.before == event.after:
            return
        phase = int(event.note.removeprefix("phase "))
        address = event.address - (phase == 2)
        after = self.kernel.machine.space.read(address, INSN_SIZE)
        at = event.address - address
        before = after[:at] + event.before + after[at + len(event.before) :]
        targets = {
            to: symbol_at(self.kernel, to, self._ours.at)
            for code in (before, after)
            for to in [address + INSN_SIZE + int.from_bytes(code[1:], "little", signed=True)]
        }
        site = symbol_at(self.kernel, address, self._ours.at)
        # Named now: the trampoline may be gone when all is compared.
        named = Names(targets, exact=False)
        self._pokes.append((Poke(self._poking, site, address, before, after, phase), named))

    def _compare_pokes(self) -> Step:
        sites = {each.site for each in self.recording.pokes}
        steps = {each.step for each in self.recording.pokes}
        expected = [poke_fact(each, self._recorded) for each in self.recording.pokes]
        found = [
            poke_fact(each, names) for each, names in self._pokes if each.site in sites and each.step in steps
        ]
        return _compared_lines("poke_phases", expected, found)


def _compare_result(step: Step, recorded: Command, result: Result) -> None:
    expected, found = recorded.out, result.out
    if recorded.rc and result.rc and recorded.cmd.split()[0] in ("echo", "cat", "head", "ls"):
        # Who complains, and how, depends on the shell; what the errno means does not.
        same = not expected or (found and expected[-1].endswith(found[-1]))
        expected = found if same else expected
    step.compare({"exit status": str(recorded.rc)}, {"exit status": str(result.rc)})
    step.compare(*({f"line {n + 1}": line for n, line in enumerate(lines)} for lines in (expected, found)))


def _is_same_build(recorded: str, kernel: Kernel) -> bool:
    """The recorded release and version are those that the image says it has (linux_banner)."""
    banner = kernel.machine.vmlinux.symbols.get("linux_banner")
    if banner is None:
        return False
    text = kernel.machine.space.read(banner, 256).split(b"\0")[0].decode("utf-8", "replace")
    versions = [word for word in re.findall(r"[\w.~+-]+", recorded) if word[0].isdigit()]
    said = re.findall(r"[\w.~+-]+", text)
    return release_of(kernel) in versions and all(version in said for version in versions)


def _marks(text: str, marker: str) -> bool:
    """A marker of the log is of the entry with this one."""
    return text == marker or text.startswith(f"{marker} ")


def _marker(entry: Command | Snapshot) -> str:
    return f"SNAP {entry.label}" if isinstance(entry, Snapshot) else entry.cmd


def _compared_lines(name: str, expected: Sequence[str], found: Sequence[str]) -> Step:
    """Two lists of lines in order: what is missing, what is too much, what is otherwise."""
    step = Step(name, compared=len(expected))
    matcher = difflib.SequenceMatcher(None, expected, found, autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag == "equal":
            continue
        for offset in range(max(i2 - i1, j2 - j1)):
            one = expected[i1 + offset] if i1 + offset < i2 else MISSING
            other = found[j1 + offset] if j1 + offset < j2 else MISSING
            step.differences.append(Difference(f"line {i1 + offset + 1}", one, other))
    return step
