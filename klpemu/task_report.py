"""What tasks look like in the output: what happens to them, how they stand, and what they wait for."""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from klpemu.output import Output
from klpemu.task_table import TaskPicture
from klpemu.tasks import TaskState
from klpemu.timeline import Moment, MomentKind

__all__ = ["moment_object", "print_in_the_way", "print_moments", "print_tasks", "task_object"]

_STYLES: Final = {
    MomentKind.LOG: "dim",
    MomentKind.SWITCH: "green",
    MomentKind.FORK: "cyan",
    MomentKind.EXIT: "cyan",
}


def print_moments(output: Output, moments: Iterable[Moment]) -> None:
    """One line a moment, behind the virtual time as the kernel prints it, in seconds."""
    with output.together():
        for each in moments:
            output.line((each.text, _STYLES[each.kind]), label=f"[{each.seconds:9.3f}] ", indent=2)


def print_tasks(output: Output, picture: TaskPicture) -> None:
    """How the tasks stand, where no picture of them is drawn."""
    for number, line in enumerate(picture.lines()):
        output.line((line, "" if number else "bold"), indent=2, hang=4)


def print_in_the_way(output: Output, tasks: Sequence[TaskState]) -> None:
    """Each task with what it waits for and the functions on its stack, innermost first."""
    for task in tasks:
        what = f" {task.doing}" if task.doing else ""
        output.line(f"{task.name}:{task.pid} on CPU {task.cpu}, {task.state},{what}".rstrip(","), indent=4)
        for place in task.stack:
            output.line(place, indent=6)


def moment_object(moment: Moment) -> dict[str, Any]:
    """One moment; a line of the log is no task's."""
    return {
        "seconds": moment.seconds,
        "kind": moment.kind.value,
        "text": moment.text,
        "task": moment.task or None,
        "version": moment.version or None,
        "how": moment.how or None,
    }


def task_object(task: TaskState, picture: TaskPicture | None = None) -> dict[str, Any]:
    """One task; `how` is how it has switched in this transition."""
    how = picture.how.get(f"{task.name}:{task.pid}") if picture is not None else None
    return {
        "name": task.name,
        "pid": task.pid,
        "cpu": task.cpu,
        "kind": task.kind,
        "state": task.state,
        "version": task.version or None,
        "pending": task.pending,
        "doing": task.doing or None,
        "stack": list(task.stack),
        "why": task.why or None,
        "how": how,
        "returned": [{"call": call, "returned": value} for call, value in task.returned],
    }
