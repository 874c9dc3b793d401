"""Klp relocations: references of a livepatch to symbols that no module may link against.

klp_apply_section_relocs() and what it calls (kernel/livepatch/core.c), apply_relocate_add()
(arch/x86/kernel/module.c).  Those for vmlinux are written while the livepatch module is loaded, before
anything of it can run; those for a module when that module is there, into text that is mapped by then.

What 6.1 does not check is done here as there, and is a finding of klpemu's (patches/invariants/relocations.py
has them): whether PC32 and PLT32 fit their field, and whether a field lies in the section that is relocated.
Only where the kernel would leave the module's memory, an error comes instead.  In log lines `%p` is the bare
address, as with no_hash_pointers.
"""

import bisect
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from elf.errors import ElfError, RelocationError, SymbolError
from elf.klp_sections import KlpRelocation, klp_relocations, klp_sections, section_objname
from elf.relocation import (
    R_X86_64_32,
    R_X86_64_32S,
    R_X86_64_64,
    R_X86_64_NONE,
    R_X86_64_PC32,
    R_X86_64_PC64,
    R_X86_64_PLT32,
    type_name,
)
from elf.section import Section
from emu.errno import KernelErrno
from emu.kallsyms import Kallsyms
from emu.memory import WritableMemory
from emu.mutex import mutex_held
from emu.placement import Placement
from patches.klp import Klp
from patches.livepatch import VMLINUX

__all__ = [
    "FIELDS",
    "PatchModule",
    "apply_relocate_add",
    "connect",
    "klp_apply_object_relocs",
    "klp_apply_section_relocs",
    "klp_resolve_symbols",
    "loaded_patch_module",
    "no_exec",
    "overflow",
    "overflows",
    "relocate_entries",
    "resolve_symbol",
    "text_mutex_held",
]

# By relocation type: bytes of the field, and whether its own address is subtracted.
FIELDS: Final = {
    R_X86_64_64: (8, False),
    R_X86_64_32: (4, False),
    R_X86_64_32S: (4, False),
    R_X86_64_PC32: (4, True),
    R_X86_64_PLT32: (4, True),
    R_X86_64_PC64: (8, True),
}


@dataclass(frozen=True, slots=True)
class PatchModule:
    """The livepatch module whose relocations are written (`pmod`).

    `memory` is where they are written to; `early` that the module is UNFORMED, so that plain stores do.
    """

    name: str
    placement: Placement
    memory: WritableMemory
    early: bool


def connect(klp: Klp) -> None:
    """Have the module loader apply what refers to vmlinux."""
    klp.machine.modules.klp_apply_relocations = partial(_apply_vmlinux_relocs, klp)


def loaded_patch_module(klp: Klp, name: str) -> PatchModule:
    """A livepatch module that is loaded, its memory written by the text poker."""
    return PatchModule(name, klp.machine.modules.objects[name].placement, _PokedMemory(klp), early=False)


def klp_apply_object_relocs(klp: Klp, patch_: Any, obj: Any) -> None:
    """Write what refers to a module that is there (`obj`) into the module of the patch."""
    pmod = loaded_patch_module(klp, klp.name_of(patch_))
    for rela in klp_sections(pmod.placement.image):
        klp_apply_section_relocs(klp, pmod, rela, klp.string(obj.name))


def klp_apply_section_relocs(klp: Klp, pmod: PatchModule, rela: Section, objname: str | None) -> None:
    """Write one section's relocations, if they are for the object `objname` (None: vmlinux)."""
    try:
        sec_objname = section_objname(rela.name)
    except ElfError as error:
        raise _refused(klp, error) from error
    if sec_objname != (objname or VMLINUX):
        return
    klp_resolve_symbols(klp, pmod, rela, sec_objname)
    apply_relocate_add(klp, pmod, rela)


