"""What modules wait with: mutexes, wait queues, completions and spin locks, called from tasks."""

import pytest
from machines import boot

from elf.errors import KlpemuError
from emu.fork import new_task
from emu.machine import Machine
from emu.memory import read_u32, read_u64
from emu.schedules import RoundRobin
from emu.task import GuestCall, Task
from emu.thread_info import TIF_NOTIFY_SIGNAL, set_tsk_thread_flag
from emu.timer import HZ

EINTR, ERESTARTSYS = 4, 512
TASK_INTERRUPTIBLE, TASK_UNINTERRUPTIBLE, TASK_NORMAL = 1, 2, 3


class World:
    """A machine with two vCPUs and tasks that call exports."""

    def __init__(self) -> None:
        self.machine = boot(cpus=2)
        self.machine.hub.schedule = RoundRobin()
        self.timers = self.machine.timers

    def struct(self, name: str) -> int:
        """Address of a zeroed struct."""
        return self.machine.slab.kzalloc(self.machine.layouts.sizeof(name), name)

    def start(self, function: str, *arguments: int, cpu: int = 1) -> tuple[Task, GuestCall]:
        """Let a task of its own call an export, and go as far as it can."""
        task = new_task(self.machine, function[:15], self.machine.cpus[cpu])
        call = self.machine.hub.call(task, self.machine.symbol(function), arguments)
        self.settle()
        return task, call

    def settle(self) -> None:
        """Let everybody go on who can."""
        self.machine.run(lambda: not self.machine.sched.candidates())

    def call(self, function: str, *arguments: int) -> int:
        """Call an export, which must come back at once."""
        _, call = self.start(function, *arguments, cpu=0)
        assert call.finished, f"{function} sleeps"
        assert call.error is None
        return signed(call.result)

    def signal(self, task: Task) -> None:
        """A fake signal."""
        set_tsk_thread_flag(self.machine, task.struct, TIF_NOTIFY_SIGNAL)
        self.machine.sched.try_to_wake_up(task, TASK_INTERRUPTIBLE)
        self.settle()

    def mutex(self) -> int:
        """A free mutex."""
        lock = self.struct("mutex")
        self.call("__mutex_init", lock, 0, 0)
        return lock

    def completion(self) -> int:
        """A completion that is not done."""
        found = self.struct("completion")
        self.call("__init_swait_queue_head", found + self.machine.layouts.offsetof("completion", "wait"))
        return found

    def queue(self) -> int:
        """An empty wait queue."""
        head = self.struct("wait_queue_head")
        self.call("__init_waitqueue_head", head)
        return head

    def waiting(self, head: int) -> list[int]:
        """The entries on a wait queue, in order."""
        first = head + self.machine.layouts.offsetof("wait_queue_head", "head")
        node = self.machine.layouts.offsetof("wait_queue_entry", "entry")
        found, at = [], read_u64(self.machine.space, first)
        while at != first:
            found.append(at - node)
            at = read_u64(self.machine.space, at)
        return found


def signed(value: object) -> int:
    """RAX as an int."""
    low = int(str(value)) & 0xFFFF_FFFF
    return low - (1 << 32) if low >> 31 else low


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize("function", ["mutex_lock_interruptible", "mutex_lock_killable"])
def test_a_mutex_is_given_to_who_waits_for_it(world: World, function: str) -> None:
    lock = world.mutex()
    assert world.call("mutex_is_locked", lock) == 0
    world.call("mutex_lock", lock)
    task, call = world.start(function, lock)
    assert not call.finished
    assert world.call("mutex_is_locked", lock) == 1
    world.call("mutex_unlock", lock)
    assert (call.finished, signed(call.result)) == (True, 0)
    assert read_u64(world.machine.space, lock) == task.struct


