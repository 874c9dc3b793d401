"""Loading and unloading modules: kernel/module/main.c, as far as code that runs needs it.

A module is placed, relocated against the kernel and the modules before it, its `call __fentry__` sites are
turned into NOPs by a direct store (nothing can execute them yet), and only then do its pages become
executable.
"""

import enum
import errno
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from elf.errors import ElfError, SymbolError
from elf.image import Image
from elf.mcount import Site, SiteKind, fentry_sites, functions_at
from elf.symbols import STB_WEAK, Symbol
from emu.errno import KernelErrno
from emu.list import list_add_rcu, list_del_rcu
from emu.paging import Access
from emu.placement import Placement, lay_out
from emu.text_poke import CALL_OPCODE, NOP5, text_gen_insn

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = [
    "MODULE_NAME_LEN",
    "LoadedObject",
    "ModuleLoader",
    "Text",
    "convert_sites",
    "module_name",
    "refuse_bad_sites",
    "texts_of",
]

MODULE_NAME_LEN = 56  # include/linux/module.h


@dataclass(frozen=True, slots=True)
class Text:
    """Pages that are not writable, as the file and its relocations give them, before any site was touched."""

    name: str
    address: int
    contents: bytes = field(repr=False)


THIS_MODULE = ".gnu.linkonce.this_module"


class ModuleState(enum.IntEnum):
    """enum module_state (include/linux/module.h)."""

    LIVE = 0
    COMING = 1
    GOING = 2
    UNFORMED = 3


@dataclass(eq=False, slots=True)
class LoadedObject:
    """A loaded object: "" is vmlinux.  `sites` are the guest virtual addresses of its fentry sites."""

    name: str
    path: str
    struct: int
    placement: Placement = field(repr=False)
    texts: list[Text] = field(repr=False)
    sites: list[int] = field(repr=False)
    exports: dict[str, int] = field(default_factory=dict)
    depends_on: set[str] = field(default_factory=set)


def module_name(path: str) -> str:
    """The name a module goes by: its file's, without suffix, with the kernel's underscores."""
    return path.rsplit("/", 1)[-1].removesuffix(".o").removesuffix(".ko").replace("-", "_")


def refuse_bad_sites(image: Image, sites: Iterable[Site]) -> None:
    """Refuse an object one of whose records is neither the call nor one 5-byte NOP."""
    bad = [site for site in sites if site.kind is SiteKind.OTHER]
    if bad:
        names = functions_at(image, bad[:1])[0]
        where = f"{names[0].name}+{bad[0].address - names[0].value:#x}" if names else f"{bad[0].address:#x}"
        raise ElfError(
            f"no usable fentry site: {bad[0].reason}",
            where=f"{image.path}: {where}",
            advice="the object was not built for ftrace on x86-64",
        )


def convert_sites(placement: Placement, sites: Iterable[Site], fentry: int) -> list[int]:
    """Turn each `call __fentry__` into a NOP in the relocated bytes; returns the sites' addresses."""
    addresses = []
    for site in sites:
        section = placement.image.sections[site.section]
        base = placement.addresses.get(site.section)
        if base is None:
            continue  # a section that is not loaded
        data = placement.contents[site.section]
        found = bytes(data[site.offset : site.offset + 5])
        wanted = (
            text_gen_insn(CALL_OPCODE, base + site.offset, fentry) if site.kind is SiteKind.CALL else NOP5
        )
        if found != wanted:
            raise ElfError(
                f"the fentry site holds {found.hex(' ')}, expected {wanted.hex(' ')}",
                where=placement.image.place(f"{section.name}+{site.offset:#x}"),
            )
        data[site.offset : site.offset + 5] = NOP5
        addresses.append(base + site.offset)
    return addresses


