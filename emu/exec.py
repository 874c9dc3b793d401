"""What a task is called: fs/exec.c."""

from typing import TYPE_CHECKING

from emu.exports import export

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["__get_task_comm"]


@export
def __get_task_comm(machine: "Machine", to: int, size: int, task: int) -> int:
    """The name of a task, the rest of the `size` bytes filled with NULs."""
    name = machine.view("task_struct", task).comm[: size - 1]
    machine.shared.write(to, name.ljust(size, b"\0"))
    return to
