"""Machines to test on: the fixture kernel with guest functions that only tests need, and ops to register."""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from elf.image import Image
from emu.assembly import Code
from emu.cpu import VCpu
from emu.fork import THREAD_SIZE, new_task
from emu.ftrace import FtraceOpsFl
from emu.machine import Machine
from emu.memory import read_u32, read_u64
from emu.program import Operation, TaskProgram, start
from emu.schedules import Seeded
from emu.task import Task
from emu.thread_info import TASK_RUNNING
from emu.view import Layouts, list_for_each_entry

FIXTURES = Path(__file__).parents[2] / "fixtures" / "build"
# What a real kernel did; where it comes from is said inside.
RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("recorded.json").read_text())

# What a C function may destroy, and record_order's and clobber's own arguments: ip, parent_ip, op, fregs.
CALLER_SAVED = ("rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11")
DESTROYED = 0x0BAD_0BAD_0BAD_0BAD


@cache
def image(name: str) -> Image:
    """A fixture object, parsed once."""
    return Image.open(FIXTURES / name)


def append_test_code(code: Code, layouts: Layouts, per_cpu: dict[str, int], fixups: dict[int, str]) -> None:
    """Handlers that say in which order they ran, or destroy all they may; functions that call an export."""
    private = layouts.offsetof("ftrace_ops", "private")
    code.align(16).label("record_order").asm(
        f"mov rax, [rdx + {private}]\n mov r8, [rax]\n inc qword ptr [rax]\n mov [rax + r8*8 + 8], rdx\n ret"
    )
    code.align(16).label("clobber").asm(
        "\n".join(f"movabs {name}, {DESTROYED:#x}" for name in CALLER_SAVED) + "\n xor eax, eax\n stc\n ret"
    )
    code.align(16).label("call_export").asm("sub rsp, 8").raw("e8 00000000")
    fixups[len(code.bytes) - 4] = "test_export"
    code.asm("add rsp, 8\n inc rax\n ret")
    code.align(16).label("loop_export").label("loop_export_again").asm("sub rsp, 8").raw("e8 00000000")
    fixups[len(code.bytes) - 4] = "test_export"
    code.asm("add rsp, 8").jump("jmp", code.labels["loop_export_again"])
    code.align(16).label("own_int3").raw("cc 48c7c02a000000 c3")  # int3; mov rax, 42; ret
    code.align(16).label("own_ud2").raw("0f0b c3")
    code.align(16).label("redirect").asm(
        f"mov rax, [rdx + {private}]\n mov [rcx + {layouts.offsetof('pt_regs', 'ip')}], rax\n ret"
    )
    code.align(16).label("late_fault").asm(
        "again:\n nop\n dec rdi\n jnz again\n mov qword ptr [rdi], rdi\n ret"
    )


def boot(*, cpus: int = 1, command_line: str = "") -> Machine:
    """A fresh machine with the fixture kernel."""
    return Machine(
        image("kernel.o"),
        entry_code=(append_test_code,),
        stubs=("test_export",),
        cpus=cpus,
        command_line=command_line,
    )


def new_ops(
    machine: Machine,
    sites: Iterable[str] = (),
    *,
    func: str = "trace_count",
    flags: int = 0,
    private: int = 0,
) -> Any:
    """A view of a `struct ftrace_ops` in guest memory; without `private` it gets a counter of its own."""
    ops = machine.view("ftrace_ops", machine.slab.kzalloc(machine.layouts.sizeof("ftrace_ops"), "ftrace_ops"))
    ops.func = machine.symbol(func)
    ops.flags = flags
    ops.private = private or machine.slab.kzalloc(8, "counter")
    for name in sites:
        machine.ftrace.ftrace_set_filter_ip(ops, machine.symbol(name), remove=False)
    return ops


def registered(
    machine: Machine, sites: Iterable[str], *, func: str = "trace_count", flags: int = 0, private: int = 0
) -> Any:
    """A registered ops."""
    ops = new_ops(machine, sites, func=func, flags=flags, private=private)
    machine.ftrace.register_ftrace_function(ops)
    return ops


def count_of(machine: Machine, ops: Any) -> int:
    """How often `trace_count` ran for an ops."""
    return int.from_bytes(machine.space.read(ops.private, 8), "little")


def in_the_middle(machine: Machine, cpu: VCpu, entry: int, **registers: int) -> None:
    """Let a vCPU stand at `entry` as if it had just been called, on the stack kept for streams."""
    rsp = machine.stream_stack - 512
    machine.space.write(rsp, machine.return_address.to_bytes(8, "little"))
    cpu.set_registers({"rsp": rsp, "rip": entry, "eflags": 2} | registers)


def site_of(machine: Machine, name: str) -> bytes:
    """The five bytes of a function's site."""
    return machine.space.read(machine.ftrace.ftrace_location(machine.symbol(name)), 5)


def call_at(address: int, target: int) -> bytes:
    """`call rel32`, worked out here and not by the code under test."""
    return b"\xe8" + ((target - address - 5) & 0xFFFF_FFFF).to_bytes(4, "little")


