"""Tasks come and go: what a child gets from its parent, and what is given back at the end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interleavings import interleavings
from machines import assert_consistent, boot, call, is_gone, results, run_to_the_end, spawn, step, struct_of

from elf.errors import KlpemuError
from emu.fork import THREAD_SIZE, copy_process, do_exit, new_task
from emu.machine import Machine
from emu.rwlock import read_locked
from emu.schedules import Explicit, RoundRobin, Seeded
from emu.task import Task
from emu.thread_info import (
    PF_EXITING,
    PF_IDLE,
    PF_KTHREAD,
    PF_WQ_WORKER,
    TASK_DEAD,
    TASK_NEW,
    TASK_RUNNING,
    TIF_PATCH_PENDING,
    clear_tsk_thread_flag,
    set_tsk_thread_flag,
)
from emu.view import list_for_each_entry


@pytest.fixture
def machine() -> Machine:
    """Two vCPUs that take turns."""
    machine = boot(cpus=2)
    machine.hub.schedule = RoundRobin()
    return machine


def listed(machine: Machine) -> list[int]:
    """The task list as guest memory has it, forwards and backwards the same."""
    head = machine.layouts.view("task_struct", machine.space, machine.symbol("init_task")).tasks
    forwards = [each.address_ for each in list_for_each_entry(head, "task_struct", "tasks")]
    at, backwards = head.prev, []
    offset = machine.layouts.offsetof("task_struct", "tasks")
    while at != head.address_:
        backwards.append(at - offset)
        at = machine.layouts.view("list_head", machine.space, at).prev
    assert forwards == backwards[::-1]
    return forwards


def fork(machine: Machine, parent: Task) -> Task:
    """A child of a task that does nothing else."""
    service = machine.hub.serve(parent, "fork", lambda: copy_process(machine, parent))
    machine.run(lambda: service.finished, 10)
    child: Task = service.result
    return child


# Born.


def test_a_new_task_is_the_last_on_the_list_with_the_next_pid(machine: Machine) -> None:
    before = listed(machine)
    task = new_task(machine, "fresh", machine.cpus[1])
    struct = struct_of(machine, task)
    assert listed(machine) == [*before, task.struct]
    assert machine.tasks[-1] is task
    assert struct.pid == struct.tgid == machine.pid_of(machine.tasks[-2]) + 1
    assert struct.comm == b"fresh".ljust(16, b"\0")
    assert struct.thread_info.cpu == 1
    assert struct.stack + THREAD_SIZE == task.stack_top
    assert (struct.on_cpu, struct.on_rq, struct.__state) == (0, 0, TASK_NEW)
    assert struct.group_leader == task.struct
    assert_consistent(machine)


@pytest.mark.parametrize("kthread", [False, True])
def test_only_a_kernel_thread_has_the_flag_of_one(machine: Machine, kthread: bool) -> None:
    task = new_task(machine, "t", machine.cpus[0], kthread=kthread, flags=PF_WQ_WORKER)
    flags = struct_of(machine, task).flags
    assert bool(flags & PF_KTHREAD) == kthread
    assert flags & PF_WQ_WORKER
    assert not flags & PF_IDLE


def test_a_task_runs_only_once_it_is_started(machine: Machine) -> None:
    task = new_task(machine, "t", machine.cpus[0])
    machine.run(lambda: False, 50)
    assert struct_of(machine, task).__state == TASK_NEW
    assert struct_of(machine, task).nvcsw == 0
    service = machine.hub.serve(task, "first", lambda: struct_of(machine, task).__state)
    machine.run(lambda: service.finished, 10)
    assert service.result == TASK_RUNNING


@pytest.mark.parametrize("comm", ["", "sixteen letters!", "fünfzehn Bytes!", "a\0b"])
def test_a_name_that_does_not_fit_is_refused_before_anything_is_made(machine: Machine, comm: str) -> None:
    before = listed(machine), dict(machine.slab.live), machine.last_pid
    with pytest.raises(KlpemuError, match="no task can be called"):
        new_task(machine, comm, machine.cpus[0])
    assert (listed(machine), dict(machine.slab.live), machine.last_pid) == before


@pytest.mark.parametrize("comm", ["x", "fifteen letters", "vierzehn Bytü"])
def test_a_name_of_fifteen_bytes_fits(machine: Machine, comm: str) -> None:
    task = new_task(machine, comm, machine.cpus[0])
    assert struct_of(machine, task).comm.rstrip(b"\0").decode() == comm


# Forked.


def test_a_child_is_its_parents_likeness_but_for_what_is_its_own(machine: Machine) -> None:
    parent = new_task(machine, "parent", machine.cpus[1])
    struct_of(machine, parent).stack_canary = 0x1234
    struct_of(machine, parent).nvcsw, struct_of(machine, parent).nivcsw = 5, 6
    child = fork(machine, parent)
    mine, theirs = struct_of(machine, child), struct_of(machine, parent)
    assert (mine.comm, mine.stack_canary, mine.flags) == (theirs.comm, 0x1234, theirs.flags)
    assert child.cpu is parent.cpu
    assert mine.parent == mine.real_parent == parent.struct
    assert mine.pid == theirs.pid + 1
    assert mine.stack != theirs.stack
    assert (mine.nvcsw, mine.nivcsw, mine.trace_recursion) == (0, 0, 0)
    assert mine.thread_group.next == mine.thread_group.address_


def test_a_child_of_a_kernel_thread_is_one(machine: Machine) -> None:
    child = fork(machine, new_task(machine, "kt", machine.cpus[0], kthread=True))
    assert child.kthread
    assert struct_of(machine, child).flags & PF_KTHREAD


def copy_pending(machine: Machine, child: int, parent: int) -> None:
    """What livepatch does in klp_copy_process()."""
    assert int.from_bytes(machine.space.read(machine.symbol("tasklist_lock"), 4), "little") == 0xFF
    flags = machine.view("task_struct", parent).thread_info.flags
    change = set_tsk_thread_flag if flags & TIF_PATCH_PENDING else clear_tsk_thread_flag
    change(machine, child, TIF_PATCH_PENDING)
    machine.view("task_struct", child).patch_state = machine.view("task_struct", parent).patch_state


def test_a_fork_in_a_transition_gives_the_child_what_the_parent_has_at_that_moment() -> None:
    """Somebody else starts a transition at any door of the fork: nobody is forgotten."""
    machine = boot(cpus=2)
    machine.klp_copy_process = lambda child, parent: copy_pending(machine, child, parent)
    parent, other = machine.tasks[:2]

    def start() -> None:
        with read_locked(machine, "tasklist_lock"):
            for struct in list(
                list_for_each_entry(machine.view("task_struct", head).tasks, "task_struct", "tasks")
            ):
                struct.patch_state = 1
                set_tsk_thread_flag(machine, struct.address_, TIF_PATCH_PENDING)

    head = machine.symbol("init_task")
    when = set()
    for schedule in interleavings(2):
        for struct in listed(machine):
            machine.layouts.view("task_struct", machine.space, struct).patch_state = 0
            clear_tsk_thread_flag(machine, struct, TIF_PATCH_PENDING)
        machine.hub.schedule = schedule
        forked = machine.hub.serve(parent, "fork", lambda: copy_process(machine, parent))
        started = machine.hub.serve(other, "start", start)
        machine.hub.finish(parent, forked)
        machine.hub.finish(other, started)
        child = struct_of(machine, forked.result)
        assert (child.patch_state, bool(child.thread_info.flags & TIF_PATCH_PENDING)) == (1, True)
        when.add(schedule.picks)
        leave(machine, forked.result)
    assert len(when) > 1


def leave(machine: Machine, task: Task) -> None:
    machine.hub.serve(task, "do_exit", lambda: do_exit(machine, task))
    machine.run(lambda: is_gone(machine, task), 100)


def test_new_tasks_are_told_to_livepatch_with_the_idle_task_as_their_parent(machine: Machine) -> None:
    told = []
    machine.klp_copy_process = lambda child, parent: told.append((child, parent))
    task = new_task(machine, "t", machine.cpus[1])
    assert told == [(task.struct, machine.symbol("init_task"))]


# Dead.


def test_an_exit_takes_the_task_off_the_list_and_frees_what_it_had(machine: Machine) -> None:
    before = listed(machine), dict(machine.slab.live)
    task = new_task(machine, "t", machine.cpus[1])
    leave(machine, task)
    assert (listed(machine), dict(machine.slab.live)) == before
    assert task.struct not in machine.by_struct
    assert task not in machine.tasks
    assert new_task(machine, "next", machine.cpus[0]).stack_top == task.stack_top, "the stack is used again"
    assert machine.slab.corruptions(machine.space) == []


def test_nothing_is_freed_while_somebody_may_run_on_it() -> None:
    """Between do_exit() and the next switch the dead task is still current, on its own stack."""
    machine = boot()
    task = spawn(machine, "t", step("exit"))
    seen = []

    def look() -> None:
        if task.dead:
            struct = struct_of(machine, task)
            seen.append((struct.__state, bool(struct.flags & PF_EXITING), struct.on_cpu))
            assert machine.sched.runqueues[0].curr is task
            assert task.struct in machine.slab.live
            assert task.stack_top not in machine.stacks._free

    def gone() -> bool:
        if not is_gone(machine, task):
            look()
        return is_gone(machine, task)

    machine.hub.schedule = Seeded(1)
    machine.run(gone)
    assert set(seen) == {(TASK_DEAD, True, 1)}
    assert machine.sched.runqueues[0].curr is not task


def test_a_stack_that_is_used_again_is_clean_and_has_its_guard_page(machine: Machine) -> None:
    first = spawn(machine, "first", call(machine, "nap_below", 100, 4))
    run_to_the_end(machine, first)
    second = new_task(machine, "second", machine.cpus[0])
    assert second.stack_top == first.stack_top
    bottom = second.stack_top - THREAD_SIZE
    below = THREAD_SIZE - 512  # above is the frame that it begins with
    assert machine.space.read(bottom, below) == bytes(below)
    assert machine.space.access(bottom - 1) is None


def test_the_children_of_a_dead_task_become_those_of_the_first(machine: Machine) -> None:
    parent = new_task(machine, "parent", machine.cpus[0])
    children = [fork(machine, parent) for _ in range(3)]
    leave(machine, children[1])
    leave(machine, parent)
    for child in (children[0], children[2]):
        struct = struct_of(machine, child)
        assert struct.parent == struct.real_parent == machine.symbol("init_task")
    grandchild = fork(machine, children[0])
    leave(machine, children[0])
    leave(machine, children[2])
    leave(machine, grandchild)
    assert machine.slab.corruptions(machine.space) == []


def test_a_struct_that_is_used_again_is_nobodys_child_by_mistake(machine: Machine) -> None:
    """A child that has gone before its parent is forgotten, and its address may be another's."""
    parent = new_task(machine, "parent", machine.cpus[0])
    leave(machine, fork(machine, parent))
    assert parent.children == {}


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1 << 30), tasks=st.integers(1, 3), deep=st.integers(1, 3))
def test_however_many_fork_and_exit_nothing_is_left(seed: int, tasks: int, deep: int) -> None:
    machine = boot(cpus=2)
    machine.hub.schedule = Seeded(seed)
    before = listed(machine), dict(machine.slab.live), len(machine.by_struct)
    program = [step("fork")] * deep + [call(machine, "nap", 4)]
    for number in range(tasks):
        spawn(machine, f"t{number}", *program, cpu=number % 2)
    first = machine.last_pid - tasks
    most = 0

    def only_the_old_ones() -> bool:
        nonlocal most
        most = max(most, len(machine.by_struct))
        return len(machine.by_struct) == before[2]

    assert machine.run(only_the_old_ones, 2000)
    assert (listed(machine), dict(machine.slab.live)) == before[:2]
    assert machine.last_pid - first == tasks * 2**deep
    assert machine.slab.corruptions(machine.space) == []
    assert len(machine.stacks._free) == most - len(machine.by_struct)


def test_a_dead_tasks_vcpu_goes_on_with_who_waits(machine: Machine) -> None:
    first = spawn(machine, "first", step("exit"))
    second = spawn(machine, "second", call(machine, "both_steps"), step("sleep", 4000))
    machine.hub.schedule = Explicit([("first", 1)] * 8)
    machine.run(lambda: is_gone(machine, first))
    machine.hub.schedule = RoundRobin()
    machine.run(lambda: bool(results(second)), 10)
    assert_consistent(machine)


def test_a_task_costs_as_much_however_many_there_are() -> None:
    """Counted in events, not in time: each task costs as many, however many there are."""

    def events_for(count: int) -> int:
        machine = boot(cpus=2)
        machine.hub.schedule = RoundRobin()
        before = machine.events.total
        tasks = [
            spawn(machine, f"t{number}", call(machine, "nap", 4), cpu=number % 2) for number in range(count)
        ]
        run_to_the_end(machine, *tasks)
        return machine.events.total - before

    few, many = events_for(30), events_for(300)
    assert many <= 10 * few * 1.05
