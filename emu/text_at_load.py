"""All that the kernel does to text when it is loaded, in the kernel's order.

For a module that is module_finalize() (arch/x86/kernel/module.c), and what the notifiers of static calls and
jump labels add while it is coming; for vmlinux static_call_init() of setup_arch(), preempt_dynamic_init() of
sched_init(), and alternative_instructions() (arch/x86/kernel/alternative.c).  The bytes are what the running
kernel has.
"""

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from elf.text_tables import (
    alt_instrs,
    jump_entries,
    paravirt_patch_sites,
    place_relative,
    static_call_sites,
    static_call_tramp_keys,
)
from emu.alternative import (
    Applied,
    ArchSymbols,
    alternatives_smp_unlock,
    apply_alternatives,
    apply_ibt_endbr,
    apply_paravirt,
    apply_retpolines,
    apply_returns,
)
from emu.errno import KernelErrno
from emu.jump_label import jump_label_update
from emu.memory import Memory
from emu.mitigations import Mitigations
from emu.paging import Access
from emu.placement import Placement
from emu.static_call import static_call_add_module, static_call_init, static_call_transform
from emu.text_image import TextImage

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["TextAtLoad", "alternative_instructions", "module_finalize", "sched_dynamic_update"]

_KERNEL_SPACE = range(1 << 63, 1 << 64)
# What sched_dynamic_update() makes of each static call for preempt=voluntary, Debian's default.
_PREEMPT_VOLUNTARY = {
    "cond_resched": "__cond_resched",
    "might_resched": "__cond_resched",
    "preempt_schedule": "",
    "preempt_schedule_notrace": "",
    "irqentry_exit_cond_resched": "",
}


@dataclass(eq=False, slots=True)
class TextAtLoad:
    """What was applied to one object, table by table; `decisions` are the kernel's words."""

    name: str
    cpu: str
    return_thunk: str
    decisions: Mapping[str, str]
    applied: list[Applied] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people: a line for each table, and one for each site that was refused."""
        found = []
        for each in self.applied:
            refused = f", {len(each.refused)} refused" if each.refused else ""
            found.append(f"{each.kind}: {each.applied} applied, {each.left} left{refused}")
            found += [f"  {why}" for why in each.refused[:10]]
        return found


class _Tables:
    """The sections of one object by name, relocated: where they are and what is in them."""

    def __init__(self, placement: Placement) -> None:
        self._sections: dict[str, tuple[int, bytearray]] = {}
        for section in placement.image.sections:
            data = placement.contents.get(section.index)
            if data and section.name not in self._sections:
                self._sections[section.name] = (placement.addresses[section.index], data)

    def section(self, name: str) -> tuple[bytes, int]:
        """Contents and address; empty if there is none of that name."""
        address, data = self._sections.get(name, (0, bytearray()))
        return bytes(data), address

    def places(self, name: str) -> list[int]:
        return place_relative(*self.section(name), name)


def text_of(placement: Placement, behind: Memory | None) -> TextImage:
    """A placed object's contents as text under construction, without the per-CPU sections."""
    parts = [
        (address, placement.contents[index])
        for index, address in placement.addresses.items()
        if address in _KERNEL_SPACE and index in placement.contents
    ]
    return TextImage(parts, behind)


def module_finalize(machine: "Machine", placement: Placement, name: str) -> TextAtLoad:
    """Make the relocated text of module `name` what this machine's kernel would run.

    Raises `KlpemuError` where the kernel would BUG, and KernelErrno EINVAL for a static call that is not
    exported.
    """
    chosen = machine.mitigations
    symbols = ArchSymbols(machine.vmlinux.symbols.get)
    text = text_of(placement, machine.space)
    tables = _Tables(placement)
    applied = _apply(text, tables, chosen, symbols)
    locks, (main, start) = tables.places(".smp_locks"), tables.section(".text")
    if locks and main and len(machine.percpu.areas) == 1:
        applied.append(alternatives_smp_unlock(text, locks, start, start + len(main)))
    is_text = _kernel_text(machine)
    tramp_keys = _tramp_keys(machine)
    sites = static_call_sites(*tables.section(".static_call_sites"))
    calls = static_call_add_module(text, sites, tramp_keys, is_text, chosen, symbols)
    if calls.refused and tramp_keys:
        raise KernelErrno(errno.EINVAL, calls.refused[0], where=placement.image.path)
    entries = jump_entries(*tables.section("__jump_table"))
    labels = jump_label_update(text, [entry for entry in entries if not is_text(entry.key)])
    applied += [each for each, table in ((calls, sites), (labels, entries)) if table]
    return TextAtLoad(name, chosen.cpu.name, chosen.return_thunk, chosen.decisions, applied)


