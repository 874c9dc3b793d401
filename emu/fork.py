"""Tasks come and go: kernel/fork.c, kernel/exit.c.

Every task has a task_struct in guest memory, on the list that begins at init_task (the idle tasks excepted),
and a kernel stack of its own with a guard page below it.
"""

from typing import TYPE_CHECKING

from elf.errors import KlpemuError
from emu.cpu import VCpu
from emu.list import init_list_head, list_add_tail, list_del_rcu
from emu.memory import PAGE_SIZE
from emu.paging import Access
from emu.rwlock import write_locked
from emu.task import Task
from emu.thread_info import PF_EXITING, PF_IDLE, PF_KTHREAD, TASK_DEAD, TASK_NEW

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = [
    "THREAD_SIZE",
    "Stacks",
    "copy_process",
    "do_exit",
    "fork_idle",
    "new_task",
    "release_task",
    "replace_stack",
]

THREAD_SIZE = 4 * PAGE_SIZE  # arch/x86/include/asm/page_64_types.h, without KASAN
STACKS = 0xFFFF_C900_0000_0000
STACK_DISTANCE = PAGE_SIZE + THREAD_SIZE  # with the guard page
FIRST_BLOCK, LARGEST_BLOCK = 8, 512  # stacks
TASK_COMM_LEN = 16
UNDEFINED_STATE = -1  # KLP_UNDEFINED


