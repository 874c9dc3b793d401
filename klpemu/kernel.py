"""The front door for Python: a kernel, patches enabled and disabled on it, calls, traces and checks."""

import errno
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from os import PathLike, fspath
from typing import Any

from elf.errors import KlpemuError, SymbolError
from elf.image import Image
from emu.assembly import Instruction, disassemble
from emu.errno import KernelErrno
from emu.ftrace_rec import FtraceBug
from emu.machine import Machine
from emu.module import LoadedObject, module_name
from emu.stream import execute_stream, trace_call, undone
from emu.symbol_file import save_symbols
from emu.view import list_for_each_entry
from emu.vmcore import save_core
from klpemu.fixtures import BUILTIN_KERNEL, fixture, locate
from klpemu.tasks import Tasks
from patches import core, exports, shadow, transition
from patches.handler import append_klp_ftrace_handler
from patches.invariants.consistency import Consistency
from patches.invariants.finding import Report
from patches.invariants.relocations import expected_texts
from patches.invariants.subject import Subject
from patches.invariants.verify import verify
from patches.klp import Klp
from patches.livepatch import VMLINUX, Patch, declared, discard, materialise
from patches.stacks import expected_functions

__all__ = ["EXPORTING", "EnabledPatch", "Kernel", "Trace"]

# Modules whose functions enter themselves into KLP_EXPORTS.
EXPORTING = (shadow,)


