"""The tasks that a recording looks at: what they do, and the one that a livepatch holds.

The recorder starts a task that reads a file, and a livepatch lets it sleep in the function that shows this
file as long as the module's parameter `hold` is 1.  A recording shows only that it sleeps there.
"""

import re
from collections.abc import Sequence
from typing import Final

from elf.errors import KlpemuError
from emu.proc import SINGLE
from emu.task import Task
from emu.view import list_for_each_entry
from klpemu.kernel import Kernel
from klpemu.recording import Command
from klpemu.snapshot import symbol_at

__all__ = ["HELD", "HeldTasks"]

HELD: Final = 5_000  # virtual milliseconds for what happens while a task is held
_FRAME: Final = re.compile(r"(\w[\w.]*)\+0x[0-9a-f]+/0x[0-9a-f]+(?: \[(\w+)\])?")
_STACK: Final = re.compile(r"(?:patch_state=(-?\d+) )?(?:wchan=(\S+) )?stack=(.*)")

Facts = dict[str, str]
Frame = tuple[str, str]  # a function, and its module or ""


class HeldTasks:
    """Tasks that sleep in functions of modules with the parameter `hold`, on one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._held: dict[str, Task] = {}  # by module

    def facts(self, label: str, recorded: Command) -> tuple[Facts, Facts]:
        """What was recorded of a task, and what ours does: patch_state, what it waits in, its stack.

        The task is called as `label` begins, up to an underscore.  If there is none it is started.  Of the
        stack the functions down to the last one of a module are compared: system calls are not executed.
        """
        shown = _STACK.fullmatch(recorded.out[0])
        lines = [shown[3], *recorded.out[1:]] if shown is not None else recorded.out
        frames = [(frame[1], frame[2] or "") for line in lines if (frame := _FRAME.search(line))]
        of_modules = [number for number, (_, module) in enumerate(frames) if module]
        frames = frames[: of_modules[-1] + 1] if of_modules else frames[:1]
        expected = _stack_facts([f"{name} [{module}]" if module else name for name, module in frames])
        if shown is not None and shown[1]:
            expected["patch_state"] = shown[1]
        if shown is not None and shown[2]:
            expected["wchan"] = shown[2]
        task = self._named(label.partition("_")[0], frames)
        found = {} if task is None else self._look_at(task)
        return expected, {what: text for what, text in found.items() if what in expected or "stack" in what}

    def let_go(self) -> None:
        """Set `hold` to 0: the tasks go on as soon as time goes by."""
        held, self._held = self._held, {}
        for module in held:
            if self._kernel.machine.kernfs.exists(_parameter(module)):
                self._kernel.write(_parameter(module), "0\n")

    def _named(self, name: str, frames: Sequence[Frame]) -> Task | None:
        tasks = self._kernel.tasks.named(name)
        return tasks[0] if tasks else self._hold(name, frames)

    def _hold(self, name: str, frames: Sequence[Frame]) -> Task | None:
        """Start the task that is seen asleep in a function of a module; None if none of them can hold it."""
        for function, module in frames:
            path = self._shown_by(function, module) if module else None
            if path is None or not self._kernel.machine.kernfs.exists(_parameter(module)):
                continue
            return self._start(name, function, module, path)
        return None

    def _start(self, name: str, function: str, module: str, path: str) -> Task:
        self._kernel.write(_parameter(module), "1\n")
        task = self._held[module] = self._kernel.tasks.spawn(name, [f"read({path})"])
        self._kernel.tasks.run(HELD, lambda: self._sleeps_in(task, function))
        return task

    def _sleeps_in(self, task: Task, function: str) -> bool:
        if task.running or task.queued or not task.activities:
            return False
        return any(each.partition(" ")[0] == function for each in self._functions(task))

    def _shown_by(self, function: str, module: str) -> str | None:
        """The file whose show function a function of a module replaces."""
        kernel = self._kernel
        try:
            address = kernel.machine.kallsyms.address_of(function, module)
        except KlpemuError:
            return None
        files = {show: f"/proc/{name}" for name, show in SINGLE.items()}
        for ops in kernel.klp.ops():
            for func in list_for_each_entry(ops.func_stack, "klp_func", "stack_node"):
                if func.new_func == address:
                    return files.get(kernel.klp.string(func.old_name))
        return None

    def _look_at(self, task: Task) -> Facts:
        functions = self._functions(task)
        struct = self._kernel.machine.view("task_struct", task.struct)
        state = {"patch_state": str(struct.patch_state), "wchan": functions[0] if functions else "0"}
        return _stack_facts(functions) | state

    def _functions(self, task: Task) -> list[str]:
        """The functions on the stack of a task, innermost first."""
        machine = self._kernel.machine
        symbols = [machine.kallsyms.at(each) for each in machine.unwinder.walk_task(task.struct).entries]
        return ["?" if each is None else symbol_at(self._kernel, each.address) for each in symbols]


def _parameter(module: str) -> str:
    return f"/sys/module/{module}/parameters/hold"


def _stack_facts(functions: Sequence[str]) -> Facts:
    return {f"stack {number + 1}": name for number, name in enumerate(functions)}