def klp_resolve_symbols(klp: Klp, pmod: PatchModule, rela: Section, sec_objname: str) -> None:
    """Find the address of each symbol that a section's relocations refer to."""
    for each in klp_relocations(pmod.placement.image, rela):
        try:
            address = resolve_symbol(klp.machine.kallsyms, each, sec_objname)
        except (ElfError, SymbolError) as error:
            raise _refused(klp, error) from error
        pmod.placement.klp.symbol_values[each.symbol.index] = address


def resolve_symbol(kallsyms: Kallsyms, relocation: KlpRelocation, sec_objname: str) -> int:
    """Guest virtual address of the symbol that a klp relocation of a section for `sec_objname` refers to.

    ElfError or SymbolError, with the kernel's message, if there is none or it must not be referred to.
    """
    symbol = relocation.name
    if sec_objname != VMLINUX and symbol.objname == VMLINUX:
        raise SymbolError(
            f"invalid access to vmlinux symbol '{symbol.name}' from module-specific livepatch "
            "relocation section",
            advice=f"it belongs into .klp.rela.{VMLINUX}.*, or is exported and needs none",
        )
    module = "" if symbol.objname == VMLINUX else symbol.objname
    return kallsyms.address_of(symbol.name, module, symbol.sympos)


def apply_relocate_add(klp: Klp, pmod: PatchModule, rela: Section) -> None:
    """Write the values of a section's relocations, whose symbols have been resolved."""
    with text_mutex_held(klp, pmod):
        relocate_entries(klp, pmod, rela)


@contextmanager
def text_mutex_held(klp: Klp, pmod: PatchModule) -> Iterator[None]:
    """Hold text_mutex while the text of a module is written that code may run of, and sync at the end."""
    if pmod.early:
        yield
        return
    with mutex_held(klp.machine, "text_mutex"):
        try:
            yield
        finally:
            klp.machine.synchronize("text_poke_sync")


def overflows(type: int, value: int) -> bool:
    """The kernel checks two types: whether the low 32 bits of `value`, extended again, are all of it."""
    if type == R_X86_64_32:
        return value >= 1 << 32
    return type == R_X86_64_32S and 1 << 31 <= value < (1 << 64) - (1 << 31)


def relocate_entries(klp: Klp, pmod: PatchModule, rela: Section) -> None:
    """__apply_relocate_add(): what was written before an error stays, even the value that does not fit."""
    memory, kept = pmod.memory, pmod.placement.klp
    base = pmod.placement.addresses[rela.info]
    for number, each in enumerate(klp_relocations(pmod.placement.image, rela)):
        if each.type == R_X86_64_NONE:
            continue
        if each.type not in FIELDS:
            raise no_exec(klp, f"{pmod.name}: Unknown rela relocation: {each.type}")
        size, is_relative = FIELDS[each.type]
        location = base + each.offset
        symbol_value = kept.symbol_values[each.symbol.index]
        value = (symbol_value + each.addend) % 2**64
        if any(memory.read(location, size)):
            raise no_exec(
                klp,
                "x86/modules: Skipping invalid relocation target, existing value is nonzero for type "
                f"{each.type}, loc {location:016x}, val {value:x}",
            )
        if is_relative:
            value = (value - location) % 2**64
        memory.write(location, value.to_bytes(8, "little")[:size])
        kept.written[rela.index, number] = symbol_value
        if overflows(each.type, value):
            raise overflow(klp, pmod, each, value)


def overflow(klp: Klp, pmod: PatchModule, relocation: KlpRelocation, value: int) -> KernelErrno:
    """What the kernel says of a value that does not fit, to be raised."""
    error = no_exec(klp, f"overflow in relocation type {relocation.type} val {value:x}")
    klp.log.pr_err(f"`{pmod.name}' likely not compiled with -mcmodel=kernel")
    return error


# At load.


def _apply_vmlinux_relocs(klp: Klp, placement: Placement, name: str) -> None:
    """apply_relocations() of kernel/module/main.c, as far as klp relocations go, on a module being loaded."""
    pmod = PatchModule(name, placement, _UnformedMemory(placement), early=True)
    for rela in klp_sections(placement.image):
        _refuse_stray(pmod.placement, rela)
        if _is_in_memory(placement, rela):
            klp_apply_section_relocs(klp, pmod, rela, None)


