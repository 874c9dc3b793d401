"""A linked kernel image, made what start_kernel() has made of it by the time anything is patched.

The image brings its own entry code, trampolines and handler.  What is ours are the stubs through which guest
code leaves for Python, behind the image's last page.  A kernel function that Python answers keeps its symbol
and its fentry site; a jump to its stub takes the place of its body.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from struct import Struct
from typing import TYPE_CHECKING

from elf.errors import ElfError, SymbolError
from elf.image import Image
from elf.kernel_symbols import KernelSymbols
from elf.layout import StructLayout
from emu.assembly import Code
from emu.ftrace_64 import append_trace_count
from emu.function_bodies import NEEDS_A_SYSTEM, image_runs, replace_bodies
from emu.kallsyms import Ksym
from emu.memory import PAGE_SIZE, MemoryFault
from emu.module_text import Text
from emu.paging import Access, AddressSpace
from emu.placement import Group, Placement
from emu.text_at_load import text_of
from emu.text_image import TextImage
from emu.text_poke import CALL_OPCODE, INSN_SIZE, NOP5
from emu.view import Layouts
from emu.vmlinux import EntryCode, Vmlinux, append_redirection, append_stubs, link

if TYPE_CHECKING:
    from emu.machine import Machine

__all__ = ["LinkedImage", "place_linked", "setup_per_cpu_areas", "texts_in"]

STUB_DISTANCE = 1 << 21  # the stubs begin at the next 2 MiB behind the image

OTHER_BUILD = "the symbols given belong to another build of the kernel, or the image was changed"
CALL = Struct("<Bi")
FUNCTION_TYPES = "tTwW"  # nm(1)
# 32-bit variables as they are when user space runs: system_state is SYSTEM_RUNNING; ftrace_init() was there.
INITIALISED = {"system_state": 3, "ftrace_enabled": 1, "last_ftrace_enabled": 1}

# Sections that only the bootloader's stub or the first instructions of a boot use.
NOT_LOADED = (".init.scratch", ".brk")


@dataclass(frozen=True)
class LinkedImage:
    """A linked kernel image with what its file says beside the bytes: symbols in address order, layouts."""

    image: Image
    symbols: KernelSymbols
    structs: Mapping[str, StructLayout]

    @property
    def per_cpu_size(self) -> int:
        """Bytes of a vCPU's area that belong to the image's own per-CPU variables."""
        return self.address_of("__per_cpu_end")

    def per_cpu_offsets(self) -> dict[str, int]:
        """The per-CPU variables that entry code uses."""
        return {name: self.address_of(name) for name in ("current_task", "__preempt_count")}

    @cached_property
    def first_addresses(self) -> Mapping[str, int]:
        """Each name, and the lowest address that it stands for."""
        names, addresses = self.symbols.names, self.symbols.addresses
        return dict(zip(reversed(names), reversed(addresses), strict=True))

    def address_of(self, name: str) -> int:
        """Address of the first symbol of that name; raises SymbolError."""
        found = self.first_addresses.get(name)
        if found is None:
            raise SymbolError(
                f"the kernel image has no symbol {name}",
                where=self.image.path,
                advice="klpemu needs a kernel with CONFIG_LIVEPATCH and CONFIG_KALLSYMS_ALL",
            )
        return found


def place_linked(
    linked: LinkedImage,
    layouts: Layouts,
    entry_code: Sequence[EntryCode],
    exports: Sequence[str],
    apply: Callable[[Placement], None] = lambda placement: None,
) -> Vmlinux:
    """Lay out a linked image; `exports` get a stub each, which takes the place of the body where it has one.

    Without `entry_code` the image's own trampolines, list function and handler serve; with it, ours do, and
    their names mean ours.  `apply` does to the text what the kernel does to it for the CPU it boots on,
    before ftrace looks at it.
    """
    placement = _sections(linked)
    apply(placement)
    text = text_of(placement, None)
    start = -(-linked.address_of("_end") // STUB_DISTANCE) * STUB_DISTANCE
    code = Code()
    fixups: dict[int, str] = {}
    if entry_code:
        append_redirection(code, layouts, linked.per_cpu_offsets(), fixups, entry_code)
    ours = set(code.labels)
    refused = [name for name in NEEDS_A_SYSTEM if name in linked.first_addresses]
    exports = sorted({*refused, *(name for name in exports if not image_runs(name))})
    exits = append_stubs(code, exports, start)
    append_trace_count(code, layouts)
    labels = {name: start + offset for name, offset in code.labels.items()}
    sites = _convert_sites(text, linked)
    replaced = replace_bodies(text, linked, {name: labels[name] for name in exports}, set(sites))
    doubled = {*replaced, "__fentry__", "ftrace_stub"}
    labels = {f"__klpemu_{name}" if name in doubled else name: at for name, at in labels.items()}
    # The image's sites call its __fentry__, and its variables begin by pointing to its ftrace_stub.
    kept = {name: linked.address_of(name) for name in ("__fentry__", "ftrace_stub")}
    ours -= kept.keys()
    symbols = {**linked.first_addresses, **labels, **kept}
    link(code, fixups, symbols, start)
    freed = range(linked.address_of("__init_begin"), linked.address_of("__init_end"))
    _free_initmem(placement, freed)
    _mark_readonly(placement, linked)
    return Vmlinux(
        placement,
        Group(Access.EXECUTE, start, -(-len(code.bytes) // PAGE_SIZE) * PAGE_SIZE),
        bytes(code.bytes),
        labels,
        exits,
        symbols,
        {start + offset: warning for offset, warning in code.warnings.items()},
        [site for site in sites if site not in freed],
        [symbol for symbol in _ksyms(linked, freed) if symbol.name not in ours],
    )


def _sections(linked: LinkedImage) -> Placement:
    """The sections that are loaded, with their contents, at the addresses they were linked for."""
    image = linked.image
    loaded = [each for each in image.sections if each.is_alloc and each.name not in NOT_LOADED and each.size]
    per_cpu = [each for each in loaded if each.name.startswith(".data..percpu")]
    contents = {
        each.index: bytearray(each.size) if each.is_nobits else bytearray(image.contents(each))
        for each in loaded
    }
    start, end = linked.address_of("_text"), linked.address_of("_end")
    return Placement(
        image, start, end - start, {each.index: each.address for each in loaded}, [], per_cpu, contents
    )


def _free_initmem(placement: Placement, freed: range) -> None:
    """Nothing of the init sections is left when the first program runs."""
    for index, address in list(placement.addresses.items()):
        if address in freed:
            del placement.addresses[index], placement.contents[index]


def _mark_readonly(placement: Placement, linked: LinkedImage) -> None:
    """Decide what each run of pages allows (mark_rodata_ro()); data gets what its neighbours leave it."""
    read_only = range(linked.address_of("__start_rodata"), linked.address_of("__end_rodata"))
    sections = [placement.image.sections[index] for index in placement.addresses]
    for each in sorted(sections, key=lambda section: section.address):
        if each in placement.per_cpu:
            continue
        access = Access.WRITE
        if each.is_exec:
            access = Access.EXECUTE
        elif each.address in read_only or (not each.is_write and each.address < read_only.stop):
            access = Access.READ
        first = each.address & -PAGE_SIZE
        end = -(-(each.address + each.size) // PAGE_SIZE) * PAGE_SIZE
        last = placement.groups[-1] if placement.groups else Group(access, first, 0)
        first = max(first, last.start + last.size)
        if first == last.start + last.size and access is last.access:
            placement.groups[-1:] = [Group(access, last.start, max(end, first) - last.start)]
        elif end > first:
            placement.groups.append(Group(access, first, end - first))


def _convert_sites(text: TextImage, linked: LinkedImage) -> list[int]:
    """Turn the `call __fentry__` of every mcount record into a NOP, after checking all of them."""
    first, last = linked.address_of("__start_mcount_loc"), linked.address_of("__stop_mcount_loc")
    fentry = linked.address_of("__fentry__")
    try:
        table = sorted(memoryview(text.read(first, last - first)).cast("Q"))
        places = [text.place(ip, INSN_SIZE) for ip in table]
    except MemoryFault as fault:
        raise ElfError(
            f"no section holds {fault.address:#x}, which should be an fentry site or the table of them",
            where=linked.image.path,
            advice=OTHER_BUILD,
        ) from fault
    bad = [
        (ip, bytes(data[offset : offset + INSN_SIZE]))
        for ip, (data, offset) in zip(table, places, strict=True)
        if not _is_call(data, offset, fentry - ip - INSN_SIZE) and data[offset : offset + INSN_SIZE] != NOP5
    ]
    if bad:
        ip, found = bad[0]
        raise ElfError(
            f"{len(bad)} of {len(table)} fentry sites do not hold the call of __fentry__; "
            f"the first, at {ip:#x}, holds {found.hex(' ')}",
            where=linked.image.path,
            advice=OTHER_BUILD,
        )
    for data, offset in places:
        data[offset : offset + INSN_SIZE] = NOP5
    return table


def _is_call(data: bytearray, offset: int, displacement: int) -> bool:
    opcode, found = CALL.unpack_from(data, offset)
    return bool(opcode == CALL_OPCODE and found == displacement)


def _ksyms(linked: LinkedImage, freed: range) -> list[Ksym]:
    """All symbols in address order, without init memory's; a size is the distance to the next address."""
    names, types, addresses = linked.symbols.names, linked.symbols.types, linked.symbols.addresses
    end, first, last = linked.address_of("_end"), freed.start, freed.stop
    ends: list[int] = []
    above = here = end
    for address in reversed(addresses):
        if address < here:
            above, here = here, address
        ends.append(above)
    ends.reverse()
    return [
        Ksym(name, address, above - address, "", letter in FUNCTION_TYPES)
        for name, letter, address, above in zip(names, types, addresses, ends, strict=True)
        if address < end and not first <= address < last
    ]


