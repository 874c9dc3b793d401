"""Loading and unloading modules: kernel/module/main.c.

A module is placed, relocated against the kernel and the modules before it, its `call __fentry__` sites are
turned into NOPs by a direct store (nothing can execute them yet), and only then do its pages become
executable.  Its init function runs in the guest; what is only needed until then is freed afterwards.

An object without `.gnu.linkonce.this_module` is loaded in the same way.  It gets a struct module of ours, no
license is asked for, and nothing of it runs by itself.
"""

import errno
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from elf.errors import KlpemuError
from elf.image import Image
from elf.mcount import fentry_sites
from emu.errno import KernelErrno
from emu.list import list_del_rcu
from emu.module_alloc import add_unformed_module, layout_and_allocate
from emu.module_exports import Exports, KernelSymbol
from emu.module_state import (
    MODULE_NAME_LEN,
    ModuleState,
    Taint,
    check_modinfo,
    check_this_module,
    forget_init_layout,
)
from emu.module_text import Text, convert_sites, refuse_bad_sites, texts_of
from emu.module_use import (
    add_module_usage,
    module_put,
    module_unload_free,
    strong_try_module_get,
    try_release_module_ref,
    users_of,
    uses_of,
)
from emu.module_version import check_vermagic
from emu.moduleparam import ModuleParameters
from emu.paging import Access
from emu.placement import Placement

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = [
    "MODULE_NAME_LEN",
    "LoadedObject",
    "ModuleLoader",
    "ModuleState",
    "Text",
    "convert_sites",
    "module_name",
    "refuse_bad_sites",
    "texts_of",
]


@dataclass(eq=False, slots=True)
class LoadedObject:
    """A loaded object: "" is vmlinux.  `sites` are the guest virtual addresses of its fentry sites.

    `struct` is the address of its struct module, `exports` what others may link against.
    """

    name: str
    path: str
    struct: int
    placement: Placement = field(repr=False)
    texts: list[Text] = field(repr=False)
    sites: list[int] = field(repr=False)
    exports: dict[str, KernelSymbol] = field(default_factory=dict)


def module_name(path: str) -> str:
    """The name a module goes by: its file's, without suffix, with the kernel's underscores."""
    return path.rsplit("/", 1)[-1].removesuffix(".o").removesuffix(".ko").replace("-", "_")


