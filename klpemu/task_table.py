"""How the tasks of a kernel stand at one moment, and what that looks like: as lines of text, and as a table
on a terminal.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from klpemu.kernel import Kernel
from klpemu.task_file import system_tasks
from klpemu.tasks import TaskState
from klpemu.timeline import Timeline

__all__ = ["TaskPicture", "task_picture"]

ROWS_SHOWN: Final = 20
# What the registers of a preempted task are saved in is not what it does.
_ENTRY: Final = "asm_"
_STYLES: Final = {"patched": "green", "unpatched": "yellow"}


@dataclass(frozen=True, slots=True)
class TaskPicture:
    """All tasks, the idle ones last, `seconds` of virtual time after the boot.

    `transition` is the patch in transition or "", `how` is how those have switched that have, by `name:pid`.
    `blocked` says that there are tasks, none of them can go on, and no timer will wake one.
    """

    seconds: float
    transition: str
    states: tuple[TaskState, ...]
    how: Mapping[str, str]
    blocked: bool = False

    @property
    def title(self) -> str:
        """Time, and how far the transition is."""
        left = sum(each.pending for each in self.states)
        moving = f"{self.transition} in transition, {left} of {len(self.states)} tasks left"
        blocked = "; nobody can go on, and no timer is armed" if self.blocked else ""
        return f"at {self.seconds:.3f} s, {moving if self.transition else 'no transition'}{blocked}"

    @property
    def shown(self) -> list[TaskState]:
        """The scenario's own tasks, and whoever has still to switch; of too many those first."""
        cpus = sum(each.kind == "idle" for each in self.states)
        system = set(system_tasks(cpus))
        shown = [each for each in self.states if each.pending or each.name not in system]
        if len(shown) > ROWS_SHOWN:
            shown.sort(key=lambda each: not each.pending)
        return shown

    def lines(self) -> list[str]:
        """The title, and the tasks in columns."""
        heads, rows = self._columns(narrow=False)
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        texts = [
            "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (heads, *rows)
        ]
        return [self.title, *(texts if rows else []), *self._more()]

    def drawing(self, *, narrow: bool) -> Group:
        """The same for a terminal, where the last column is wrapped; if it is narrow, with fewer columns."""
        heads, rows = self._columns(narrow=narrow)
        table = Table(box=None, padding=(0, 1, 0, 1), header_style="dim", show_header=bool(rows))
        for head in heads:
            table.add_column(head, no_wrap=head != heads[-1], overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell, _STYLES.get(cell, "")) for cell in row))
        texts = [Text(f"  {each}") for each in self._more()]
        return Group(Text(f"  {self.title}", "bold"), Padding(table, (0, 0, 0, 1)), *texts)

    def _columns(self, *, narrow: bool) -> tuple[list[str], list[list[str]]]:
        columns = ["task", "CPU", "kind", "state", "version", "doing"]
        if narrow:
            columns = [each for each in columns if each not in ("CPU", "kind")]
        if not self.transition:
            columns.remove("version")
        rows = []
        for each in self.shown[:ROWS_SHOWN]:
            cells = {
                "task": f"{each.name}:{each.pid}",
                "CPU": str(each.cpu),
                "kind": each.kind,
                "state": each.state,
                "version": each.version,
                "doing": "; ".join(filter(None, (_doing(each), self.why(each)))),
            }
            rows.append([cells[column] for column in columns])
        return columns, rows

    def why(self, task: TaskState) -> str:
        """Why the task has not switched in this transition, or how it has; "" if nobody can say."""
        how = self.how.get(f"{task.name}:{task.pid}", "")
        return task.why if task.pending or not how else f"switched: {how}"

    def _more(self) -> list[str]:
        rest = self.shown[ROWS_SHOWN:]
        if not rest:
            return []
        counts = {word: sum(each.version == word for each in rest) for word in ("patched", "unpatched")}
        text = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        return [f"and {len(rest)} more" + (f": {text}" if text else "")]


def task_picture(kernel: Kernel, timeline: Timeline) -> TaskPicture:
    """How the tasks stand now."""
    machine, transition = kernel.machine, kernel.in_transition
    blocked = (
        any(task.activities for task in machine.tasks)
        and machine.timers.next_expiry is None
        and not machine.sched.candidates()
    )
    states = tuple(kernel.tasks.states())
    how = dict(timeline.how) if transition else {}
    return TaskPicture(machine.timers.seconds, transition, states, how, blocked)


def _doing(task: TaskState) -> str:
    """What the task does, and in which function if that does not say so."""
    said = re.findall(r"[\w.$]+", task.doing)
    functions = _functions(task.stack)
    innermost = next((each for each in functions if not each.startswith(_ENTRY) and each not in said), "")
    return ", ".join(filter(None, (task.doing, f"in {innermost}" if innermost else "")))


def _functions(stack: Sequence[str]) -> list[str]:
    """The functions on a stack, innermost first; what is in brackets says why the walk has ended."""
    return [each.partition("+")[0] for each in stack if not each.startswith("(")]