def _refuse_stray(placement: Placement, rela: Section) -> None:
    """Refuse what the kernel would follow out of the module's memory.

    In the section headers that it keeps, a section that is not loaded has the address at which the file was
    read, which is freed.
    """
    image = placement.image
    if _is_for_later(rela) and not (_is_in_memory(placement, rela) and rela.is_alloc):
        raise RelocationError(
            "it or the section it applies to is not loaded: the kernel would use freed memory",
            where=image.place(rela.name),
            advice="both need SHF_ALLOC",
        )
    if _is_for_later(rela) and placement.is_init(rela.info):
        raise RelocationError(
            "it applies to what is freed after init: the kernel would write to freed memory",
            where=image.place(rela.name),
            advice="relocate nothing in .init.* that is not there yet",
        )
    if not _is_in_memory(placement, rela):
        return
    memory = _UnformedMemory(placement)
    for each in klp_relocations(image, rela):
        if each.type in FIELDS:
            memory.locate(placement.addresses[rela.info] + each.offset, FIELDS[each.type][0], each, rela)


def _is_for_later(rela: Section) -> bool:
    """It is for a module; a malformed name is for klp_apply_section_relocs() to refuse."""
    try:
        return section_objname(rela.name) != VMLINUX
    except ElfError:
        return False


def _is_in_memory(placement: Placement, rela: Section) -> bool:
    """The section that is relocated is in the module's memory; per-CPU data is elsewhere."""
    target = placement.image.sections[rela.info]
    return target.index in placement.addresses and target not in placement.per_cpu


class _UnformedMemory:
    """The sections of a module that is not in guest memory yet, by the addresses that they will have."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        skip = {section.index for section in placement.per_cpu}
        self._starts = sorted(
            (address, index) for index, address in placement.addresses.items() if index not in skip
        )

    def read(self, address: int, size: int) -> bytes:
        data, start = self.locate(address, size)
        return bytes(data[start : start + size])

    def write(self, address: int, data: bytes) -> None:
        section, start = self.locate(address, len(data))
        section[start : start + len(data)] = data

    def locate(
        self, address: int, size: int, entry: KlpRelocation | None = None, rela: Section | None = None
    ) -> tuple[bytearray, int]:
        """The section that holds all of a field, and the offset in it."""
        last = bisect.bisect_right(self._starts, (address, 1 << 32)) - 1
        while last >= 0:
            start, index = self._starts[last]
            data = self._placement.contents[index]
            if data:  # several sections begin at one place if all but one of them are empty
                if address + size <= start + len(data):
                    return data, address - start
                break
            last -= 1
        where = f"{rela.name}: {type_name(entry.type)} at {entry.offset:#x}" if rela and entry else ""
        raise RelocationError(
            f"field of {size} bytes at {address:#x} is in no section of the module",
            where=self._placement.image.place(where),
            advice="the kernel does not check that, and writes to somebody else's memory",
        )


class _PokedMemory:
    """Guest memory that is written with text_poke()."""

    def __init__(self, klp: Klp) -> None:
        self._machine = klp.machine

    def read(self, address: int, size: int) -> bytes:
        return self._machine.shared.read(address, size)

    def write(self, address: int, data: bytes) -> None:
        self._machine.poker.text_poke(address, data)


def _refused(klp: Klp, error: ElfError | SymbolError) -> KernelErrno:
    klp.log.pr_err(f"livepatch: {error.what}")
    return KernelErrno(errno.EINVAL, error.what, where=error.where, advice=error.advice)


def no_exec(klp: Klp, what: str) -> KernelErrno:
    """ENOEXEC with its line in the log, to be raised."""
    klp.log.pr_err(what)
    return KernelErrno(errno.ENOEXEC, what)
