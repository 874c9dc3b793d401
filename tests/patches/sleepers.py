"""Tasks in the middle of functions that are being patched, for tests of transitions."""

from livepatches import livepatch

from emu.task import Task
from klpemu import Func, Kernel, Patch
from klpemu.tasks import TaskState

STEPS = (Func("step_one", "new_step_one"), Func("step_two", "new_step_two"))
NAP = Func("nap", "new_nap")
OLD, NEW, NEWER = 0x11, 0x22, 0x33


def steps(*more: Func, code: str = "fix_steps", replace: bool = False) -> Patch:
    """Another version of step_one and step_two."""
    return livepatch(code, *STEPS, *more, replace=replace)


def state(kernel: Kernel, name: str) -> TaskState:
    (found,) = (each for each in kernel.tasks.states() if each.name == name)
    return found


def sleeper(kernel: Kernel, *program: str, name: str = "sleeper", kthread: bool = False) -> Task:
    """A task that is asleep in the first call of its program, which it repeats for ever."""
    task = kernel.tasks.spawn(name, program, kthread=kthread, repeat=None)
    kernel.tasks.run(100)
    return task


def results(kernel: Kernel, name: str) -> list[int]:
    return [value for _, value in state(kernel, name).returned]


def log_since(kernel: Kernel, count: int) -> list[str]:
    return [line.removeprefix("livepatch: ") for line in kernel.log[count:]]