def setup_per_cpu_areas(machine: "Machine") -> None:
    """Tell the kernel where each vCPU's area is, and that these vCPUs are the ones there are."""
    symbols, space = machine.vmlinux.symbols, machine.space
    for number, area in enumerate(machine.percpu.areas):
        offset = area.to_bytes(8, "little")
        space.write(symbols["__per_cpu_offset"] + 8 * number, offset)
        space.write(area + symbols["this_cpu_off"], offset)
        space.write(area + symbols["cpu_number"], number.to_bytes(4, "little"))
    count = len(machine.percpu.areas)
    mask = ((1 << count) - 1).to_bytes(8, "little")
    for name in ("__cpu_possible_mask", "__cpu_present_mask", "__cpu_online_mask", "__cpu_active_mask"):
        space.write(symbols[name], mask)
    for name in ("nr_cpu_ids", "__num_online_cpus"):
        space.write(symbols[name], count.to_bytes(4, "little"))
    for name, value in INITIALISED.items():
        space.write(symbols[name], value.to_bytes(4, "little"))


def texts_in(space: AddressSpace, groups: Sequence[Group]) -> list[Text]:
    """What nobody may write, as it lies in memory when the kernel is up (mark_readonly())."""
    return [
        Text(f"vmlinux:{'text' if group.access is Access.EXECUTE else 'rodata'}", group.start, data)
        for group in groups
        if group.access is not Access.WRITE and (data := space.read(group.start, group.size))
    ]