def alternative_instructions(
    placement: Placement, lookup: Callable[[str], int | None], chosen: Mitigations, cpus: int
) -> TextAtLoad:
    """Make the text of a linked vmlinux what it is after the boot of `cpus` CPUs of the chosen kind.

    `placement` has all sections, those of init too; `lookup` gives symbols' addresses, None for missing ones.
    """
    symbols = ArchSymbols(lookup)
    text = text_of(placement, None)
    tables = _Tables(placement)
    # Static calls are there before any mitigation is chosen: their returns go through no thunk yet.
    before = replace(chosen, cpu=replace(chosen.cpu, capability=0), return_thunk="__x86_return_thunk")
    sites = static_call_sites(
        *_between(text, lookup, "__start_static_call_sites", "__stop_static_call_sites")
    )
    calls = static_call_init(text, sites, before, symbols)
    sched_dynamic_update(text, lookup, before, symbols)
    applied = [*_apply(text, tables, chosen, symbols), calls]
    start, end = lookup("_text"), lookup("_etext")
    if cpus == 1 and start is not None and end is not None:
        applied.append(alternatives_smp_unlock(text, tables.places(".smp_locks"), start, end))
    entries = jump_entries(*_between(text, lookup, "__start___jump_table", "__stop___jump_table"))
    applied.append(jump_label_update(text, entries))
    return TextAtLoad("vmlinux", chosen.cpu.name, chosen.return_thunk, chosen.decisions, applied)


def sched_dynamic_update(
    text: TextImage, lookup: Callable[[str], int | None], chosen: Mitigations, symbols: ArchSymbols
) -> None:
    """preempt_dynamic_init(): keys, trampolines and sites of the preemption points, for preempt=voluntary."""
    changed = {}
    for name, function in _PREEMPT_VOLUNTARY.items():
        key, trampoline = lookup(f"__SCK__{name}"), lookup(f"__SCT__{name}")
        func = lookup(function) if function else 0
        if key is None or func is None:
            continue
        text.write(key, func.to_bytes(8, "little"))
        changed[key] = func
        if trampoline is not None:
            code = text.read(trampoline, 6)
            new = static_call_transform(code, trampoline, func, tail=True, chosen=chosen, symbols=symbols)
            text.write(trampoline, new)
    sites = static_call_sites(
        *_between(text, lookup, "__start_static_call_sites", "__stop_static_call_sites")
    )
    static_call_init(text, [site for site in sites if site.key in changed], chosen, symbols)


def _apply(text: TextImage, tables: _Tables, chosen: Mitigations, symbols: ArchSymbols) -> list[Applied]:
    """What modules and vmlinux have in common, without tables that the object has not."""
    applied = []
    if tables.section(".parainstructions")[0]:
        sites = paravirt_patch_sites(tables.section(".parainstructions")[0])
        applied.append(apply_paravirt(text, sites, symbols))
    if retpolines := tables.places(".retpoline_sites"):
        applied.append(apply_retpolines(text, retpolines, chosen, symbols))
    if returns := tables.places(".return_sites"):
        applied.append(apply_returns(text, returns, chosen, symbols))
    if tables.section(".altinstructions")[0]:
        applied.append(apply_alternatives(text, alt_instrs(*tables.section(".altinstructions")), chosen))
    if endbr := tables.places(".ibt_endbr_seal"):
        applied.append(apply_ibt_endbr(text, endbr))
    return applied


def _between(text: Memory, lookup: Callable[[str], int | None], first: str, last: str) -> tuple[bytes, int]:
    """The bytes between two symbols, and where they begin; empty if the kernel has not both."""
    start, end = lookup(first), lookup(last)
    if start is None or end is None or end <= start:
        return b"", 0
    return text.read(start, end - start), start


def _tramp_keys(machine: "Machine") -> dict[int, int]:
    lookup = machine.vmlinux.symbols.get
    first, last = "__start_static_call_tramp_key", "__stop_static_call_tramp_key"
    return static_call_tramp_keys(*_between(machine.space, lookup, first, last))


def _kernel_text(machine: "Machine") -> Callable[[int], bool]:
    vmlinux = machine.vmlinux
    spans = [
        range(group.start, group.start + group.size)
        for group in (*vmlinux.placement.groups, vmlinux.entry)
        if group.access is Access.EXECUTE
    ]
    return lambda address: any(address in span for span in spans)