def record_of(machine: Machine, name: str) -> Any:
    """The `struct dyn_ftrace` of a function's site."""
    address = machine.symbol(name)
    record = machine.ftrace.records.lookup_rec(address, address)
    assert record is not None
    return record


class Steps:
    """A schedule that is a list of (vCPU number, instructions); behind its end the finishing task goes on."""

    interleaves = True

    def __init__(self, steps: Sequence[tuple[int, int | None]]) -> None:
        self.left = list(steps)

    def pick(self, tasks: Sequence[Task], finishing: Task) -> tuple[Task, int | None]:
        while self.left:
            number, instructions = self.left.pop(0)
            for task in tasks:
                if task.cpu.number == number:
                    return task, instructions
        return (finishing if finishing in tasks else tasks[0]), None


REGS = int(FtraceOpsFl.SAVE_REGS)
IPMODIFY = int(FtraceOpsFl.IPMODIFY)


def ftrace_world(machine: Machine) -> tuple[object, ...]:
    """All that a failed registration must leave alone: text, records, lists, globals and allocations."""
    space = machine.space
    text = [space.read(each.address, len(each.contents)) for each in machine.modules.objects[""].texts]
    names = ("ftrace_ops_list", "ftrace_trace_function", "function_trace_op", "ftrace_ops_trampoline_list")
    variables = [space.read(machine.symbol(name), 8) for name in (*names, "ftrace_start_up")]
    records = [(record.ip, record.flags) for record in machine.ftrace.records]
    listed = [(ops.address_, ops.next, ops.func, ops.trampoline) for ops in machine.ftrace.each_ops()]
    return text, variables, records, listed, dict(machine.slab.live), dict(machine.area.live)


def call(machine: Machine, function: str, *arguments: int) -> Operation:
    """The step of a program that calls a guest function, or the stub of an export."""
    text = f"{function}({', '.join(map(str, arguments))})"
    return Operation(text, "call", machine.symbol(function), arguments)


def step(verb: str, msecs: int = 0) -> Operation:
    """Any other step of a program: sleep, user, pause, yield, fork, exit."""
    return Operation(f"{verb}({msecs})", verb, msecs=msecs)


def spawn(
    machine: Machine,
    name: str,
    *operations: Operation,
    cpu: int = 0,
    kthread: bool = False,
    repeat: int | None = 1,
) -> Task:
    """A task that runs a program and exits."""
    task = new_task(machine, name, machine.cpus[cpu], kthread=kthread)
    start(machine, task, TaskProgram(machine, operations, repeat=repeat))
    return task


def is_gone(machine: Machine, task: Task) -> bool:
    """The task has exited, and its stack and struct are freed."""
    return machine.by_struct.get(task.struct) is not task


def run_to_the_end(machine: Machine, *tasks: Task, jiffies: int = 50_000) -> None:
    """Let the machine go on until the tasks have exited."""
    assert machine.run(lambda: all(is_gone(machine, task) for task in tasks), jiffies)


def results(task: Task) -> list[int]:
    """What the calls of a task's program have returned so far."""
    return [value for _, value in task.program.results]


def struct_of(machine: Machine, task: Task) -> Any:
    """The task_struct of a task, looked at without doors and events."""
    return machine.layouts.view("task_struct", machine.space, task.struct)


def assert_consistent(machine: Machine) -> None:
    """What guest memory says of tasks and vCPUs is what the scheduler does with them."""
    for rq in machine.sched.runqueues:
        base, symbols = rq.cpu.gs_base, machine.vmlinux.symbols
        assert read_u64(machine.space, base + symbols["current_task"]) == rq.curr.struct
        assert read_u64(machine.space, base + symbols["cpu_current_top_of_stack"]) == rq.curr.stack_top
        assert len(set(rq.queue)) == len(rq.queue)
        assert rq.idle not in rq.queue
    idle = [rq.idle for rq in machine.sched.runqueues]
    for task in (*machine.tasks, *idle):
        struct, rq = struct_of(machine, task), machine.sched.rq_of(task)
        state, where = struct.__state, (task.name, task)
        assert struct.on_cpu == (rq.curr is task), where
        assert task.queued == (task in rq.queue), where
        assert not (task.running and task.queued), where
        assert not task.running or rq.curr is task, where
        assert struct.stack + THREAD_SIZE == task.stack_top, where
        assert struct.thread_info.cpu == rq.cpu.number, where
        if not task.running:
            assert struct.stack < struct.thread.sp < task.stack_top, where
        if not task.idle:
            assert struct.on_rq == (task.running or task.queued), where
            assert struct.on_rq or state != TASK_RUNNING, where
    if read_u32(machine.space, machine.symbol("tasklist_lock")):
        return
    listed = list_for_each_entry(struct_of(machine, idle[0]).tasks, "task_struct", "tasks")
    assert [each.address_ for each in listed] == [task.struct for task in machine.tasks]


class Checked(Seeded):
    """A seeded schedule that looks at the whole machine at every pick."""

    def __init__(self, machine: Machine, seed: int) -> None:
        super().__init__(seed)
        self._machine = machine

    def pick(self, tasks: Sequence[Task], finishing: Task) -> tuple[Task, int | None]:
        assert_consistent(self._machine)
        return super().pick(tasks, finishing)
