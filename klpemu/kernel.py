"""The front door for Python: a kernel, patches enabled and disabled on it, calls, traces and checks."""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from os import PathLike, fspath
from typing import Any

from elf.errors import KlpemuError, SymbolError
from elf.image import Image
from emu.assembly import Instruction, disassemble
from emu.errno import KernelErrno
from emu.machine import Machine
from emu.module import LoadedObject
from emu.remembered import Remembered
from emu.stream import execute_and_undo, trace_call
from emu.symbol_file import save_symbols
from emu.view import list_for_each_entry
from emu.vmcore import save_core
from klpemu.boot_machine import DEFAULT_CPU, boot_machine
from klpemu.enabled_patches import EnabledPatch, EnabledPatches
from klpemu.fixtures import locate
from klpemu.modprobe import Modprobe
from klpemu.tasks import Tasks
from patches import core, exports, shadow, stacks, sysfs, transition
from patches.invariants.consistency import Consistency
from patches.invariants.fetches import FetchedText
from patches.invariants.finding import Report
from patches.invariants.forced import ForcedPatches
from patches.invariants.grace import GracePeriods
from patches.invariants.moments import EveryMoment
from patches.invariants.reachable import FreedObjects
from patches.invariants.relocations import expected_texts
from patches.invariants.replacement import ReplacedPatches
from patches.invariants.subject import RememberingSubject, Subject
from patches.invariants.verify import verify
from patches.invariants.witness import Witness
from patches.klp import Klp
from patches.livepatch import VMLINUX, Patch

__all__ = ["EXPORTING", "EnabledPatch", "Kernel", "Trace"]

# Modules whose functions enter themselves into KLP_EXPORTS.
EXPORTING = (shadow,)


@dataclass(frozen=True, slots=True)
class Trace:
    """An executed call: RAX, and every instruction in order with the place it stands at."""

    result: int
    instructions: tuple[tuple[str, Instruction], ...]

    def __str__(self) -> str:
        lines = []
        function = ""
        for place, instruction in self.instructions:
            name = place.split("+")[0]
            if name != function:
                function = name
                lines.append(f"{name}:")
            code = instruction.code.hex(" ")
            lines.append(f"  {instruction.address:016x}  {code:24}  {instruction!s:44} # {place}")
        return "\n".join([*lines, f"returned {self.result:#x}"])