def test_a_signal_ends_an_interruptible_wait_for_a_mutex(world: World) -> None:
    lock = world.mutex()
    world.call("mutex_lock", lock)
    owner = read_u64(world.machine.space, lock)
    task, call = world.start("mutex_lock_interruptible", lock)
    world.signal(task)
    assert (call.finished, signed(call.result)) == (True, -EINTR)
    assert read_u64(world.machine.space, lock) == owner
    mutex = world.machine.layouts.view("mutex", world.machine.space, lock)
    assert mutex.wait_list.next == mutex.wait_list.address_


def test_a_signal_does_not_end_a_killable_wait_for_a_mutex(world: World) -> None:
    lock = world.mutex()
    world.call("mutex_lock", lock)
    task, call = world.start("mutex_lock_killable", lock)
    world.signal(task)
    assert not call.finished


def test_an_interruptible_wait_for_a_completion_ends_by_time_signal_or_completion(world: World) -> None:
    name = "wait_for_completion_interruptible_timeout"
    _, late = world.start(name, world.completion(), 2 * HZ)
    interrupted, signalled = world.start(name, world.completion(), 2 * HZ)
    done = world.completion()
    _, completed = world.start(name, done, 2 * HZ)
    world.timers.advance_to(world.timers.now + HZ)
    world.signal(interrupted)
    world.call("complete", done)
    assert not late.finished
    world.timers.advance_to(world.timers.now + HZ)
    world.settle()
    assert [signed(each.result) for each in (late, signalled)] == [0, -ERESTARTSYS]
    assert HZ - 2 <= signed(completed.result) <= HZ


def test_a_completion_that_is_done_is_used_up_by_one(world: World) -> None:
    done = world.completion()
    assert world.call("completion_done", done) == 0
    assert world.call("try_wait_for_completion", done) == 0
    world.call("complete", done)
    assert world.call("completion_done", done) == 1
    assert world.call("try_wait_for_completion", done) == 1
    assert world.call("try_wait_for_completion", done) == 0
    world.call("complete", done)
    assert world.call("wait_for_completion_killable", done) == 0
    assert world.call("completion_done", done) == 0


def test_a_completion_for_everybody_is_never_used_up(world: World) -> None:
    done = world.completion()
    world.call("complete_all", done)
    assert [world.call("try_wait_for_completion", done) for _ in range(3)] == [1, 1, 1]


def test_entries_of_a_wait_queue_are_where_the_kernel_puts_them(world: World) -> None:
    """Those that are always woken in front, newest first; the exclusive ones behind, oldest first."""
    head = world.queue()
    entries = [world.struct("wait_queue_entry") for _ in range(4)]
    for entry, function in zip(entries, ["add_wait_queue", "add_wait_queue_exclusive"] * 2, strict=True):
        world.call(function, head, entry)
    assert world.waiting(head) == [entries[2], entries[0], entries[1], entries[3]]
    flags = [
        world.machine.layouts.view("wait_queue_entry", world.machine.space, each).flags for each in entries
    ]
    assert flags == [0, 1, 0, 1]
    for entry in entries[:3]:
        world.call("remove_wait_queue", head, entry)
    assert world.waiting(head) == entries[3:]


def test_an_exclusive_waiter_learns_whether_it_is_alone(world: World) -> None:
    head = world.queue()
    entries = [world.struct("wait_queue_entry") for _ in range(2)]
    answers = []
    for entry in entries:
        world.call("init_wait_entry", entry, 0)
        answers.append(world.call("prepare_to_wait_exclusive", head, entry, TASK_UNINTERRUPTIBLE))
    assert answers == [1, 0]
    assert world.waiting(head) == entries


