"""Steps on files of the kernel: read one, list a directory, write to one, look into the log."""

from typing import Final

from klpemu.kernel import Kernel
from klpemu.scenario import Action, Step

__all__ = ["LOOKS", "contents_of", "write"]

# The actions that look at something and may expect its contents.
LOOKS: Final = (Action.READ, Action.LIST, Action.DMESG)


def contents_of(kernel: Kernel, step: Step) -> tuple[str, ...]:
    """What the step looks at, line by line: a file, the names in a directory, the log's lines with a text."""
    if step.action is Action.READ:
        return tuple(kernel.read(step.target).splitlines())
    if step.action is Action.LIST:
        return tuple(kernel.machine.kernfs.listdir(step.target))
    return tuple(line for line in kernel.log if step.target in line)


def write(kernel: Kernel, step: Step) -> None:
    """Write the step's value to its file, with the newline that `echo` ends it with."""
    kernel.write(step.target, f"{step.value}\n")
