"""The livepatches of one kernel: what they declare, their modules, and what was allocated for them."""

import errno
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from elf.errors import KlpemuError, SymbolError
from elf.image import Image
from emu.errno import KernelErrno
from emu.ftrace_rec import FtraceBug
from emu.machine import Machine
from emu.module import LoadedObject
from patches import core
from patches.klp import Klp
from patches.livepatch import Patch, declared, discard, materialise

if TYPE_CHECKING:
    from klpemu.kernel import Kernel

__all__ = ["EnabledPatch", "EnabledPatches"]


@dataclass(frozen=True, slots=True)
class EnabledPatch:
    """A patch as declared, its `klp_patch` in guest memory, and the addresses of its replacement functions.

    `release` gives back what was made for it once it is gone.  `stays` says that its module is unloaded by
    who loaded it, not when the patch is gone.
    """

    patch: Patch
    guest: Any
    module: LoadedObject
    new_func: Mapping[str, int]
    release: Callable[[], None] = field(repr=False)
    stays: bool = False


class EnabledPatches:
    """`enabled` are the patches that the core knows, oldest first, and those whose release is on its way.

    `established` are those that have been through their first transition.  `baseline` are the allocations
    that no patch has made, `refused` why klp_enable_patch() has refused the last one, if it has, and
    `declared` what the livepatch module has declared that called it last.
    """

    def __init__(self, kernel: "Kernel") -> None:
        self._kernel = kernel
        self._machine: Machine = kernel.machine
        self._klp: Klp = kernel.klp
        self.enabled: list[EnabledPatch] = []
        self.established: set[str] = set()
        self.refused: KlpemuError | None = None
        self.declared: Patch | None = None
        self._machine.modules.trace_module_free = self._about_to_free
        self.baseline = set(self.allocations())
        # What was allocated for the modules that go with their patches, by name.
        self.allocated: dict[str, set[int]] = {}

    @property
    def in_transition(self) -> str:
        """The name of the patch in transition, or ""."""
        address = self._klp.klp_transition_patch.get()
        return next((each.patch.name for each in self.enabled if each.guest.address_ == address), "")

    def note_established(self) -> str:
        """Remember which patches have been through their first transition; returns the one in transition."""
        moving = self.in_transition
        self.established = {each.patch.name for each in self.enabled if each.patch.name != moving} | (
            self.established & {moving}
        )
        return moving

    def found(self, patch: Patch | str) -> EnabledPatch:
        """The patch of that name; ENOENT if it is not enabled."""
        name = patch if isinstance(patch, str) else patch.name
        found = next((each for each in self.enabled if each.patch.name == name), None)
        if found is None:
            raise KernelErrno(errno.ENOENT, f"patch '{name}' is not enabled", advice="enable it first")
        return found

    def watch(self, loaded: LoadedObject, *functions: int) -> None:
        """Have calls of an object's functions observed: those with a site, and replacements."""
        consistency = self._kernel.consistency
        if consistency is not None:
            found = (self._machine.kallsyms.at(site) for site in loaded.sites)
            consistency.watch({*functions, *(each.address for each in found if each is not None)})

    def insmod(self, patch: Patch, image: Image, begin: Callable[[Klp, Any], None] | None = None) -> None:
        """Load the code of a patch declared here, and enable it, or do `begin` instead."""
        modules = self._machine.modules
        before = self.live()
        loaded = modules.load_module(image, patch.name)
        self._machine.view("module", loaded.struct).klp = True  # the object may say nothing of it
        with ExitStack() as undo:
            undo.callback(modules.unload_module, patch.name)
            new_func = {
                func.new: self._replacement(loaded, func.new)
                for funcs in patch.objects.values()
                for func in funcs
            }
            guest = materialise(self._machine, patch, loaded.struct, new_func)
            release = partial(discard, self._machine, guest)
            undo.callback(release)
            self.allocated[patch.name] = self.live() - before
            self.watch(loaded, *new_func.values())
            try:
                (begin or core.klp_enable_patch)(self._klp, guest)
            except FtraceBug:
                undo.pop_all()  # what is half done may still lead into the new code
                raise
            undo.pop_all()
        self.enabled.append(EnabledPatch(patch, guest, loaded, new_func, release))

    def klp_enable_patch(self, machine: Machine, registers: dict[str, int]) -> int:
        """The export that a livepatch module's init function calls."""
        guest = machine.view("klp_patch", registers["rdi"])
        try:
            if not guest.address_ or not guest.mod or not guest.objs:
                raise KernelErrno(errno.EINVAL, "a klp_patch without module or objects")
            name = self._klp.name_of(guest)
            loaded = machine.modules.objects.get(name)
            if loaded is None:
                raise KernelErrno(errno.EINVAL, f"the patch's module '{name}' is not loaded")
            patch, new_func = declared(self._klp, guest, loaded.path)
            self.declared = patch
            self.watch(loaded, *new_func.values())
            core.klp_enable_patch(self._klp, guest)
        except KernelErrno as error:
            self.refused = error
            return -error.number
        stays = name not in self.allocated
        self.enabled.append(EnabledPatch(patch, guest, loaded, new_func, lambda: None, stays))
        return 0

    def freed(self, guest: Any) -> None:
        """A patch is released (in the kworker): its module goes, too, unless somebody else unloads it.

        It stays if the patch was forced, and after an ftrace bug: then a site may still lead into its code.
        """
        gone = next(each for each in self.enabled if each.guest == guest)
        self.enabled.remove(gone)
        consistency = self._kernel.consistency
        # Who was forced may still mix versions.
        if consistency is not None and (not guest.forced or consistency.forgives):
            consistency.forget_patch(gone.guest.address_)
        if gone.stays:
            return
        allocated = self.allocated.pop(gone.patch.name)
        if guest.forced:
            self.baseline |= allocated
        if self._machine.ftrace.disabled.get() or guest.forced:
            return
        gone.release()
        if self._machine.view("module", gone.module.struct).exit:
            self._machine.modules.delete_module(gone.patch.name)
        else:
            self._machine.modules.unload_module(gone.patch.name)

    def _about_to_free(self, loaded: LoadedObject) -> None:
        """A module's text goes: nobody may be in it."""
        if self._kernel.consistency is not None:
            for text in loaded.texts:
                end = text.address + len(text.contents)
                self._kernel.consistency.about_to_free(text.address, end, loaded.name)

    def leads_into(self, module: int) -> bool:
        """Whether a jump, or livepatch's structs, still lead into a module whose init has failed."""
        return bool(self._machine.ftrace.disabled.get()) or self._klp.leads_into(module)

    def live(self) -> set[int]:
        """Addresses of all that is allocated."""
        return self._machine.slab.live.keys() | self._machine.area.live.keys()

    def allocations(self) -> dict[int, str]:
        """What is allocated for the kernel itself and for modules: address and tag."""
        slab, area = self._machine.slab.live, self._machine.area.live
        found = {at: tag for at, (_, tag) in [*slab.items(), *area.items()]}
        # What guest code has asked for ("kmalloc by ...") is its own, and may well outlive a patch.
        return {
            at: tag for at, tag in found.items() if at not in self._machine.by_struct and " by " not in tag
        }

    def remaining(self) -> list[tuple[int, str]]:
        """What is allocated and is nobody's but a patch's: address and tag."""
        return [(at, tag) for at, tag in self.allocations().items() if at not in self.baseline]

    def _replacement(self, loaded: LoadedObject, name: str) -> int:
        symbols = self._machine.kallsyms.named(name, loaded.name)
        if not symbols:
            raise SymbolError(
                f"no function '{name}' to replace with",
                where=loaded.path,
                advice="name a function that the patch's code defines",
            )
        return symbols[0].address