class ModuleLoader:
    """Loads and unloads modules of one machine; `objects` maps names to what is loaded, vmlinux as ""."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self.objects: dict[str, LoadedObject] = {}
        self._exported: dict[str, tuple[int, str]] = {}
        # What to do with a symbol that exists nowhere; the bench binds it to a stub that fails when called.
        self.missing: Callable[[Symbol, str], int] = _refuse_missing
        # Livepatch's part in apply_relocations(); it gets where the module will be, and its name.
        self.klp_apply_relocations: Callable[[Placement, str], None] = lambda placement, name: None
        # Livepatch's part when a module comes and goes; they get the address of its struct module.
        self.klp_module_coming: Callable[[int], None] = lambda module: None
        self.klp_module_going: Callable[[int], None] = lambda module: None

    def load_module(self, image: Image, name: str | None = None) -> LoadedObject:
        """Load a relocatable object as module `name`; nothing of it stays behind if that fails."""
        machine = self._machine
        name = name or image.modinfo.get("name", [module_name(image.path)])[0]
        if len(name) >= MODULE_NAME_LEN:
            raise KernelErrno(errno.ENOEXEC, f"module name '{name}' is too long", where=image.path)
        if name in self.objects:
            raise KernelErrno(errno.EEXIST, f"module '{name}' is loaded already", where=image.path)
        sites = fentry_sites(image)
        refuse_bad_sites(image, sites)
        depends: set[str] = set()
        with ExitStack() as undo:
            placement = self._lay_out(image, name, undo)
            placement.relocate(lambda symbol: self._resolve(symbol, name, depends))
            self.klp_apply_relocations(placement, name)
            texts = texts_of(placement, name)
            addresses = convert_sites(placement, sites, machine.fentry)
            machine.install(placement)
            struct = self._new_struct(placement, name, livepatch=image.modinfo.get("livepatch") == ["Y"])
            undo.callback(self._free_struct, struct)
            spans = [(group.start, group.start + group.size) for group in placement.groups]
            machine.kallsyms.add(name, placement.ksyms(name), spans)
            undo.callback(machine.kallsyms.remove, name)
            machine.ftrace.ftrace_module_init(addresses)
            undo.callback(machine.ftrace.ftrace_release_mod, addresses)
            loaded = LoadedObject(name, image.path, struct, placement, texts, addresses)
            loaded.depends_on = depends
            loaded.exports = self._exports_of(placement)
            self.objects[name] = loaded
            undo.callback(self.objects.pop, name)
            # prepare_coming_module(): what is enabled applies before the module's own code runs.
            self._set_state(loaded, ModuleState.COMING)
            self.klp_module_coming(struct)
            undo.pop_all()
        for symbol, address in loaded.exports.items():
            self._exported.setdefault(symbol, (address, name))
        self._set_state(loaded, ModuleState.LIVE)
        return loaded

    def unload_module(self, name: str) -> None:
        """Unload a module that nothing uses any more."""
        machine = self._machine
        loaded = self.objects.get(name)
        if loaded is None or not name:
            raise KernelErrno(errno.ENOENT, f"module '{name}' is not loaded")
        users = sorted(each.name for each in self.objects.values() if name in each.depends_on)
        if users:
            raise KernelErrno(errno.EWOULDBLOCK, f"module '{name}' is in use by {', '.join(users)}")
        self._set_state(loaded, ModuleState.GOING)
        self.klp_module_going(loaded.struct)
        machine.ftrace.ftrace_release_mod(loaded.sites)
        machine.kallsyms.remove(name)
        machine.unwinder.forget(name)
        self._free_struct(loaded.struct)
        for section in loaded.placement.per_cpu:
            machine.percpu.free(loaded.placement.addresses[section.index])
        if loaded.placement.size:
            machine.area.free(loaded.placement.base)
        self._exported = {symbol: found for symbol, found in self._exported.items() if found[1] != name}
        del self.objects[name]

    def _lay_out(self, image: Image, name: str, undo: ExitStack) -> Placement:
        """Reserve the module's memory, and have `undo` give it back."""
        machine = self._machine

        def base(size: int) -> int:
            address = machine.area.reserve(size, f"module {name}")
            undo.callback(machine.area.free, address)
            return address

        def per_cpu(size: int, alignment: int) -> int:
            offset = machine.percpu.alloc(size, alignment)
            undo.callback(machine.percpu.free, offset)
            return offset

        return lay_out(image, base, per_cpu)

    def _resolve(self, symbol: Symbol, name: str, depends: set[str]) -> int:
        address = self._machine.vmlinux.symbols.get(symbol.name)
        if address is not None:
            return int(address)
        exported = self._exported.get(symbol.name)
        if exported is not None:
            depends.add(exported[1])
            return exported[0]
        if symbol.binding == STB_WEAK:  # such a reference may stay NULL
            return 0
        return self.missing(symbol, name)

    def _exports_of(self, placement: Placement) -> dict[str, int]:
        """Symbols with an entry in the export tables (EXPORT_SYMBOL makes a `__ksymtab_<name>`)."""
        marked = {
            symbol.name.removeprefix("__ksymtab_")
            for symbol in placement.image.symbols
            if symbol.name.startswith("__ksymtab_")
        }
        return {
            symbol.name: value
            for symbol in placement.image.symbols
            if symbol.name in marked and symbol.is_defined and (value := placement.value(symbol)) is not None
        }

    def _new_struct(self, placement: Placement, name: str, *, livepatch: bool) -> int:
        """The module's own `__this_module`, on the `modules` list; one of ours if it has none of this kernel.

        A module that was built for a kernel with another struct module than the image describes cannot be
        read through the image's layout.
        """
        machine = self._machine
        size = machine.layouts.sizeof("module")
        address = next(
            (
                placement.addresses[section.index]
                for section in placement.image.sections
                if section.name == THIS_MODULE and section.size == size
            ),
            0,
        )
        address = address or machine.slab.kzalloc(size, f"struct module {name}")
        module = machine.view("module", address)
        module.name = name.encode()
        module.state = ModuleState.UNFORMED
        module.klp = livepatch
        list_add_rcu(module.list, machine.list_head("modules"))
        return address

    def _set_state(self, loaded: LoadedObject, state: ModuleState) -> None:
        self._machine.view("module", loaded.struct).state = state

    def _free_struct(self, address: int) -> None:
        list_del_rcu(self._machine.view("module", address).list)
        if address in self._machine.slab.live:
            self._machine.slab.kfree(address)


def texts_of(placement: Placement, name: str) -> list[Text]:
    """What nobody may write of a relocated object: text and read-only data, the gaps included."""
    texts = []
    for group in placement.groups:
        if group.access is Access.WRITE:
            continue
        data = bytearray(group.size)
        for index, address in placement.addresses.items():
            if group.start <= address < group.start + group.size and index in placement.contents:
                start = address - group.start
                data[start : start + len(placement.contents[index])] = placement.contents[index]
        kind = "text" if group.access is Access.EXECUTE else "rodata"
        texts.append(Text(f"{name or 'vmlinux'}:{kind}", group.start, bytes(data)))
    return texts


def _refuse_missing(symbol: Symbol, name: str) -> int:
    raise SymbolError(
        f"Unknown symbol {symbol.name}",
        where=name,
        advice="load the module that exports it first; klpemu has no export of that name",
    )
