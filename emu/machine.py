"""The machine put together: memory, vCPUs, tasks, the kernel image and ftrace."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from elf.image import Image
from elf.layout import struct_layouts
from elf.mcount import fentry_sites
from emu.arena import ARENA_SIZE, Arena
from emu.cpu import VCpu
from emu.events import EventKind, EventTrace
from emu.exports import CANNOT_RUN, EXPORTS, append_guest_exports
from emu.flight_recorder import FlightRecorder
from emu.ftrace import Ftrace
from emu.hub import Hub
from emu.kallsyms import Kallsyms
from emu.list import list_add_tail
from emu.memory import PAGE_SIZE
from emu.module import LoadedObject, ModuleLoader, convert_sites, refuse_bad_sites, texts_of
from emu.module_area import ModuleArea
from emu.paging import Access, AddressSpace
from emu.percpu import PerCpu
from emu.placement import Placement
from emu.printk import Printk
from emu.slab import Slab
from emu.task import Task
from emu.text_poke import TextPoker
from emu.trampoline import Trampolines
from emu.traps import GuestTraps
from emu.unwind import Unwinder
from emu.view import GuestVariable, Layouts
from emu.vmlinux import EntryCode, place_vmlinux

__all__ = ["Machine", "SharedMemory"]

THREAD_SIZE = 4 * PAGE_SIZE  # arch/x86/include/asm/page_64_types.h, without KASAN
STACKS = 0xFFFF_C900_0000_0000


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
        self._next_stack = STACKS
        self.poker = TextPoker(self.space, self.events, self.synchronize, self._door)
        self.traps = GuestTraps(self)
        self.hub = Hub(self.traps)
        self.shared = SharedMemory(self.space, self.hub, self.events)
        self.recorder = FlightRecorder(self)
        self.unwinder = Unwinder(self)
        self.modules = ModuleLoader(self)

        exits = sorted({*EXPORTS, *CANNOT_RUN, *stubs})
        self.vmlinux = place_vmlinux(
            image, self.layouts, self.percpu.alloc, (append_guest_exports, *entry_code), exits
        )
        self.traps.exports = dict(EXPORTS)
        self.return_address = self.vmlinux.symbols["klpemu_return"]
        self.fentry = self.vmlinux.symbols["__fentry__"]
        for _ in range(cpus):
            self.percpu.new_area()
        self._boot()
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
        self.stream_stack = self.new_stack()
        self.tasks: list[Task] = []
        for cpu in self.cpus:
            self.tasks.append(self._new_task(cpu))
        self.hub.tasks = self.tasks

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
        return self.hub.finish(self.init_task, self.hub.serve(self.init_task, name, body))

    def call(self, entry: int, *arguments: int, **registers: int) -> int:
        """Call guest code on the first task's stack; returns RAX."""
        task = self.init_task
        return int(self.hub.finish(task, self.hub.call(task, entry, arguments, **registers)))

    def synchronize(self, what: str) -> None:
        """Wait until every vCPU has passed an interruptible boundary or has scheduled, and record it.

        While a vCPU is in the middle of guest code it is at an instruction boundary whenever a service runs,
        and its view of memory is never stale; but one that has executed an `int3` takes no interrupt until
        that is dealt with, so text_poke_sync waits for it.  A grace period waits for what the others are
        doing to end, or to sleep.
        """
        me = self.hub.current if self.hub.in_service else None
        others = [task for task in self.tasks if task is not me]
        if what in ("text_poke_sync", "ftrace_sync_ipi"):
            self.hub.wait(lambda: all(task.interruptible for task in others), what)
        else:
            self.hub.wait(lambda: all(task.has_scheduled for task in others), what)
        self.events.record(EventKind.SYNC, note=what)

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

    def new_stack(self) -> int:
        """The first address above a fresh kernel stack, with a guard page below it."""
        bottom = self._next_stack + PAGE_SIZE
        self._next_stack = bottom + THREAD_SIZE
        frame = self.space.arena.writable_frames(THREAD_SIZE // PAGE_SIZE)
        self.space.map(bottom, THREAD_SIZE, Access.WRITE, frame)
        return bottom + THREAD_SIZE

    def _new_task(self, cpu: VCpu) -> Task:
        """A user task, current on its vCPU and linked behind init_task, which is the idle task."""
        number = cpu.number + 1
        comm = "init" if number == 1 else f"task{number}"
        address = self.slab.kzalloc(self.layouts.sizeof("task_struct"), f"task_struct {comm}")
        init_task = self.view("task_struct", self.symbol("init_task"))
        struct = self.view("task_struct", address)
        struct.pid = number
        struct.tgid = number
        struct.comm = comm.encode()
        struct.patch_state = -1
        struct.stack_canary = init_task.stack_canary
        top = self.new_stack()
        struct.stack = top - THREAD_SIZE
        list_add_tail(struct.tasks, init_task.tasks)
        offset = self.vmlinux.symbols["current_task"]
        self.space.write(cpu.gs_base + offset, address.to_bytes(8, "little"))
        if "cpu_number" in self.vmlinux.symbols:
            self.space.write(
                cpu.gs_base + self.vmlinux.symbols["cpu_number"], cpu.number.to_bytes(4, "little")
            )
        return Task(comm, address, top, cpu)

    def _door(self, kind: str, address: int) -> None:
        self.hub.door(kind, address)


@lru_cache(maxsize=4)
def _layouts_of(image: Image) -> Layouts:
    """Reading debug information takes longer than all the rest of a boot."""
    return Layouts(struct_layouts(image))
