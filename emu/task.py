"""A task: what it is doing, on which vCPU and on which stack.

What a task is doing nests, as on a real kernel stack: guest code calls an export, the export is a service,
the service calls a callback in guest code, and so on.  Each level is an activity; the top one is what runs.
The `task_struct` is in guest memory; this object holds only what has no place there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import greenlet

from emu.cpu import VCpu

__all__ = ["Activity", "Context", "GuestCall", "Program", "Service", "Task"]


@dataclass(eq=False, slots=True)
class Activity:
    """One level of what a task is doing; `result` or `error` is set once it is `finished`."""

    finished: bool = False
    result: Any = None
    error: BaseException | None = None


@dataclass(eq=False, slots=True)
class GuestCall(Activity):
    """Guest code called by us: `entry` with at most six integer arguments in registers, the rest on the
    stack.

    `saved` holds the registers of the guest code underneath while it waits; `budget` counts instructions
    down; `activations` belong to whoever watches what it calls (emu/observer.py).
    """

    entry: int = 0
    arguments: tuple[int, ...] = ()
    registers: dict[str, int] = field(default_factory=dict)
    saved: dict[str, int] | None = None
    started: bool = False
    budget: int = 0
    breakpoint: int | None = None  # address of an int3 that was executed and waits for its handler
    activations: list[Any] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Service(Activity):
    """Sequential Python on behalf of a task, as a greenlet; `waiting` is the predicate it waits for.

    While it `spins` it keeps its vCPU busy, otherwise it sleeps.  `stack` is the lowest address of the task's
    stack that it uses, `frame_pointer` what rbp is in what it calls, and `returns_to` the address in the
    export's stub that this returns to; they are 0 until they are needed (emu/switch_to.py).
    """

    name: str = ""
    body: Callable[[], Any] | None = None
    coroutine: greenlet.greenlet | None = None
    waiting: Callable[[], bool] | None = None
    waiting_for: str = ""
    spins: bool = False
    in_user_space: bool = False
    inbox: Any = None
    inbox_error: BaseException | None = None
    stack: int = 0
    frame_pointer: int = 0
    returns_to: int = 0


@dataclass(eq=False, slots=True)
class Program(Activity):
    """What a task does by itself, call by call: `next_call` starts the next one, or returns False at the end.

    Between two calls a user task is in user space; `in_kernel` says that it has still to return there.
    """

    next_call: Callable[["Task"], bool] = lambda task: False
    in_kernel: bool = False


@dataclass(slots=True)
class Context:
    """The registers of a task that another one has taken the vCPU from."""

    registers: dict[str, int]
    vectors: bytes


@dataclass(eq=False, slots=True)
class Task:
    """A task on a vCPU.

    `struct` is the address of its task_struct, `stack_top` the first address above its stack, `stack_base`
    where the frames of its kernel code begin: below the pt_regs of its entry from user space.  `running`: its
    vCPU executes it; `queued`: it would run if it was picked; neither: it is blocked.  `preempted`: it was
    taken off its vCPU at an arbitrary instruction.  `dead`: it has exited.  `program` is what it does by
    itself (emu/program.py), `children` those it has forked that are not gone yet, by address of task_struct.
    """

    name: str
    struct: int
    stack_top: int
    cpu: VCpu
    kthread: bool = False
    idle: bool = False
    activities: list[Activity] = field(default_factory=list)
    running: bool = False
    queued: bool = False
    preempted: bool = False
    context: Context | None = None
    stack_base: int = 0
    dead: bool = False
    program: Any = None
    children: dict[int, "Task"] = field(default_factory=dict)

    @property
    def top(self) -> Activity | None:
        """What runs when the task is next picked."""
        return self.activities[-1] if self.activities else None

    @property
    def quiescent(self) -> bool:
        """The task executes no kernel code: it does nothing, or it is in user space."""
        top = self.top
        match top:
            case None:
                return True
            case Program():
                return not self.kthread and not top.in_kernel
            case Service():
                return top.in_user_space
        return False

    @property
    def interruptible(self) -> bool:
        """The vCPU would take an interrupt now: it is not in the exception of an int3 it has executed."""
        top = self.top
        return not isinstance(top, GuestCall) or top.breakpoint is None

    @property
    def runnable(self) -> bool:
        """There is something to run, and it does not wait for a predicate that does not hold."""
        top = self.top
        if isinstance(top, Service) and top.waiting is not None:
            return top.waiting()
        return top is not None

    @property
    def in_guest(self) -> bool:
        """Guest code is somewhere in what the task is doing, so its registers matter."""
        return any(isinstance(each, GuestCall) and each.started for each in self.activities)