@pytest.mark.parametrize("form", ["", "_irq", "_bh", "_irqsave"])
def test_a_spin_lock_keeps_the_other_vcpu_out_and_its_own_busy(world: World, form: str) -> None:
    machine = world.machine
    lock = machine.slab.kzalloc(4, "raw_spinlock_t")
    count = machine.cpus[0].gs_base + machine.vmlinux.symbols["__preempt_count"]
    world.call(f"_raw_spin_lock{form}", lock)
    assert (read_u32(machine.space, lock), read_u32(machine.space, count)) == (1, 0x8000_0001)
    task = new_task(machine, "spinner", machine.cpus[1])
    call = machine.hub.call(task, machine.symbol(f"_raw_spin_lock{form}"), (lock,))
    machine.run(lambda: False, jiffies=5)
    assert not call.finished
    assert task.running
    unlock = f"_raw_spin_unlock{form.replace('save', 'restore')}"
    host = new_task(machine, "unlocker", machine.cpus[0])
    done = machine.hub.call(host, machine.symbol(unlock), (lock, 0))
    machine.run(lambda: done.finished and call.finished)
    assert (read_u32(machine.space, lock), read_u32(machine.space, count)) == (1, 0x8000_0000)
    other = machine.cpus[1].gs_base + machine.vmlinux.symbols["__preempt_count"]
    assert read_u32(machine.space, other) == 0x8000_0001


def links(machine: Machine, *nodes: int) -> None:
    """Make a circular list."""
    for node, after in zip(nodes, [*nodes[1:], nodes[0]], strict=True):
        machine.space.write(node, after.to_bytes(8, "little"))
        machine.space.write(after + 8, node.to_bytes(8, "little"))


def test_a_damaged_list_is_found_before_it_is_changed(world: World) -> None:
    machine = world.machine
    nodes = [world.struct("list_head") for _ in range(3)]
    links(machine, *nodes)
    new = world.struct("list_head")
    assert world.call("__list_add_valid", new, nodes[0], nodes[1]) == 1
    assert world.call("__list_del_entry_valid", nodes[1]) == 1
    for bad in [(new, nodes[0], nodes[2]), (nodes[0], nodes[0], nodes[1]), (nodes[1], nodes[0], nodes[1])]:
        _, call = world.start("__list_add_valid", *bad, cpu=0)
        assert isinstance(call.error, KlpemuError)
        assert "list_add corruption" in str(call.error)
    machine.space.write(nodes[2] + 8, nodes[0].to_bytes(8, "little"))
    _, call = world.start("__list_del_entry_valid", nodes[1], cpu=0)
    assert "list_del corruption" in str(call.error)


def test_an_entry_that_was_deleted_is_not_deleted_again(world: World) -> None:
    node = world.struct("list_head")
    world.machine.space.write(node, (0xDEAD_0000_0000_0100).to_bytes(8, "little"))
    _, call = world.start("__list_del_entry_valid", node, cpu=0)
    assert "list_del corruption" in str(call.error)


@pytest.mark.parametrize("function", ["__SCT__cond_resched", "__SCT__might_resched"])
def test_a_static_call_of_voluntary_preemption_lets_others_run(world: World, function: str) -> None:
    machine = world.machine
    for full, expected in ((False, 1), (True, 0)):
        machine.sched.full_preemption = full
        first, second = (new_task(machine, name, machine.cpus[1]) for name in ("first", "second"))
        call = machine.hub.call(first, machine.symbol(function))
        machine.hub.call(second, machine.symbol("area_of"), (3, 4))
        world.settle()
        assert signed(call.result) == expected
        assert world.call(function) == 0, "nobody waits"


def test_jiffies_and_milliseconds(world: World) -> None:
    assert [world.call("__msecs_to_jiffies", each) for each in (0, 1, 4, 5, 1000)] == [0, 1, 1, 2, HZ]
    assert [world.call("jiffies_to_msecs", each) for each in (0, 1, HZ)] == [0, 4, 1000]


def test_guest_code_that_stops_at_the_first_byte_of_an_export_has_not_returned(world: World) -> None:
    """The stub before it ends with the instruction that calls from outside return to."""
    machine = world.machine
    task = new_task(machine, "stepper", machine.cpus[1])
    call = machine.hub.call(task, machine.symbol("work"), (3,))
    while not call.finished:
        machine.hub.advance(task, 1)
    assert call.result == 3 * 0x11
