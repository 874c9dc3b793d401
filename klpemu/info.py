"""What a livepatch module is: what it declares, what it needs, and whether a kernel has that.

A module declares its patch when its init function calls klp_enable_patch().  Here that function only reads:
the module is loaded and its init runs in the guest, but nothing is enabled, and the module is unloaded again.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from os import PathLike, fspath
from typing import Any

from elf.errors import ElfError, KlpemuError, SymbolError
from elf.image import Image
from elf.klp_sections import KlpRelocation, klp_relocations, klp_sections, section_objname
from elf.section import Section
from elf.symbols import Symbol
from emu.errno import KernelErrno
from emu.machine import Machine
from emu.module import module_name
from emu.placement import Placement
from klpemu.fixtures import locate
from klpemu.info_code import CodeLine, ExplainedCode, Reference
from klpemu.kernel import Kernel
from patches import klp_relocation
from patches.livepatch import VMLINUX, static_funcs, static_objects
from patches.state import klp_for_each_state

__all__ = ["CALLBACKS", "FuncInfo", "ObjectInfo", "PatchInfo", "patch_info"]

CALLBACKS = ("pre_patch", "post_patch", "pre_unpatch", "post_unpatch")
# Symbols that this kernel lacks get addresses behind the module mapping space: nothing is ever mapped there.
MISSING = 0xFFFF_FFFF_FF00_0000
MISSING_STEP = 16


@dataclass(frozen=True, slots=True)
class FuncInfo:
    """A function that is replaced.

    `place` is where it is, as `sym+0x0/0x10 [mod]`, and `site` its fentry site, both empty if its object is
    not loaded; `new` is the replacement's place and `code` its instructions.  `problem` says why the kernel
    could not patch it.
    """

    old: str
    sympos: int
    place: str
    site: str
    new: str
    new_address: int
    code: tuple[CodeLine, ...] = field(repr=False)
    problem: str = ""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object that is patched; `callbacks` maps the names of those it has to their functions' places."""

    name: str
    loaded: bool
    callbacks: dict[str, str]
    functions: tuple[FuncInfo, ...]


@dataclass(frozen=True, slots=True)
class PatchInfo:
    """A livepatch module.

    `modinfo` is the file's, `parameters` are name, type and description; `states` ids and versions;
    `references` the klp relocations, by their section's name.  `missing` are the symbols that the module
    links against and this kernel lacks.  `problems` are what keeps this kernel from loading it, or keeps us
    from reading what it declares.
    """

    path: str
    name: str
    modinfo: dict[str, list[str]]
    parameters: tuple[tuple[str, str, str], ...]
    declared: bool
    replace: bool
    states: tuple[tuple[int, int], ...]
    objects: tuple[ObjectInfo, ...]
    references: dict[str, tuple[Reference, ...]]
    missing: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """This kernel, with these modules, has all that the patch needs of it now."""
        funcs = [func for obj in self.objects for func in obj.functions]
        unresolved = [each for some in self.references.values() for each in some if each.problem]
        return not (
            self.problems
            or self.missing
            or any(func.problem for func in funcs)
            or any(each.is_due for each in unresolved)
        )


@dataclass(frozen=True, slots=True)
class _Declared:
    replace: bool = False
    states: tuple[tuple[int, int], ...] = ()
    objects: tuple[ObjectInfo, ...] = ()


def patch_info(kernel: Kernel, path: str | PathLike[str], *, att: bool = False) -> PatchInfo:
    """Explain the livepatch module in a file, resolved against a kernel and the modules that are loaded.

    The kernel is as before afterwards, but for what the module's init function did by itself.  Raises
    KlpemuError for a file that is no livepatch module.
    """
    image = Image.open(locate(fspath(path)))
    if image.modinfo.get("livepatch") != ["Y"]:
        raise KlpemuError(
            "no livepatch module (its modinfo does not say livepatch=Y)",
            where=image.path,
            advice="klpemu sites lists the functions of other objects",
        )
    return _Reader(kernel, image, att=att).read()