class ModuleLoader:
    """Loads and unloads modules of one machine; `objects` maps names to what is loaded, vmlinux as "".

    The hooks are the parts that others have in it; unless it says otherwise they get the address of a struct
    module.  `module_notify_list` are callbacks that get a module's new state and its struct module.
    """

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self.objects: dict[str, LoadedObject] = {}
        self.exports = Exports(machine, self.objects)
        self._params = ModuleParameters(machine)
        self.module_notify_list: list[Callable[[ModuleState, int], None]] = []
        # Livepatch's part in apply_relocations(); it gets where the module will be, and its name.
        self.klp_apply_relocations: Callable[[Placement, str], None] = lambda placement, name: None
        # The architecture's last word on the relocated bytes; it gets the same.
        self.module_finalize: Callable[[Placement, str], None] = lambda placement, name: None
        # Livepatch's part when a module comes and goes.
        self.klp_module_coming: Callable[[int], None] = lambda module: None
        self.klp_module_going: Callable[[int], None] = lambda module: None
        # The tracepoint: the module is complete, and its init function about to run.
        self.trace_module_load: Callable[[LoadedObject], None] = lambda module: None
        # The tracepoint: nobody uses the module any more, and its memory is about to be freed.
        self.trace_module_free: Callable[[LoadedObject], None] = lambda module: None
        # Whether something of the kernel still leads into a module whose init has failed.
        self.klp_leads_into: Callable[[int], bool] = lambda module: False
        # /sys/module.
        self.mod_sysfs_setup: Callable[[LoadedObject], None] = lambda module: None
        self.mod_sysfs_teardown: Callable[[LoadedObject], None] = lambda module: None
        self._tainted: set[Taint] = set()

    # System calls.

    def init_module(self, image: Image, parameters: str = "", name: str | None = None) -> LoadedObject:
        """Load a module and run its init function; whatever is raised, the module is gone again.

        Runs in a service.  KernelErrno if init returns one, with its number.
        """
        loaded = self._load(image, name, parameters)
        self.trace_module_load(loaded)
        self._do_init_module(loaded)
        return loaded

    def load_module(self, image: Image, name: str | None = None) -> LoadedObject:
        """Load an object without running anything of it: what its init would set up is not there."""
        loaded = self._load(image, name, None)
        module = self._view(loaded)
        module.state = ModuleState.LIVE
        self._notify(ModuleState.LIVE, loaded)
        self._enable_ro(loaded)
        module_put(module)
        return loaded

    def delete_module(self, name: str) -> None:
        """Run the module's exit function and unload it; runs in a service.

        ENOENT if it is not there, EWOULDBLOCK if somebody uses it, EBUSY if it is on its way in or out, or
        has an init function but none for the exit.  If exit fails in the guest the module goes all the same.
        """
        loaded = self._find(name)
        self._refuse_users(loaded)
        module = self._view(loaded)
        if module.state != ModuleState.LIVE:
            self._machine.log.pr_debug(f"{name} already dying")
            raise KernelErrno(errno.EBUSY, f"module '{name}' is not live")
        if module.init and not module.exit:
            raise KernelErrno(errno.EBUSY, f"module '{name}' has no exit function: it stays for ever")
        if try_release_module_ref(module):
            raise KernelErrno(errno.EWOULDBLOCK, f"module '{name}' is in use")
        module.state = ModuleState.GOING
        try:
            if module.exit:
                self._machine.hub.call_guest(module.exit)
        finally:
            self._go(loaded)

    def unload_module(self, name: str) -> None:
        """Unload what nothing uses any more, without running its exit function."""
        loaded = self._find(name)
        self._refuse_users(loaded)
        self._view(loaded).state = ModuleState.GOING
        if self._machine.hub.in_service:
            self._go(loaded)
        else:
            self._machine.service("unload_module", partial(self._go, loaded))

    def uses(self, name: str) -> list[str]:
        """Names of the modules whose symbols a module uses, sorted."""
        return sorted(uses_of(self._view(self._find(name))))

    def parameters(self, name: str) -> list[tuple[str, int]]:
        """The parameters that a module has in sysfs, with their file modes, in the module's order."""
        return self._params.parameters(self._find(name).struct)

    def param_get(self, module: str, name: str) -> str:
        """Read a parameter as its file in sysfs shows it; runs in a service."""
        return self._params.param_get(self._find(module).struct, name)

    def param_set(self, module: str, name: str, text: str) -> None:
        """Write a parameter's file in sysfs; runs in a service."""
        self._params.param_set(self._find(module).struct, name, text)

    @property
    def missing(self) -> Any:
        """What resolves a symbol that nobody exports (`emu.module_exports.Exports.missing`)."""
        return self.exports.missing

    @missing.setter
    def missing(self, resolve: Any) -> None:
        self.exports.missing = resolve

    # Loading.

    def _load(self, image: Image, name: str | None, parameters: str | None) -> LoadedObject:
        """load_module(): up to where init would run, the module COMING; nothing stays if that fails."""
        machine = self._machine
        name = name or image.modinfo.get("name", [module_name(image.path)])[0]
        if len(name) >= MODULE_NAME_LEN:
            raise KernelErrno(errno.ENOEXEC, f"module name '{name}' is too long", where=image.path)
        this_module = check_this_module(image, machine.layouts.sizeof("module"))
        check_vermagic(machine, image, name)
        self.exports.check_modstruct_version(image, name)
        taints = set() if this_module is None else check_modinfo(machine, image, name, self._tainted)
        if name in self.objects:
            raise KernelErrno(errno.EEXIST, f"module '{name}' is loaded already", where=image.path)
        sites = fentry_sites(image)
        refuse_bad_sites(image, sites)
        self._tainted |= taints
        owners: dict[str, int] = {}
        with ExitStack() as undo:
            placement = layout_and_allocate(machine, image, name, undo)
            values = self.exports.simplify_symbols(
                image,
                name,
                gplok=Taint.PROPRIETARY_MODULE not in taints,
                ref_module=lambda owner: self._ref_module(owner, owners, undo),
            )
            placement.relocate(lambda symbol: values[symbol.index])
            self.klp_apply_relocations(placement, name)
            self.module_finalize(placement, name)
            texts = texts_of(placement, name)
            addresses = convert_sites(placement, sites, machine.fentry)
            machine.install(placement)
            at = 0 if this_module is None else placement.addresses[this_module.index]
            struct = add_unformed_module(machine, name, at, placement, taints, parameters or "", undo)
            loaded = LoadedObject(name, image.path, struct, placement, texts, addresses)
            self._use_owners(loaded, owners, undo)
            self._add_kallsyms(loaded)
            undo.callback(machine.kallsyms.remove, name)
            for layout in self._sites_by_layout(loaded):
                machine.ftrace.ftrace_module_init(layout)
                undo.callback(machine.ftrace.ftrace_release_mod, layout)
            exports = self.exports.exports_of(loaded)
            self._complete_formation(loaded, exports)
            undo.callback(self.objects.pop, name)
            # prepare_coming_module(): what is enabled applies before the module's own code runs.
            self.klp_module_coming(loaded.struct)
            undo.callback(self._leave_coming, loaded)
            self._notify(ModuleState.COMING, loaded)
            if parameters is not None:
                self._params.parse_args(loaded.struct)
            self.mod_sysfs_setup(loaded)
            undo.pop_all()
        return loaded

    def _ref_module(self, owner: str, owners: dict[str, int], undo: ExitStack) -> None:
        """A symbol of `owner` is used: as long as that lasts it cannot go."""
        if owner in owners or not owner:
            return
        module = self._view(self.objects[owner])
        try:
            strong_try_module_get(module)
        except KernelErrno as error:
            if error.number == errno.EBUSY:
                # Another kernel thread would be waited for; nobody here can end that init.
                self._machine.log.pr_warn(f"gave up waiting for init of module {owner}.")
            raise
        owners[owner] = module.address_
        undo.callback(lambda: module_put(module) if owner in owners else None)

    def _use_owners(self, loaded: LoadedObject, owners: dict[str, int], undo: ExitStack) -> None:
        """Enter the uses; from then on they hold the references."""
        module = self._view(loaded)
        undo.callback(module_unload_free, self._machine, module)
        for name, address in list(owners.items()):
            add_module_usage(self._machine, module, self._machine.view("module", address))
            del owners[name]

    def _complete_formation(self, loaded: LoadedObject, exports: dict[str, KernelSymbol]) -> None:
        """Others may find the module from now on."""
        loaded.exports = exports
        self.exports.verify_exported_symbols(loaded)
        self.objects[loaded.name] = loaded
        self._view(loaded).state = ModuleState.COMING

    def _leave_coming(self, loaded: LoadedObject) -> None:
        """Loading has failed after others were told of the module."""
        self._view(loaded).state = ModuleState.GOING
        self._params.destroy(loaded.struct)
        self._notify(ModuleState.GOING, loaded)
        self.klp_module_going(loaded.struct)

    # Init.

    def _do_init_module(self, loaded: LoadedObject) -> None:
        module = self._view(loaded)
        try:
            status = self._do_one_initcall(module)
        except KlpemuError:
            self._fail_init(loaded)
            raise
        if status < 0:
            self._fail_init(loaded)
            what = f"the init function of '{loaded.name}' failed"
            raise KernelErrno(-status, what, where=loaded.path)
        if status > 0:
            self._machine.log.pr_warn(
                f"do_init_module: '{loaded.name}'->init suspiciously returned {status}, "
                "it should follow 0/-E convention\n"
                "do_init_module: loading module anyway..."
            )
        module.state = ModuleState.LIVE
        self._notify(ModuleState.LIVE, loaded)
        self._free_init(loaded)

    def _do_one_initcall(self, module: Any) -> int:
        """What the init function returns, an int."""
        if not module.init:
            return 0
        status = self._machine.hub.call_guest(module.init) & 0xFFFF_FFFF
        return status - (1 << 32) if status >> 31 else status

    def _fail_init(self, loaded: LoadedObject) -> None:
        """The module goes; it stays COMING where the kernel would free what something still leads into."""
        if self.klp_leads_into(loaded.struct):
            return
        module = self._view(loaded)
        module.state = ModuleState.GOING
        self._synchronize_rcu()
        module_put(module)
        self._go(loaded)

    def _free_init(self, loaded: LoadedObject) -> None:
        """What is only needed until init has returned goes: its sites, its symbols, and then its memory."""
        machine, placement = self._machine, loaded.placement
        start, size = placement.init_base, placement.init_size
        kept, gone = self._sites_by_layout(loaded)
        machine.ftrace.ftrace_release_mod(gone)  # ftrace_free_mem()
        loaded.sites = kept
        module = self._view(loaded)
        module_put(module)
        placement.forget_init()
        loaded.texts = [text for text in loaded.texts if not start <= text.address < start + size]
        machine.kallsyms.remove(loaded.name)
        self._add_kallsyms(loaded)
        machine.unwinder.forget(loaded.name)
        machine.bugs.forget(loaded.name)
        self._enable_ro(loaded)
        forget_init_layout(module)
        if size:
            machine.workqueue.schedule_work("init_free_wq", partial(self._do_free_init, start))

    def _do_free_init(self, address: int) -> None:
        """The work behind it: nobody walks the symbols any more."""
        self._synchronize_rcu()
        self._machine.area.free(address)

    def _enable_ro(self, loaded: LoadedObject) -> None:
        """module_enable_ro(): what init has set up is not written any more."""
        for group in loaded.placement.groups:
            if group.ro_after_init:
                self._machine.space.protect(group.start, group.size, Access.READ)

    # Unloading.

    def _find(self, name: str) -> LoadedObject:
        loaded = self.objects.get(name)
        if loaded is None or not name:
            raise KernelErrno(errno.ENOENT, f"module '{name}' is not loaded")
        return loaded

    def _refuse_users(self, loaded: LoadedObject) -> None:
        users = sorted(users_of(self._view(loaded)))
        if users:
            raise KernelErrno(errno.EWOULDBLOCK, f"module '{loaded.name}' is in use by {', '.join(users)}")

    def _go(self, loaded: LoadedObject) -> None:
        """The module is GOING: tell everybody, and free it (free_module())."""
        machine, module = self._machine, self._view(loaded)
        self._notify(ModuleState.GOING, loaded)
        self.klp_module_going(loaded.struct)
        for layout in self._sites_by_layout(loaded):
            machine.ftrace.ftrace_release_mod(layout)
        self.trace_module_free(loaded)
        self.mod_sysfs_teardown(loaded)
        module.state = ModuleState.UNFORMED
        module_unload_free(machine, module)
        self._params.destroy(loaded.struct)
        machine.kallsyms.remove(loaded.name)
        machine.unwinder.forget(loaded.name)
        machine.bugs.forget(loaded.name)
        list_del_rcu(module.list)
        self._synchronize_rcu()
        machine.slab.kfree(module.args)
        if loaded.struct in machine.slab.live:
            machine.slab.kfree(loaded.struct)
        placement = loaded.placement
        for section in placement.per_cpu:
            machine.percpu.free(placement.addresses[section.index])
        for base, size in ((placement.init_base, placement.init_size), (placement.base, placement.size)):
            if size:
                machine.area.free(base)
        del self.objects[loaded.name]

    # Inside.

    def _sites_by_layout(self, loaded: LoadedObject) -> tuple[list[int], list[int]]:
        """The sites of the core, and those that go after init: a page of records covers no foreign text."""
        start, size = loaded.placement.init_base, loaded.placement.init_size
        core = [site for site in loaded.sites if not start <= site < start + size]
        return core, [site for site in loaded.sites if start <= site < start + size]

    def _add_kallsyms(self, loaded: LoadedObject) -> None:
        placement = loaded.placement
        spans = [(group.start, group.start + group.size) for group in placement.groups]
        self._machine.kallsyms.add(loaded.name, placement.ksyms(loaded.name), spans)

    def _notify(self, state: ModuleState, loaded: LoadedObject) -> None:
        for callback in self.module_notify_list:
            callback(state, loaded.struct)

    def _synchronize_rcu(self) -> None:
        if self._machine.hub.in_service:  # or nobody else runs
            self._machine.synchronize("synchronize_rcu")

    def _view(self, loaded: LoadedObject) -> Any:
        return self._machine.view("module", loaded.struct)
