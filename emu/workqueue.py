"""Work that is done later, by kworkers: kernel/workqueue.c.

All workqueues share one pool of kworkers on the first vCPU, kernel threads like any other.  As long as one of
them runs no other begins; while all that work are asleep, an idle one goes on with what waits.  The kernel's
own works (`schedule_work`) are Python, and make do with one kworker; those of guest code are `struct
work_struct`s (emu/work_struct.py).
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from elf.errors import KlpemuError
from emu.fork import new_task
from emu.list import init_list_head
from emu.task import Task
from emu.thread_info import PF_WQ_WORKER

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["Work", "Workqueue"]


@dataclass(eq=False, slots=True)
class Work:
    """One execution of a work, from when it is queued; `struct` is its work_struct, 0 for our own."""

    name: str
    run: Callable[[], None]
    struct: int = 0
    finished: bool = False


class Workqueue:
    """The workqueues of one machine, and their pool of kworkers."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self._works: deque[Work] = deque()
        self._current: dict[int, Work] = {}  # by task_struct of the kworker
        self._delayed: set[str] = set()
        self._kworkers: list[Task] = []
        # worker_pool.worklist: a kernel that has real pools has no one list for all of them.
        self.worklist = machine.vmlinux.symbols.get("worklist", 0)
        if not self.worklist:
            self.worklist = machine.slab.kzalloc(machine.layouts.sizeof("list_head"), "worklist")
            init_list_head(machine.view("list_head", self.worklist))
        self._create_worker()
        machine.sched.wq_worker_sleeping = self._wq_worker_sleeping

    @property
    def is_empty(self) -> bool:
        """None of the kernel's own works waits to be done or is being done.

        Delayed work does not count before its time, that of guest code not at all: it may take for ever.
        """
        return all(work.struct for work in self._unfinished())

    def schedule_work(self, name: str, work: Callable[[], None]) -> None:
        """Let a kworker do `work` as soon as it is picked."""
        self.insert_work(Work(name, work))

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

    # Works of guest code.

    def insert_work(self, work: Work) -> None:
        """Put a work at the end of the list, and have it done as soon as no kworker runs."""
        self._works.append(work)
        if self._need_more_worker():
            self._wake_up_worker()

    def remove(self, struct: int) -> bool:
        """Take a work_struct off the list; False if it is not there."""
        found = next((work for work in self._works if work.struct == struct), None)
        if found is not None:
            self._works.remove(found)
            found.finished = True
        return found is not None

    def last(self, struct: int) -> Work | None:
        """What flush_work() waits for: the execution of a work_struct that waits, or else that goes on."""
        return next((work for work in reversed(list(self._unfinished())) if work.struct == struct), None)

    def executing(self, struct: int) -> Work | None:
        """The execution of a work_struct that is going on."""
        return next((work for work in self._current.values() if work.struct == struct), None)

    def executions(self) -> list[Work]:
        """All executions of work_structs that wait for a kworker or are going on."""
        return [work for work in self._unfinished() if work.struct]

    # The pool.

    def _unfinished(self) -> Iterator[Work]:
        yield from self._current.values()
        yield from self._works

    def _create_worker(self) -> None:
        name = f"kworker/0:{len(self._kworkers) + 1}"
        machine = self._machine
        self._kworkers.append(new_task(machine, name, machine.cpus[0], kthread=True, flags=PF_WQ_WORKER))

    def _need_more_worker(self) -> bool:
        """There is work, and every kworker is idle or asleep."""
        return bool(self._works) and not any(each.running or each.queued for each in self._busy())

    def _busy(self) -> list[Task]:
        return [each for each in self._kworkers if each.activities]

    def _wake_up_worker(self) -> None:
        idle = next((each for each in self._kworkers if not each.activities), None)
        if idle is not None:
            self._machine.hub.serve(idle, self._works[0].name, partial(self._worker_thread, idle))

    def _wq_worker_sleeping(self, task: Task) -> None:
        if task in self._kworkers and self._need_more_worker():
            self._wake_up_worker()

    def _worker_thread(self, worker: Task) -> None:
        while (work := self._next_work()) is not None:
            self._current[worker.struct] = work
            try:
                if work.struct and len(self._busy()) == len(self._kworkers):
                    self._create_worker()  # manage_workers(): guest code may sleep, so one is always idle
                work.run()
            except KlpemuError as error:
                self._machine.hub.failed(error)
            finally:
                del self._current[worker.struct]
                work.finished = True

    def _next_work(self) -> Work | None:
        """The first that is not being done already, by another kworker."""
        for work in self._works:
            if not work.struct or self.executing(work.struct) is None:
                self._works.remove(work)
                return work
        return None
