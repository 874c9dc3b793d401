"""The machine put together: memory, vCPUs, tasks, the kernel image and ftrace."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from elf.image import Image
from elf.layout import struct_layouts
from elf.mcount import fentry_sites
from emu import mutex, sleep, wait
from emu.arena import ARENA_SIZE, Arena
from emu.cpu import VCpu
from emu.entry import exit_to_user_mode_loop as exit_loop
from emu.entry import exit_work
from emu.events import EventKind, EventTrace
from emu.exports import CANNOT_RUN, EXPORTS, append_guest_exports
from emu.flight_recorder import FlightRecorder
from emu.fork import Stacks, fork_idle, new_task
from emu.ftrace import Ftrace
from emu.hub import Hub
from emu.kallsyms import Kallsyms
from emu.module import LoadedObject, ModuleLoader, convert_sites, refuse_bad_sites, texts_of
from emu.module_area import ModuleArea
from emu.paging import Access, AddressSpace
from emu.percpu import PerCpu
from emu.placement import Placement
from emu.printk import Printk
from emu.rcu import synchronize
from emu.sched import Scheduler
from emu.slab import Slab
from emu.switch_to import INTERRUPT_STUB, StackFrames
from emu.task import Activity, Service, Task
from emu.text_poke import TextPoker
from emu.timer import Timers
from emu.trampoline import Trampolines
from emu.traps import GuestTraps
from emu.unwind import Unwinder
from emu.view import GuestVariable, Layouts
from emu.vmlinux import EntryCode, place_vmlinux
from emu.workqueue import Workqueue

__all__ = ["EXPORTING", "Machine", "SharedMemory"]

# Modules whose functions enter themselves into EXPORTS.
EXPORTING = (mutex, sleep, wait)


class SharedMemory:
    """Guest memory as a kernel service sees it: every load and store is a door, every store an event."""

    def __init__(self, space: AddressSpace, hub: Hub, events: EventTrace) -> None:
        self._space = space
        self._hub = hub
        self._events = events

    def read(self, address: int, size: int) -> bytes:
        self._hub.door("load", address)
        return self._space.read(address, size)

    def write(self, address: int, data: bytes) -> None:
        self._hub.door("store", address)
        before = self._space.read(address, len(data))
        self._space.write(address, data)
        self._events.record(EventKind.STORE, address, before, data)

    def fetch_or(self, address: int, bits: int) -> int:
        """Set bits of the 64-bit word, nobody in between; returns what it was (lock or)."""
        return self._locked("fetch_or", address, lambda value: value | bits)

    def fetch_andnot(self, address: int, bits: int) -> int:
        """Clear bits of the 64-bit word, nobody in between; returns what it was (lock and)."""
        return self._locked("fetch_andnot", address, lambda value: value & ~bits)

    def _locked(self, kind: str, address: int, change: Callable[[int], int]) -> int:
        self._hub.door(kind, address)
        before = self._space.read(address, 8)
        value = int.from_bytes(before, "little")
        after = change(value).to_bytes(8, "little")
        if after != before:
            self._space.write(address, after)
            self._events.record(EventKind.STORE, address, before, after)
        return value

    def cmpxchg(self, address: int, old: int, new: int) -> bool:
        """Store `new` into the 64-bit word if it holds `old`, nobody in between; False if it does not."""
        self._hub.door("cmpxchg", address)
        before = self._space.read(address, 8)
        if int.from_bytes(before, "little") != old:
            return False
        data = new.to_bytes(8, "little")
        self._space.write(address, data)
        self._events.record(EventKind.STORE, address, before, data)
        return True


class Machine:
    """One emulated machine with a kernel image in it.

    `entry_code` appends machine code of the rooms above to the image's own, `stubs` names functions
    that those rooms answer in Python (they enter them into `traps.exports`); `cpus` is the number of vCPUs.
    """

    def __init__(
        self,
        image: Image,
        *,
        entry_code: Sequence[EntryCode] = (),
        stubs: Sequence[str] = (),
        cpus: int = 1,
        arena_size: int = ARENA_SIZE,
    ) -> None:
        self.image = image
        self.layouts = _layouts_of(image)
        self.space = AddressSpace(Arena(arena_size))
        self.events = EventTrace()
        self.log = Printk()
        self.warnings: list[str] = []
        self.kallsyms = Kallsyms()
        self.slab = Slab(self.space)
        self.area = ModuleArea(self.space)
        self.percpu = PerCpu(self.space)
        self.stacks = Stacks(self)
        self.poker = TextPoker(self.space, self.events, self.synchronize, self._door)
        self.traps = GuestTraps(self)
        self.hub = Hub(self.traps)
        self.shared = SharedMemory(self.space, self.hub, self.events)
        self.recorder = FlightRecorder(self)
        self.modules = ModuleLoader(self)
        # Livepatch's part in the scheduler, in fork and on the way to user space: the rooms above set them.
        # They get addresses of task_structs.
        self.klp_update_patch_state: Callable[[int], None] = lambda task: None
        self.klp_copy_process: Callable[[int, int], None] = lambda child, parent: None

        exits = sorted({*EXPORTS, *CANNOT_RUN, *stubs, INTERRUPT_STUB})
        self.vmlinux = place_vmlinux(
            image, self.layouts, self.percpu.alloc, (append_guest_exports, *entry_code), exits
        )
        self.traps.exports = dict(EXPORTS)
        self.return_address = self.vmlinux.symbols["klpemu_return"]
        self.fentry = self.vmlinux.symbols["__fentry__"]
        for _ in range(cpus):
            self.percpu.new_area()
        self._boot()
        self.unwinder = Unwinder(self)
        self.cpus = [VCpu(self.space, number, area) for number, area in enumerate(self.percpu.areas)]
        self.tracer = VCpu(self.space, 0, self.percpu.areas[0], trace=True)
        self.trampolines = Trampolines(self.space, self.area, self.kallsyms, self.symbol)
        self.ftrace = Ftrace(
            self.layouts,
            self.shared,
            self.slab,
            self.kallsyms,
            self.poker,
            self.trampolines,
            self.log,
            self.synchronize,
        )
        self.ftrace.ftrace_module_init(self.modules.objects[""].sites)
        self.stream_stack = self.stacks.alloc()
        self._start_tasks()

    @classmethod
    def open(cls, path: str | Path, **options: Any) -> "Machine":
        """A machine with the kernel image of a file."""
        return cls(Image.open(path), **options)

    # Names and views.

    def symbol(self, name: str) -> int:
        """Address of a vmlinux symbol."""
        return self.kallsyms.address_of(name)

    def view(self, name: str, address: int) -> Any:
        """A typed view through the services' memory; stores are events."""
        return self.layouts.view(name, self.shared, address)

    def list_head(self, symbol: str) -> Any:
        """The view of a global list head."""
        return self.view("list_head", self.symbol(symbol))

    def variable(self, symbol: str, code: str = "<Q") -> GuestVariable:
        """A global number or pointer of the kernel."""
        return GuestVariable(self.shared, self.symbol(symbol), code)

    @property
    def init_task(self) -> Task:
        """The task on whose behalf the host's own requests run."""
        return self.tasks[0]

    def pid_of(self, task: Task) -> int:
        """The task's pid, from its task_struct."""
        return int(self.layouts.view("task_struct", self.space, task.struct).pid)

    def caller(self) -> str:
        """Where the guest code is that called the export now running: the last byte of its call."""
        task = self.hub.current
        data = self.space.read(task.cpu.registers()["rsp"], 8)
        return self.kallsyms.describe(int.from_bytes(data, "little") - 1)

    # Running.

    def service(self, name: str, body: Callable[[], Any]) -> Any:
        """Run a kernel service on behalf of the first task; returns what it returns."""
        return self._system_call(self.hub.serve(self.init_task, name, body))

    def call(self, entry: int, *arguments: int, **registers: int) -> int:
        """Call guest code on the first task's stack; returns RAX."""
        return int(self._system_call(self.hub.call(self.init_task, entry, arguments, **registers)))

    def run(self, until: Callable[[], bool], jiffies: int | None = None) -> bool:
        """Let the machine go on until the predicate holds or so many jiffies have passed; does it hold?"""
        deadline = None if jiffies is None else self.timers.now + jiffies
        self.hub.run(until, self.init_task, deadline)
        return until()

    def _system_call(self, activity: Activity) -> Any:
        """The first task's request, and its way back to user space."""
        task = self.init_task
        result = self.hub.finish(task, activity)
        if exit_work(self, task):
            self.hub.finish(task, self.hub.serve(task, "exit_to_user_mode", partial(exit_loop, self, task)))
        else:
            self.events.record(EventKind.SWITCH_POINT, task.struct, note="return to user space")
        return result

    def synchronize(self, what: str) -> None:
        """Wait for a grace period or a sync (emu/rcu.py)."""
        synchronize(self, what)

    def on_stack(self, size: int) -> int:
        """Address of `size` bytes on the current task's stack, until the running service ends."""
        task = self.hub.current
        service = task.top
        assert isinstance(service, Service)
        return self.frames.allocate(task, service, size)

    # Memory of the image and of modules.

    def install(self, placement: Placement) -> None:
        """Map the pages of a relocated object and fill them."""
        for group in placement.groups:
            self.space.map(group.start, group.size, group.access)
        for index, data in placement.contents.items():
            section = placement.image.sections[index]
            address = placement.addresses[index]
            if section in placement.per_cpu:
                self.percpu.write(address, bytes(data))
            else:
                self.space.write(address, bytes(data))

    def _boot(self) -> None:
        """What start_kernel() has done by the time anything is patched: text in place, all sites NOPs."""
        sites = fentry_sites(self.image)
        refuse_bad_sites(self.image, sites)
        placement = self.vmlinux.placement
        texts = texts_of(placement, "")
        addresses = convert_sites(placement, sites, self.fentry)
        self.install(placement)
        entry = self.vmlinux.entry
        self.space.map(entry.start, entry.size, Access.EXECUTE)
        texts.append(self.vmlinux.entry_text())
        self.space.write(entry.start, texts[-1].contents)
        loaded = LoadedObject("", self.image.path, 0, placement, texts, addresses)
        spans = [(group.start, group.start + group.size) for group in (*placement.groups, entry)]
        self.kallsyms.add("", self.vmlinux.ksyms(), spans)
        self.modules.objects[""] = loaded

    def _start_tasks(self) -> None:
        """The idle tasks, and a user task on each vCPU, which does what the host asks for."""
        self.tasks: list[Task] = []
        self.by_struct: dict[int, Task] = {}
        self.last_pid = 0
        self.frames = StackFrames(self)
        self.timers = Timers(self)
        symbols = self.vmlinux.symbols
        for cpu in self.cpus:
            number = cpu.number.to_bytes(4, "little")
            if "cpu_number" in symbols:
                self.space.write(cpu.gs_base + symbols["cpu_number"], number)
        idle = [fork_idle(self, cpu) for cpu in self.cpus]
        for task in idle:
            base = task.cpu.gs_base
            self.space.write(base + symbols["current_task"], task.struct.to_bytes(8, "little"))
        self.sched = Scheduler(self, idle)
        self.hub.sched, self.hub.timers, self.hub.tasks = self.sched, self.timers, self.tasks
        for cpu in self.cpus:
            new_task(self, "init" if cpu.number == 0 else f"task{cpu.number + 1}", cpu)
        self.workqueue = Workqueue(self)

    def _door(self, kind: str, address: int) -> None:
        self.hub.door(kind, address)


@lru_cache(maxsize=4)
def _layouts_of(image: Image) -> Layouts:
    """Reading debug information takes longer than all the rest of a boot."""
    return Layouts(struct_layouts(image))
