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

__all__ = ["Activity", "GuestCall", "Service", "Task"]


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
    down.
    """

    entry: int = 0
    arguments: tuple[int, ...] = ()
    registers: dict[str, int] = field(default_factory=dict)
    saved: dict[str, int] | None = None
    started: bool = False
    budget: int = 0
    breakpoint: int | None = None  # address of an int3 that was executed and waits for its handler


@dataclass(eq=False, slots=True)
class Service(Activity):
    """Sequential Python on behalf of a task, as a greenlet; `waiting` is the predicate it waits for."""

    name: str = ""
    body: Callable[[], Any] | None = None
    coroutine: greenlet.greenlet | None = None
    waiting: Callable[[], bool] | None = None
    waiting_for: str = ""
    inbox: Any = None
    inbox_error: BaseException | None = None


@dataclass(eq=False, slots=True)
class Task:
    """A task on a vCPU.

    `struct` is the address of its task_struct, `stack_top` the first address above its stack.
    """

    name: str
    struct: int
    stack_top: int
    cpu: VCpu
    activities: list[Activity] = field(default_factory=list)

    @property
    def top(self) -> Activity | None:
        """What runs when the task is next picked."""
        return self.activities[-1] if self.activities else None

    @property
    def quiescent(self) -> bool:
        """The task holds no reference into anything: it executes no guest code and runs no service."""
        return not self.activities

    @property
    def has_scheduled(self) -> bool:
        """The task is in the middle of nothing: it does nothing at all, or it sleeps at a door.

        A service that sleeps has given up its vCPU of its own accord, which is what grace periods wait for;
        so two tasks that both wait for one do not wait for each other.
        """
        top = self.top
        return top is None or (isinstance(top, Service) and top.waiting is not None)

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