class _Reader:
    """Reads one module; `declared` is what its init function declared, once that has run."""

    def __init__(self, kernel: Kernel, image: Image, *, att: bool) -> None:
        self._kernel = kernel
        self._machine = kernel.machine
        self._image = image
        self._att = att
        self._missing: dict[int, str] = {}
        self._problems: list[str] = []
        self._is_sound = True  # its klp sections lead nowhere else
        self._references = self._resolve()
        self._declared: _Declared | None = None

    def read(self) -> PatchInfo:
        """Load the module, let it declare its patch, and unload it."""
        before = set(self._machine.modules.objects)
        with self._listening():
            try:
                self._kernel.insmod(self._image.path)
            except KlpemuError as error:
                if self._declared is None:
                    self._problems.append(str(error))
            for name in sorted(self._machine.modules.objects.keys() - before):
                with suppress(KlpemuError):
                    self._machine.service("rmmod", partial(self._machine.modules.unload_module, name))
        if self._declared is None and not self._problems:
            self._problems.append("its init function does not call klp_enable_patch()")
        found = self._declared or _Declared()
        modinfo = self._image.modinfo
        return PatchInfo(
            path=self._image.path,
            name=modinfo.get("name", [module_name(self._image.path)])[0],
            modinfo=modinfo,
            parameters=tuple(_parameters(modinfo)),
            declared=self._declared is not None,
            replace=found.replace,
            states=found.states,
            objects=found.objects,
            references=self._references,
            missing=tuple(self._missing.values()),
            problems=tuple(self._problems),
        )

    def _resolve(self) -> dict[str, tuple[Reference, ...]]:
        """Every klp relocation of the file."""
        found: dict[str, tuple[Reference, ...]] = {}
        for rela in klp_sections(self._image):
            try:
                objname = section_objname(rela.name)
            except ElfError as error:
                self._problems.append(error.what)
                continue
            entries = klp_relocations(self._image, rela)
            found[rela.name] = tuple(self._reference(rela, objname, each) for each in entries)
        return found

    def _reference(self, rela: Section, objname: str, each: KlpRelocation) -> Reference:
        kallsyms, loaded = self._machine.kallsyms, self._machine.modules.objects
        is_due = objname == VMLINUX or objname in loaded
        symbol, address, problem = each.symbol.name, 0, ""
        try:
            name = each.name
            symbol = str(name)
            if name.objname == VMLINUX or name.objname in loaded:
                address = klp_relocation.resolve_symbol(kallsyms, each, objname)
            else:
                problem = f"module {name.objname} is not loaded"
        except (ElfError, SymbolError) as error:
            problem = error.what
        target = self._image.sections[rela.info]
        place = f"{target.name}+{each.offset:#x}"
        resolved = kallsyms.describe(address) if address else ""
        return Reference(each, objname, target.index, place, symbol, address, resolved, problem, is_due)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Have the module loaded as far as it goes, and what it asks of klp_enable_patch() read."""
        modules, exports = self._machine.modules, self._machine.traps.exports
        apply, missing = modules.klp_apply_relocations, modules.missing
        enable = exports["klp_enable_patch"]

        def tolerant(placement: Placement, name: str) -> None:
            try:
                apply(placement, name)
            except KlpemuError as error:
                self._problem(error)
                self._is_sound = isinstance(error, KernelErrno)

        def klp_enable_patch(_: Machine, registers: dict[str, int]) -> int:
            if self._declared is None:
                self._declared = self._read_declared(registers["rdi"])
            return 0

        modules.klp_apply_relocations, modules.missing = tolerant, self._miss
        exports["klp_enable_patch"] = klp_enable_patch
        try:
            yield
        finally:
            modules.klp_apply_relocations, modules.missing = apply, missing
            exports["klp_enable_patch"] = enable

    def _miss(self, symbol: Symbol, _: str) -> int:
        address = MISSING + MISSING_STEP * len(self._missing)
        self._missing[address] = symbol.name
        return address

    def _problem(self, error: KlpemuError) -> None:
        """Note an error in the kernel's words, unless something says the same already."""
        what = error.reason if isinstance(error, KernelErrno) else error.what
        told = {each.problem for some in self._references.values() for each in some}
        if what not in told and what not in self._problems:
            self._problems.append(what)

    def _read_declared(self, address: int) -> _Declared:
        """Read a `struct klp_patch` that nothing has changed yet."""
        klp, machine = self._kernel.klp, self._machine
        guest = machine.view("klp_patch", address)
        loaded = machine.modules.objects[klp.name_of(guest)]
        objects = static_objects(machine, guest)
        for obj in objects:
            if self._is_sound and obj.name and klp.string(obj.name) in machine.modules.objects:
                try:
                    klp_relocation.klp_apply_object_relocs(klp, guest, obj)
                except KlpemuError as error:
                    self._problem(error)
        references = [each for some in self._references.values() for each in some]
        code = ExplainedCode(machine, loaded, references, self._missing, att=self._att)
        states = tuple((state.id, state.version) for state in klp_for_each_state(klp, guest))
        return _Declared(guest.replace, states, tuple(self._object(obj, code) for obj in objects))

    def _object(self, obj: Any, code: ExplainedCode) -> ObjectInfo:
        klp, describe = self._kernel.klp, self._machine.kallsyms.describe
        name = klp.string(obj.name) if obj.name else VMLINUX
        found = {each: getattr(obj.callbacks, each) for each in CALLBACKS}
        loaded = name == VMLINUX or name in self._machine.modules.objects
        return ObjectInfo(
            name,
            loaded,
            {each: describe(address) for each, address in found.items() if address},
            tuple(self._func(func, name, code, loaded=loaded) for func in static_funcs(self._machine, obj)),
        )

    def _func(self, func: Any, objname: str, code: ExplainedCode, *, loaded: bool) -> FuncInfo:
        kallsyms = self._machine.kallsyms
        old = self._kernel.klp.string(func.old_name)
        place, site, problem = "", "", ""
        if loaded:
            try:
                module = "" if objname == VMLINUX else objname
                address = kallsyms.address_of(old, module, func.old_sympos)
                place = kallsyms.describe(address)
                location = self._machine.ftrace.ftrace_location(address)
                if location:
                    site = kallsyms.describe(location)
                else:
                    problem = "it has no fentry site; patch its callers instead"
            except SymbolError as error:
                problem = error.what
        new = kallsyms.describe(func.new_func)
        return FuncInfo(
            old, func.old_sympos, place, site, new, func.new_func, code.lines(func.new_func), problem
        )


def _parameters(modinfo: Mapping[str, list[str]]) -> Iterator[tuple[str, str, str]]:
    """Name, type and description of each parameter (MODULE_PARM_DESC, module_param)."""
    found: dict[str, list[str]] = {}
    for index, key in enumerate(("parmtype", "parm")):
        for each in modinfo.get(key, []):
            name, _, text = each.partition(":")
            found.setdefault(name, ["", ""])[index] = text
    for name, (kind, description) in found.items():
        yield name, kind, description
