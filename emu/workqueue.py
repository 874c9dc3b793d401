"""Work that is done later, by a kworker: kernel/workqueue.c.

One kworker on the first vCPU does all work in order; it is a kernel thread like any other.
"""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from elf.errors import KlpemuError
from emu.fork import new_task
from emu.task import Task
from emu.thread_info import PF_WQ_WORKER

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["Workqueue"]


class Workqueue:
    """The system workqueue of one machine."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self._works: deque[tuple[str, Callable[[], None]]] = deque()
        self._delayed: set[str] = set()
        self._kworker: Task = new_task(
            machine, "kworker/0:1", machine.cpus[0], kthread=True, flags=PF_WQ_WORKER
        )

    @property
    def is_empty(self) -> bool:
        """No work waits to be done or is being done; delayed work does not count before its time."""
        return not self._works and not self._kworker.activities

    def schedule_work(self, name: str, work: Callable[[], None]) -> None:
        """Let the kworker do `work` as soon as it is picked."""
        self._works.append((name, work))
        if not self._kworker.activities:
            self._machine.hub.serve(self._kworker, name, self._worker_thread)

    def schedule_delayed_work(self, name: str, work: Callable[[], None], delay: int) -> bool:
        """Schedule `work` in `delay` jiffies; False if the work of that name is pending already.

        It is pending until the kworker begins with it (WORK_STRUCT_PENDING).
        """
        if name in self._delayed:
            return False
        self._delayed.add(name)

        def begin() -> None:
            self._delayed.discard(name)
            work()

        self._machine.timers.add_timer(delay, lambda: self.schedule_work(name, begin), name)
        return True

    def delayed(self, name: str) -> bool:
        """The delayed work of that name waits for its time, or for the kworker."""
        return name in self._delayed

    def _worker_thread(self) -> None:
        while self._works:
            _, work = self._works.popleft()
            try:
                work()
            except KlpemuError as error:
                self._machine.hub.failed(error)