class Stacks:
    """Kernel stacks; one that is given back is used again.

    `blocks` are the physical addresses that all of them lie in, ascending: few and large, so that whoever
    copies memory can leave out the stacks.
    """

    def __init__(self, machine: "Machine") -> None:
        self._space = machine.space
        self.blocks: list[range] = []
        self._frames: list[int] = []  # by number of the stack, from STACKS up
        self._unused = iter(range(0))
        self._free: list[int] = []

    def alloc(self) -> int:
        """The first address above a kernel stack, with a guard page below it."""
        if self._free:
            top = self._free.pop()
            self._space.write(top - THREAD_SIZE, bytes(THREAD_SIZE))
            return top
        frame = next(self._unused, None)
        if frame is None:
            frame = self._grow()
        bottom = STACKS + len(self._frames) * STACK_DISTANCE + PAGE_SIZE
        self._space.map(bottom, THREAD_SIZE, Access.WRITE, frame)
        self._frames.append(frame)
        return bottom + THREAD_SIZE

    def free(self, top: int) -> None:
        """Give a stack back."""
        self._free.append(top)

    def frame_of(self, address: int) -> int | None:
        """Physical address of the stack that a virtual address lies in; None for any other address."""
        number, offset = divmod(address - STACKS, STACK_DISTANCE)
        return self._frames[number] if 0 <= number < len(self._frames) and offset >= PAGE_SIZE else None

    def _grow(self) -> int:
        """The first frame of a new block, for as many stacks as there are already."""
        size = min(max(FIRST_BLOCK, len(self._frames)), LARGEST_BLOCK) * THREAD_SIZE
        start = self._space.arena.writable_frames(size // PAGE_SIZE)
        self.blocks.append(range(start, start + size))
        self._unused = iter(range(start + THREAD_SIZE, start + size, THREAD_SIZE))
        return start


def fork_idle(machine: "Machine", cpu: VCpu) -> Task:
    """The idle task of a vCPU: init_task for the first, a copy of it for each other."""
    comm = f"swapper/{cpu.number}"
    init_task = machine.layouts.view("task_struct", machine.space, machine.symbol("init_task"))
    if cpu.number == 0:
        struct = init_task
    else:
        size = machine.layouts.sizeof("task_struct")
        address = machine.slab.kzalloc(size, f"task_struct {comm}")
        machine.space.write(address, machine.space.read(init_task.address_, size))
        struct = machine.layouts.view("task_struct", machine.space, address)
        struct.comm = comm.encode()
        init_list_head(struct.tasks)
        init_list_head(struct.thread_group)
        struct.group_leader = address
    struct.thread_info.cpu = cpu.number
    struct.flags = PF_IDLE | PF_KTHREAD
    struct.on_cpu = 1
    struct.patch_state = UNDEFINED_STATE
    return _with_stack(machine, struct.address_, comm, cpu, idle=True)


def new_task(machine: "Machine", comm: str, cpu: VCpu, *, kthread: bool = False, flags: int = 0) -> Task:
    """A task that is the child of nobody: what is there when a scenario begins.

    It starts as a child of the idle task, with its patch_state (klp_copy_process()).
    """
    parent = machine.by_struct[machine.symbol("init_task")]
    return _fork(machine, parent, comm, cpu, kthread, flags)


def copy_process(machine: "Machine", parent: Task) -> Task:
    """fork(2) by the current task: the child has the parent's patch_state and TIF_PATCH_PENDING."""
    flags = machine.view("task_struct", parent.struct).flags
    child = _fork(machine, parent, parent.name, parent.cpu, parent.kthread, flags)
    parent.children[child.struct] = child
    return child


def do_exit(machine: "Machine", task: Task) -> None:
    """The current task ends: off the task list first, its stack and struct are freed by release_task()."""
    struct = machine.view("task_struct", task.struct)
    struct.flags = struct.flags | PF_EXITING
    with write_locked(machine, "tasklist_lock"):
        list_del_rcu(struct.tasks)
        _forget_original_parent(machine, task)
    machine.tasks.remove(task)
    task.dead = True
    machine.space.write(struct.member_("__state"), TASK_DEAD.to_bytes(4, "little"))


def _forget_original_parent(machine: "Machine", task: Task) -> None:
    """Its children become those of the task that never ends."""
    for child in task.children.values():
        struct = machine.view("task_struct", child.struct)
        struct.parent = struct.real_parent = machine.symbol("init_task")
    task.children.clear()


def release_task(machine: "Machine", task: Task) -> None:
    """Nobody runs on the stack of a dead task any more (finish_task_switch(), put_task_struct())."""
    parent = machine.by_struct[machine.layouts.view("task_struct", machine.space, task.struct).real_parent]
    parent.children.pop(task.struct, None)
    del machine.by_struct[task.struct]
    machine.slab.kfree(task.struct)
    machine.stacks.free(task.stack_top)


def replace_stack(machine: "Machine", task: Task) -> None:
    """Give a task that was torn out of the middle another stack.

    What guest code has put on the old one may be in use for ever: the entry of a wait queue, say.
    """
    task.stack_top = machine.stacks.alloc()
    machine.layouts.view("task_struct", machine.space, task.struct).stack = task.stack_top - THREAD_SIZE
    machine.frames.prepare(task)
    rq = machine.sched.rq_of(task)
    if rq.curr is task:
        machine.sched.set_current(rq, task)


def _fork(machine: "Machine", parent: Task, comm: str, cpu: VCpu, kthread: bool, flags: int) -> Task:
    if not 0 < len(comm.encode()) < TASK_COMM_LEN or "\0" in comm:
        raise KlpemuError(
            f"no task can be called {comm!r}", advice=f"comm has 1 to {TASK_COMM_LEN - 1} bytes"
        )
    size = machine.layouts.sizeof("task_struct")
    address = machine.slab.kzalloc(size, f"task_struct {comm}")
    # dup_task_struct(): flags and patch_state too, as they are at this moment.
    machine.space.write(address, machine.space.read(parent.struct, size))
    struct = machine.layouts.view("task_struct", machine.space, address)
    machine.last_pid += 1
    struct.pid = struct.tgid = machine.last_pid
    struct.comm = comm.encode()
    struct.flags = (flags & ~(PF_IDLE | PF_KTHREAD)) | (PF_KTHREAD if kthread else 0)
    struct.thread_info.cpu = cpu.number
    struct.__state = TASK_NEW
    struct.on_cpu = struct.on_rq = 0
    struct.nvcsw = struct.nivcsw = 0
    struct.trace_recursion = 0
    struct.parent = struct.real_parent = parent.struct
    struct.group_leader = address
    init_list_head(struct.thread_group)
    init_list_head(struct.tasks)
    task = _with_stack(machine, address, comm, cpu, kthread=kthread)
    with write_locked(machine, "tasklist_lock"):
        machine.klp_copy_process(address, parent.struct)
        list_add_tail(
            machine.view("task_struct", address).tasks,
            machine.view("task_struct", machine.symbol("init_task")).tasks,
        )
    machine.tasks.append(task)
    return task


def _with_stack(
    machine: "Machine", address: int, comm: str, cpu: VCpu, *, kthread: bool = False, idle: bool = False
) -> Task:
    top = machine.stacks.alloc()
    struct = machine.layouts.view("task_struct", machine.space, address)
    struct.stack = top - THREAD_SIZE
    task = Task(comm, address, top, cpu, kthread, idle)
    machine.frames.prepare(task)
    machine.by_struct[address] = task
    return task
