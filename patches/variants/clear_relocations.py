"""Klp relocations are cleared when their module goes: since 0c05e7bd2d01 ("livepatch,x86: Clear relocation
targets on a module removal") (in v6.3).

6.1 leaves in the livepatch what it wrote for a module, addresses of memory that is freed by then, and refuses
to write there again: a patched module that has gone cannot come back, "existing value is nonzero".  Since
0c05e7bd2d01 the fields are zero again once the module has gone, if they still hold what was written.

The commit also has a value checked before it is written, not after.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from elf.klp_sections import klp_relocations, klp_sections, section_objname
from elf.relocation import R_X86_64_NONE
from elf.section import Section
from emu.errno import KernelErrno
from patches import core, klp_relocation
from patches.klp import Klp
from patches.klp_relocation import (
    FIELDS,
    PatchModule,
    loaded_patch_module,
    no_exec,
    overflow,
    overflows,
    text_mutex_held,
)
from patches.variants import replaced

__all__ = ["relocation_targets_cleared"]


@contextmanager
def relocation_targets_cleared() -> Iterator[None]:
    """Clear the relocation targets on a module removal.

    As in the kernel nothing is cleared for a patch that has failed on a module: its relocations stay, and the
    module is refused the next time, too.
    """
    klp_free_object_loaded = core.klp_free_object_loaded

    def clear_and_free(klp: Klp, patch_: Any, obj: Any) -> None:
        _klp_clear_object_relocs(klp, patch_, obj)
        klp_free_object_loaded(klp, patch_, obj)

    with (
        replaced(klp_relocation, "relocate_entries", partial(_write_relocate_add, apply=True)),
        replaced(core, "klp_free_object_loaded", clear_and_free),
    ):
        yield


def _klp_clear_object_relocs(klp: Klp, patch_: Any, obj: Any) -> None:
    """What one section's clearing ends with does not matter to the next."""
    pmod = loaded_patch_module(klp, klp.name_of(patch_))
    for rela in klp_sections(pmod.placement.image):
        if section_objname(rela.name) == klp.string(obj.name):
            with suppress(KernelErrno), text_mutex_held(klp, pmod):
                _write_relocate_add(klp, pmod, rela, apply=False)


def _write_relocate_add(klp: Klp, pmod: PatchModule, rela: Section, *, apply: bool) -> None:
    """__write_relocate_add() of arch/x86/kernel/module.c: `apply` writes the values, else zeroes."""
    memory, kept = pmod.memory, pmod.placement.klp
    base = pmod.placement.addresses[rela.info]
    for number, each in enumerate(klp_relocations(pmod.placement.image, rela)):
        if each.type == R_X86_64_NONE:
            continue
        if each.type not in FIELDS:
            raise no_exec(klp, f"{pmod.name}: Unknown rela relocation: {each.type}")
        size, is_relative = FIELDS[each.type]
        location = base + each.offset
        symbol_value = kept.symbol_values.get(each.symbol.index, 0)
        value = (symbol_value + each.addend) % 2**64
        if overflows(each.type, value):
            raise overflow(klp, pmod, each, value)
        if is_relative:
            value = (value - location) % 2**64
        data = value.to_bytes(8, "little")[:size]
        existing = memory.read(location, size)
        place = f"for type {each.type}, loc {location:016x}, val {value:x}"
        if apply:
            if any(existing):
                raise no_exec(
                    klp, f"x86/modules: Invalid relocation target, existing value is nonzero {place}"
                )
            memory.write(location, data)
            kept.written[rela.index, number] = symbol_value
        else:
            if existing != data:
                what = f"Invalid relocation target, existing value does not match expected value {place}"
                klp.log.pr_warn(f"x86/modules: {what}")
                raise KernelErrno(errno.ENOEXEC, what)
            memory.write(location, bytes(size))
            kept.written.pop((rela.index, number), None)
