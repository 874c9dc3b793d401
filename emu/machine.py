"""The machine put together: memory, vCPUs, tasks, the kernel image and ftrace."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from elf.image import Image
from elf.layout import struct_layouts
from emu import (
    exec,
    meminfo,
    module_procfs,
    module_sysfs,
    mutex,
    param_ops,
    printk,
    seq_file,
    slab_common,
    sleep,
    string,
    timer_list,
    vsprintf,
    wait,
    work_struct,
)
from emu.alternative import cpu_wants_rethunk_at
from emu.arena import ARENA_SIZE, Arena
from emu.bug import Bugs
from emu.cpu import VCpu
from emu.cpu_features import CPUS, Cpu
from emu.entry import exit_to_user_mode_loop as exit_loop
from emu.entry import exit_work
from emu.events import EventKind, EventTrace
from emu.exports import CANNOT_RUN, EXPORTS, append_guest_exports
from emu.flight_recorder import FlightRecorder
from emu.fork import Stacks, fork_idle, new_task
from emu.ftrace import Ftrace
from emu.hub import Hub
from emu.kallsyms import Kallsyms
from emu.kernfs import Kernfs
from emu.kobject import Kobjects
from emu.memory import PAGE_SIZE
from emu.mitigations import select_mitigations
from emu.module import LoadedObject, ModuleLoader, texts_of
from emu.module_area import ModuleArea
from emu.mounts import mount_filesystems
from emu.paging import Access, AddressSpace
from emu.percpu import PerCpu
from emu.placement import Placement
from emu.printk import Printk
from emu.rcu import synchronize
from emu.sched import Scheduler
from emu.slab import Slab
from emu.start_kernel import LinkedImage, place_linked, setup_per_cpu_areas, texts_in
from emu.switch_to import INTERRUPT_STUB, StackFrames
from emu.task import Activity, Service, Task
from emu.text_at_load import TextAtLoad, alternative_instructions, module_finalize
from emu.text_poke import TextPoker
from emu.timer import Timers
from emu.timer_list import GuestTimers
from emu.trampoline import Trampolines
from emu.traps import GuestTraps
from emu.unwind import Unwinder
from emu.view import GuestVariable, Layouts
from emu.vmlinux import EntryCode, place_vmlinux
from emu.workqueue import Workqueue

__all__ = ["EXPORTING", "Machine", "SharedMemory"]

# Modules whose functions enter themselves into EXPORTS.
EXPORTING = (
    exec,
    meminfo,
    mutex,
    param_ops,
    printk,
    seq_file,
    slab_common,
    sleep,
    string,
    timer_list,
    vsprintf,
    wait,
    work_struct,
)


class SharedMemory:
    """Guest memory as a kernel service sees it: every load and store is a door, every store an event."""

    def __init__(self, space: AddressSpace, hub: Hub, events: EventTrace) -> None:
        self._space = space
        self._hub = hub
        self._events = events

    def read(self, address: int, size: int) -> bytes:
        if self._hub.schedule.interleaves:  # most do not, and there are hundreds of thousands of loads
            self._hub.door("load", address)
        return self._space.read(address, size)

    def write(self, address: int, data: bytes) -> None:
        if self._hub.schedule.interleaves:
            self._hub.door("store", address)
        before = self._space.exchange(address, data)
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

    def fetch_add(self, address: int, count: int) -> int:
        """Add to the 32-bit word, nobody in between; returns what it was (lock xadd)."""
        self._hub.door("fetch_add", address)
        before = self._space.read(address, 4)
        value = int.from_bytes(before, "little")
        after = ((value + count) % (1 << 32)).to_bytes(4, "little")
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
    that those rooms answer in Python (they enter them into `traps.exports`); `cpus` is the number of vCPUs,
    `cpu` what kind of CPU the kernel takes them for, and `command_line` what it was booted with: the two
    decide what becomes of text when it is loaded.
    """

    def __init__(
        self,
        image: Image | LinkedImage,
        *,
        entry_code: Sequence[EntryCode] = (),
        stubs: Sequence[str] = (),
        cpus: int = 1,
        cpu: Cpu = CPUS["qemu64"],
        command_line: str = "",
        arena_size: int = ARENA_SIZE,
    ) -> None:
        linked = image if isinstance(image, LinkedImage) else None
        self.image = image.image if isinstance(image, LinkedImage) else image
        self.layouts = _layouts_of(self.image) if linked is None else Layouts(linked.structs)
        self.space = AddressSpace(Arena(arena_size))
        self.events = EventTrace()
        self.log = Printk()
        self.warnings: list[str] = []
        self.bugs = Bugs(self)
        self.kallsyms = Kallsyms()
        self.slab = Slab(self.space)
        self.area = ModuleArea(self.space)
        self.percpu = PerCpu(self.space, 0 if linked is None else linked.per_cpu_size)
        self.stacks = Stacks(self)
        self.poker = TextPoker(self.space, self.events, self.synchronize, self._door)
        self.traps = GuestTraps(self)
        self.hub = Hub(self.traps)
        self.shared = SharedMemory(self.space, self.hub, self.events)
        self.recorder = FlightRecorder(self)
        self.kernfs = Kernfs(self.hub.wait)
        self.kobjects = Kobjects()
        self.command_line = command_line
        self.mitigations = select_mitigations(cpu, command_line)
        self.text_at_load: dict[str, TextAtLoad] = {}
        self.modules = ModuleLoader(self)
        self.modules.module_finalize = self._module_finalize
        # Livepatch's part in the scheduler, in fork and on the way to user space: the rooms above set them.
        # They get addresses of task_structs.
        self.klp_update_patch_state: Callable[[int], None] = lambda task: None
        self.klp_copy_process: Callable[[int, int], None] = lambda child, parent: None

        exits = sorted({*EXPORTS, *CANNOT_RUN, *stubs, INTERRUPT_STUB})
        if linked is None:
            code = (append_guest_exports, *entry_code)
            self.vmlinux = place_vmlinux(self.image, self.layouts, self.percpu.alloc, code, exits)
        else:

            def apply(placement: Placement) -> None:
                lookup = linked.first_addresses.get
                self.text_at_load[""] = alternative_instructions(placement, lookup, self.mitigations, cpus)

            self.vmlinux = place_linked(linked, self.layouts, entry_code, exits, apply)
        self.traps.exports = dict(EXPORTS)
        self.return_address = self.vmlinux.symbols["klpemu_return"]
        self.fentry = self.vmlinux.symbols["__fentry__"]
        for _ in range(cpus):
            self.percpu.new_area()
        self._boot(linked is not None)
        self.unwinder = Unwinder(self)
        self.cpus = [VCpu(self.space, number, area) for number, area in enumerate(self.percpu.areas)]
        self.tracer = VCpu(self.space, 0, self.percpu.areas[0], trace=True)
        self.trampolines = Trampolines(
            self.space, self.area, self.kallsyms, self.symbol, self.return_thunk_at
        )
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
        self.kernel_kobj, self.module_kobj = mount_filesystems(self)
        module_sysfs.connect(self)
        module_procfs.connect(self)

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

    def return_thunk_at(self, address: int) -> int | None:
        """Where the return at an address has to jump to; None if it is plain, as in the built-in kernel."""
        if not cpu_wants_rethunk_at(address, self.mitigations):
            return None
        return self.vmlinux.symbols.get(self.mitigations.return_thunk)

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
            frame = None
            if placement.is_linked and group.access is Access.WRITE:
                frame = self.space.arena.data_frames(group.size // PAGE_SIZE)
            self.space.map(group.start, group.size, group.access, frame)
        for index, data in placement.contents.items():
            section = placement.image.sections[index]
            address = placement.addresses[index]
            if section in placement.per_cpu:
                self.percpu.write(address, bytes(data))
            else:
                self.space.write(address, bytes(data))

    def _module_finalize(self, placement: Placement, name: str) -> None:
        self.text_at_load[name] = module_finalize(self, placement, name)

    def _boot(self, linked: bool) -> None:
        """What start_kernel() has done by the time anything is patched: text in place, all sites NOPs."""
        placement = self.vmlinux.placement
        self.install(placement)
        if linked:
            setup_per_cpu_areas(self)
            texts = texts_in(self.space, placement.groups)
        else:
            texts = texts_of(placement, "")
        entry = self.vmlinux.entry
        self.space.map(entry.start, entry.size, Access.EXECUTE)
        texts.append(self.vmlinux.entry_text())
        self.space.write(entry.start, texts[-1].contents)
        loaded = LoadedObject("", self.image.path, 0, placement, texts, self.vmlinux.sites)
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
        self.log.clock = self.timers.local_clock
        self.guest_timers = GuestTimers(self)
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