class Kernel:
    """One emulated kernel.  Everything happens on behalf of its first task, one request after the other.

    Wherever a file is named, `builtin:NAME` names one that comes with klpemu.
    """

    def __init__(self, machine: Machine, *, observe: bool = False) -> None:
        self.machine = machine
        self.klp = Klp(machine)
        self.consistency = Consistency(machine) if observe else None
        self._witnesses: tuple[Witness, ...] = ()
        if observe:
            self._witnesses = (
                FetchedText(machine),
                ReplacedPatches(machine),
                ForcedPatches(machine),
                FreedObjects(machine),
                EveryMoment(machine),
                GracePeriods(machine),
            )
        self.remembered = Remembered(machine.space)
        self._sites: tuple[tuple[tuple[LoadedObject, int], ...], frozenset[int]] = ((), frozenset())
        self.tasks = Tasks(self)
        self.patches = EnabledPatches(self)
        self.patches.watch(machine.modules.objects[""])
        if self.consistency is not None:
            self.consistency.observer.settle()
        self._modprobe = Modprobe(self)
        machine.traps.exports["klp_enable_patch"] = self.patches.klp_enable_patch
        exports.connect(self.klp)
        transition.connect(self.klp)
        core.connect(self.klp)
        sysfs.connect(self.klp)
        self.klp.freed = self.patches.freed
        machine.modules.klp_leads_into = self.patches.leads_into

    @classmethod
    def load(
        cls,
        path: str | PathLike[str] | None = None,
        *,
        cpus: int = 1,
        observe: bool = False,
        handler: str | None = None,
        cpu: str = DEFAULT_CPU,
        command_line: str = "",
        system_map: str | PathLike[str] | None = None,
    ) -> "Kernel":
        """Boot a kernel: a vmlinuz, an ELF vmlinux or a relocatable object; by default the built-in one.

        `handler` "kernel" or "own" says whose code redirects calls; a linked image's own if it is left out.
        `system_map` names a file with a linked image's symbols, if its own are not to be used.
        `cpu` and the options in `command_line` decide which alternatives and thunks text gets at load.
        With `observe` every call of a function that can be patched is watched, and `verify` says whether a
        task ever mixed versions; that makes execution several times slower.
        """
        return cls(
            boot_machine(
                path,
                cpus=cpus,
                handler=handler,
                cpu=cpu,
                command_line=command_line,
                system_map=system_map,
            ),
            observe=observe,
        )

    @property
    def log(self) -> list[str]:
        """The kernel's log, one line an entry."""
        return self.machine.log.lines

    @property
    def enabled(self) -> list[EnabledPatch]:
        """The patches that are enabled, oldest first."""
        return self.patches.enabled

    # Modules.

    def load_module(self, path: str | PathLike[str]) -> str:
        """Load a module to be patched, without running its init function; returns its name."""
        image = Image.open(locate(fspath(path)))
        loaded: LoadedObject = self._serve("load_module", lambda: self._modprobe.load(image))
        return loaded.name

    def unload_module(self, name: str) -> None:
        """Unload a module, without running its exit function; refused while a patch has its code in it."""
        self._serve("unload_module", lambda: self._modprobe.unload(name))

    def modprobe(self, path: str | PathLike[str], parameters: str = "") -> str:
        """Load a module as modprobe does, init function and all; returns its name.

        What it depends on is loaded first, if a file of that name lies beside it or in the same lib/modules.
        `parameters` are `name=value` with spaces between.  A livepatch module stays loaded until `rmmod`.
        """
        name: str = self._serve("modprobe", lambda: self._modprobe.modprobe(fspath(path), parameters))
        return name

    def rmmod(self, name: str) -> None:
        """Unload a module as rmmod does: its exit function runs.  EWOULDBLOCK while anybody uses it."""
        self._serve(f"rmmod {name}", lambda: self._modprobe.rmmod(name))

    # Patching.

    def enable(self, patch: Patch) -> None:
        """Load a patch's code and enable it.  If that fails, nothing of it stays."""
        if patch.code is None:
            raise KlpemuError(
                "a patch without code", where=f"patch '{patch.name}'", advice="say which file has it"
            )
        image = Image.open(locate(fspath(patch.code)))
        self._serve(f"enable {patch.name}", lambda: self._insmod(patch, image))

    def insmod(self, path: str | PathLike[str]) -> str:
        """Load a livepatch module (.ko); its init function enables the patch.  Returns its name.

        It is unloaded when the patch is gone, unlike what `modprobe` has loaded.
        """
        image = Image.open(locate(fspath(path)))
        name: str = self._serve("insmod", lambda: self._modprobe.insmod(image))
        return name

    def disable(self, patch: Patch | str) -> None:
        """Disable a patch (write 0 to its sysfs `enabled`); its code is unloaded when it is gone."""
        self.write(self._sysfs(patch, "enabled"), "0")

    def reverse(self, patch: Patch | str) -> None:
        """Turn the transition of a patch around (write the opposite to its sysfs `enabled`)."""
        guest = self.patches.found(patch).guest
        if guest != self.klp.transition_patch:
            raise KernelErrno(
                errno.EINVAL, f"patch '{self.klp.name_of(guest)}' is not in transition", advice="disable it"
            )
        self.write(self._sysfs(patch, "enabled"), f"{not guest.enabled:d}")

    def force(self, patch: Patch | str) -> None:
        """End the transition of a patch whatever the tasks are doing (write 1 to its sysfs `force`)."""
        self.write(self._sysfs(patch, "force"), "1")

    def read(self, path: str) -> str:
        """What a file of sysfs, procfs or tracefs shows, as `cat` prints it."""
        shown: str = self._serve(f"read {path}", lambda: self.machine.kernfs.read(path))
        return shown

    def write(self, path: str, text: str) -> None:
        """Write to a file of sysfs or procfs, as `echo -n TEXT >` does; what the kernel returns is raised."""
        self._serve(f"write {path}", lambda: self.machine.kernfs.write(path, text))

    def system_call(self, name: str, body: Callable[[], Any]) -> Any:
        """Run `body` in the kernel on behalf of the first task; returns what it returns."""
        return self._serve(name, body)

    @property
    def in_transition(self) -> str:
        """The name of the patch in transition, or ""."""
        return self.patches.in_transition

    def save_core(self, path: str | PathLike[str]) -> None:
        """Save the machine as an ELF core with its page tables, for drgn or gdb."""
        save_core(self.machine, path)

    def save_symbols(self, path: str | PathLike[str], module: str = "") -> None:
        """Save the kernel, or a module, with its symbols and types, as they lie now: `gdb vmlinux vmcore`."""
        save_symbols(self.machine, path, module)

    # Looking.

    def call(self, function: str | int, *arguments: int) -> int:
        """Call guest code; returns RAX.  A function is `name`, `module:name`, `name,2` or an address."""
        result = self.machine.call(self.address_of(function), *arguments)
        self._settle()
        return result

    def trace(self, function: str | int, *arguments: int, att: bool = False) -> Trace:
        """Call guest code and keep every instruction it executes."""
        result, addresses = trace_call(self.machine, self.address_of(function), *arguments)
        known: dict[int, tuple[str, Instruction]] = {}
        for address in addresses:
            if address not in known:
                code = self.machine.space.read_mapped(address, 15)
                instruction = next(disassemble(code, address, att=att))
                known[address] = (self.machine.kallsyms.describe(address), instruction)
        self._settle()
        return Trace(result, tuple(known[address] for address in addresses))

    def verify(self, step: str = "", subject: Subject | None = None) -> Report:
        """Check every invariant on the kernel as it is now, of which `subject()` gave `subject`."""
        report = verify(subject or self.subject(), step)
        return Report.merged([report, self.witnessed(step)], step)

    def verify_what_changed(self, step: str = "", subject: Subject | None = None) -> Report:
        """The same, without judging again what was judged before by the same bytes (emu/remembered.py)."""
        report = verify(subject or self.subject(), step, self.remembered)
        return Report.merged([report, self.witnessed(step)], step)

    def remembering(self, subject: Subject) -> RememberingSubject:
        """The subject, such that what follows from it is found once for the same bytes."""
        self.remembered.look()
        return RememberingSubject.of(subject, self.remembered)

    def witnessed(self, step: str = "") -> Report:
        """What those have found since they were last asked who watch what happens, not what is."""
        if self.consistency is None:
            return Report(step)
        reports = [self.consistency.report(step), *(each.report(step) for each in self._witnesses)]
        return Report.merged(reports, step)

    def subject(self) -> Subject:
        """What the invariants judge: the live memory, the loaded files, and the patches that are enabled."""
        machine = self.machine
        objects = machine.modules.objects.values()
        # A patch that somebody still refers to is off the list, and has its module and its kobject.
        enabled = [each for each in self.enabled if each.guest.address_ not in self.klp.being_freed]
        moving = self.patches.note_established()
        replaces = any(
            each.patch.replace and each.patch.name == moving and moving not in self.patches.established
            for each in self.enabled
        )
        return Subject(
            memory=machine.space,
            layouts=machine.layouts,
            kallsyms=machine.kallsyms,
            symbols=machine.vmlinux.symbols,
            texts=[text for each in objects for text in expected_texts(each)],
            sites=self._all_sites(),
            functions=stacks.expected_functions(
                machine.kallsyms,
                [
                    (each.patch, each.new_func)
                    for each in enabled
                    if stacks.has_funcs_on_stacks(self.klp, each.guest)
                ],
                moving,
                replaces=replaces,
            ),
            patches=[each.patch.name for each in enabled],
            execute=partial(execute_and_undo, machine),
            slab=machine.slab,
            remaining=[
                (at, tag) for at, tag in self.patches.allocations().items() if at not in self.patches.baseline
            ]
            if not self.klp.being_freed
            else [],
            shadow_users=self.klp.shadow_users,
            livepatches=[each.module for each in self.enabled],
            directories=sysfs.directories(self.klp),
            log=self.log,
            return_thunk_at=machine.return_thunk_at,
        )

    def _all_sites(self) -> frozenset[int]:
        """The sites of all objects: made again only when there are other ones, as a kernel has 40,000."""
        objects = tuple((each, len(each.sites)) for each in self.machine.modules.objects.values())
        if self._sites[0] != objects:
            self._sites = objects, frozenset().union(*(each.sites for each, _ in objects))
        return self._sites[1]

    def address_of(self, function: str | int) -> int:
        """Guest virtual address of `name`, `module:name`, or `name,sympos`."""
        if isinstance(function, int):
            return function
        name, _, position = function.partition(",")
        module, colon, symbol = name.rpartition(":")
        if position and not position.isdigit():
            raise SymbolError(f"'{position}' is no symbol position", where=function, advice="write name,2")
        sympos = int(position or 0)
        if colon:
            return self.machine.kallsyms.address_of(symbol, "" if module == VMLINUX else module, sympos)
        owners = [each for each in self.machine.kallsyms.modules() if self.machine.kallsyms.named(name, each)]
        if "" in owners or not owners:
            return self.machine.kallsyms.address_of(name, "", sympos)
        if len(owners) > 1:
            raise SymbolError(f"'{name}' is in {', '.join(owners)}", advice=f"write {owners[0]}:{name}")
        return self.machine.kallsyms.address_of(name, owners[0], sympos)

    def function_stack(self, function: str | int) -> list[str]:
        """What is on the func_stack of a function, newest first, as guest memory has it."""
        address = self.address_of(function)
        for ops in self.klp.ops():
            funcs = list(list_for_each_entry(ops.func_stack, "klp_func", "stack_node"))
            if funcs and funcs[0].old_func == address:
                return [
                    "nop" if func.nop else self.machine.kallsyms.describe(func.new_func) for func in funcs
                ]
        return []

    def site_of(self, function: str | int) -> tuple[int, bytes]:
        """Address and present bytes of a function's fentry site."""
        address = self.address_of(function)
        location = self.machine.ftrace.ftrace_location(address)
        if not location:
            where = self.machine.kallsyms.describe(address)
            raise KlpemuError("the function has no fentry site", where=where)
        return location, self.machine.space.read(location, 5)

    # Inside.

    def _serve(self, name: str, body: Callable[[], Any]) -> Any:
        try:
            return self.machine.service(name, body)
        finally:
            self._settle()
            self.patches.note_established()

    def _sysfs(self, patch: Patch | str, file: str) -> str:
        """The path of a file of a patch."""
        return f"/sys/kernel/livepatch/{self.patches.found(patch).patch.name}/{file}"

    def _insmod(self, patch: Patch, image: Image, begin: Callable[[Klp, Any], None] | None = None) -> None:
        self.patches.insmod(patch, image, begin)

    def _settle(self) -> None:
        """Let the kworker do what is due now, such as the release of freed patches."""
        if not self.machine.workqueue.is_empty:
            self.machine.run(lambda: self.machine.workqueue.is_empty)