@dataclass(frozen=True, slots=True)
class EnabledPatch:
    """A patch as declared, its `klp_patch` in guest memory, and the addresses of its replacement functions.

    `release` gives back what was made for it once it is gone.
    """

    patch: Patch
    guest: Any
    module: LoadedObject
    new_func: Mapping[str, int]
    release: Callable[[], None] = field(repr=False)


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
        self.tasks = Tasks(self)
        self._established: set[str] = set()
        self._watch(machine.modules.objects[""])
        self.enabled: list[EnabledPatch] = []
        self._refused: KlpemuError | None = None
        self._baseline = set(self._allocations())
        self._allocated: dict[str, set[int]] = {}  # what was allocated for the patches that are enabled
        machine.traps.exports["klp_enable_patch"] = self._klp_enable_patch
        exports.connect(self.klp)
        transition.connect(self.klp)
        core.connect(self.klp)
        self.klp.freed = self._freed

    @classmethod
    def load(
        cls, path: str | PathLike[str] | None = None, *, cpus: int = 1, observe: bool = False
    ) -> "Kernel":
        """Boot a kernel image: a relocatable object with its DWARF; by default the built-in one.

        With `observe` every call of a function that can be patched is watched, and `verify` says whether a
        task ever mixed versions; that makes execution several times slower.
        """
        image = Image.open(locate(fspath(path)) if path is not None else fixture(BUILTIN_KERNEL))
        entry, stubs = (append_klp_ftrace_handler,), ("klp_enable_patch", *exports.KLP_EXPORTS)
        machine = Machine(image, entry_code=entry, stubs=stubs, cpus=cpus)
        return cls(machine, observe=observe)

    @property
    def log(self) -> list[str]:
        """The kernel's log, one line an entry."""
        return self.machine.log.lines

    def load_module(self, path: str | PathLike[str]) -> str:
        """Load a module to be patched; returns its name."""
        image = Image.open(locate(fspath(path)))
        before = self._allocations().keys()
        loaded: LoadedObject = self._serve("load_module", lambda: self.machine.modules.load_module(image))
        self._baseline |= self._allocations().keys() - before
        self._watch(loaded)
        return loaded.name

    def unload_module(self, name: str) -> None:
        """Unload a module again; refused while a patch changes it or has its code in it."""
        for each in self.enabled:
            if name == each.patch.name:
                raise KernelErrno(
                    errno.EWOULDBLOCK,
                    f"module '{name}' is in use",
                    advice=f"disable '{each.patch.name}' first",
                )
        loaded = self.machine.modules.objects.get(name)
        if loaded is not None and loaded.struct and self.machine.view("module", loaded.struct).refcnt.counter:
            raise KernelErrno(
                errno.EWOULDBLOCK, f"module '{name}' is in use", advice="a forced patch stays for ever"
            )
        self._serve("unload_module", lambda: self.machine.modules.unload_module(name))
        self._baseline &= self._allocations().keys()

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
        """Load a livepatch module (.ko); its init function enables the patch.  Returns its name."""
        image = Image.open(locate(fspath(path)))
        if image.modinfo.get("livepatch") != ["Y"]:
            raise KlpemuError(
                "no livepatch module (its modinfo does not say livepatch=Y)",
                where=image.path,
                advice="give old=new pairs for an object that only has the code",
            )
        before = self._live()
        name: str = self._serve("insmod", lambda: self.machine.modules.load_module(image).name)
        self._allocated[name] = self._live() - before
        self._refused = None
        try:
            status = self.machine.call(self.machine.kallsyms.address_of("init_module", name))
        except KlpemuError:
            self._unload_code(name)
            raise
        if status & 0xFFFF_FFFF:
            self._unload_code(name)
            number = (1 << 32) - (status & 0xFFFF_FFFF)
            raise self._refused or KernelErrno(
                number, f"the init function of '{name}' failed", where=image.path
            )
        self._settle()
        return name

    def disable(self, patch: Patch | str) -> None:
        """Disable a patch (write 0 to its sysfs `enabled`) and unload its code."""
        found = self._found(patch)
        name = found.patch.name
        self._serve(f"disable {name}", lambda: core.enabled_store(self.klp, found.guest, False))

    def reverse(self, patch: Patch | str) -> None:
        """Turn the transition of a patch around (write the opposite to its sysfs `enabled`)."""
        guest = self._found(patch).guest
        if guest != self.klp.transition_patch:
            raise KernelErrno(
                errno.EINVAL, f"patch '{self.klp.name_of(guest)}' is not in transition", advice="disable it"
            )
        enabled = not guest.enabled
        self._serve("reverse", lambda: core.enabled_store(self.klp, guest, enabled))

    def force(self, patch: Patch | str) -> None:
        """End the transition of a patch whatever the tasks are doing (write 1 to its sysfs `force`)."""
        guest = self._found(patch).guest
        self._serve("force", lambda: core.force_store(self.klp, guest))

    @property
    def in_transition(self) -> str:
        """The name of the patch in transition, or ""."""
        address = self.klp.klp_transition_patch.get()
        return next((each.patch.name for each in self.enabled if each.guest.address_ == address), "")

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
                code = self.machine.space.read(address, min(15, 4096 - (address & 4095)))
                instruction = next(disassemble(code, address, att=att))
                known[address] = (self.machine.kallsyms.describe(address), instruction)
        self._settle()
        return Trace(result, tuple(known[address] for address in addresses))

    def verify(self, step: str = "") -> Report:
        """Check every invariant on the kernel as it is now."""
        with undone(self.machine):
            report = verify(self.subject(), step)
        if self.consistency is None:
            return report
        return Report.merged([report, self.consistency.report(step)], step)

    def subject(self) -> Subject:
        """What the invariants judge: the live memory, the loaded files, and the patches that are enabled."""
        machine = self.machine
        objects = machine.modules.objects.values()
        moving = self._note_established()
        replaces = any(
            each.patch.replace and each.patch.name == moving and moving not in self._established
            for each in self.enabled
        )
        return Subject(
            memory=machine.space,
            layouts=machine.layouts,
            kallsyms=machine.kallsyms,
            symbols=machine.vmlinux.symbols,
            texts=[text for each in objects for text in expected_texts(each)],
            sites=frozenset(ip for each in objects for ip in each.sites),
            functions=expected_functions(
                machine.kallsyms,
                [(each.patch, each.new_func) for each in self.enabled],
                moving,
                replaces=replaces,
            ),
            patches=[each.patch.name for each in self.enabled],
            execute=partial(execute_stream, machine),
            slab=machine.slab,
            remaining=[(at, tag) for at, tag in self._allocations().items() if at not in self._baseline],
            shadow_users=self.klp.shadow_users,
            livepatches=[each.module for each in self.enabled],
        )

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
            self._note_established()

    def _note_established(self) -> str:
        """Remember which patches have been through their first transition; returns the one in transition."""
        moving = self.in_transition
        self._established = {each.patch.name for each in self.enabled if each.patch.name != moving} | (
            self._established & {moving}
        )
        return moving

    def _found(self, patch: Patch | str) -> EnabledPatch:
        name = patch if isinstance(patch, str) else patch.name
        found = next((each for each in self.enabled if each.patch.name == name), None)
        if found is None:
            raise KernelErrno(errno.ENOENT, f"patch '{name}' is not enabled", advice="enable it first")
        return found

    def _watch(self, loaded: LoadedObject, *functions: int) -> None:
        """Have calls of an object's functions observed: those with a site, and replacements."""
        if self.consistency is not None:
            kallsyms = self.machine.kallsyms
            found = (kallsyms.at(site) for site in loaded.sites)
            self.consistency.watch({*functions, *(each.address for each in found if each is not None)})

    def _insmod(self, patch: Patch, image: Image) -> None:
        before = self._live()
        loaded = self.machine.modules.load_module(image, patch.name)
        self.machine.view("module", loaded.struct).klp = True  # the object may say nothing of it
        with ExitStack() as undo:
            undo.callback(self.machine.modules.unload_module, patch.name)
            new_func = {
                func.new: self._replacement(loaded, func.new)
                for funcs in patch.objects.values()
                for func in funcs
            }
            guest = materialise(self.machine, patch, loaded.struct, new_func)
            release = partial(discard, self.machine, guest)
            undo.callback(release)
            self._allocated[patch.name] = self._live() - before
            self._watch(loaded, *new_func.values())
            try:
                core.klp_enable_patch(self.klp, guest)
            except FtraceBug:
                undo.pop_all()  # what is half done may still lead into the new code
                raise
            undo.pop_all()
        self.enabled.append(EnabledPatch(patch, guest, loaded, new_func, release))

    def _klp_enable_patch(self, machine: Machine, registers: dict[str, int]) -> int:
        """The export that a livepatch module's init function calls."""
        guest = machine.view("klp_patch", registers["rdi"])
        try:
            if not guest.address_ or not guest.mod or not guest.objs:
                raise KernelErrno(errno.EINVAL, "a klp_patch without module or objects")
            name = self.klp.name_of(guest)
            loaded = machine.modules.objects.get(name)
            if loaded is None:
                raise KernelErrno(errno.EINVAL, f"the patch's module '{name}' is not loaded")
            patch, new_func = declared(self.klp, guest, loaded.path)
            self._watch(loaded, *new_func.values())
            core.klp_enable_patch(self.klp, guest)
        except KernelErrno as error:
            self._refused = error
            return -error.number
        self.enabled.append(EnabledPatch(patch, guest, loaded, new_func, lambda: None))
        return 0

    def _unload_code(self, name: str) -> None:
        if not isinstance(self._refused, FtraceBug):
            self._serve("rmmod", lambda: self.machine.modules.unload_module(name))

    def _name_of(self, image: Image) -> str:
        return image.modinfo.get("name", [module_name(image.path)])[0]

    def _replacement(self, loaded: LoadedObject, name: str) -> int:
        symbols = self.machine.kallsyms.named(name, loaded.name)
        if not symbols:
            raise SymbolError(
                f"no function '{name}' to replace with",
                where=loaded.path,
                advice="name a function that the patch's code defines",
            )
        return symbols[0].address

    def _settle(self) -> None:
        """Let the kworker do what is due now, such as the release of freed patches."""
        if not self.machine.workqueue.is_empty:
            self.machine.run(lambda: self.machine.workqueue.is_empty)

    def _freed(self, guest: Any) -> None:
        """A patch is released (in the kworker): its module goes, too.

        It stays if the patch was forced, and after an ftrace bug: then a site may still lead into its code.
        """
        gone = next(each for each in self.enabled if each.guest == guest)
        self.enabled.remove(gone)
        allocated = self._allocated.pop(gone.patch.name)
        if guest.forced:
            self._baseline |= allocated
        if self.machine.ftrace.disabled.get() or guest.forced:
            return
        self._rmmod(gone)

    def _rmmod(self, gone: EnabledPatch) -> None:
        if self.consistency is not None:
            for text in gone.module.texts:
                end = text.address + len(text.contents)
                self.consistency.about_to_free(text.address, end, gone.patch.name)
            self.consistency.forget_patch(gone.guest.address_)
        gone.release()
        self.machine.modules.unload_module(gone.patch.name)

    def _live(self) -> set[int]:
        return self.machine.slab.live.keys() | self.machine.area.live.keys()

    def _allocations(self) -> dict[int, str]:
        slab, area = self.machine.slab.live, self.machine.area.live
        found = {at: tag for at, (_, tag) in [*slab.items(), *area.items()]}
        # What guest code has asked for ("kmalloc by ...") is its own, and may well outlive a patch.
        return {
            at: tag for at, tag in found.items() if at not in self.machine.by_struct and " by " not in tag
        }
