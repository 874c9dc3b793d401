"""Saving a machine as an ELF core, in the form in which kdump leaves a crashed kernel's memory: /proc/vmcore.

The notes are one NT_PRSTATUS a vCPU and VMCOREINFO (Documentation/admin-guide/kdump/vmcoreinfo.rst).  The
segments are all the physical memory that was ever handed out, the page tables included.  Each has its
physical address and the virtual one at which the page tables map it, so that a reader that knows nothing of
page tables (gdb) sees what one that walks them sees; QEMU's `dump-guest-memory -p` does the same.  What
nothing maps, the page tables themselves above all, stands where the direct mapping would have it, as in
/proc/vmcore.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from struct import Struct
from typing import Final

from elf.output import ET_CORE, PF_R, PF_W, PF_X, PT_LOAD, PT_NOTE, Segment, file_header, note, write_file
from emu.arena import Arena
from emu.cpu import VCpu
from emu.machine import Machine
from emu.memory import PAGE_SIZE
from emu.module_area import MODULES_VADDR
from emu.paging import ENTRIES, FRAME_MASK, NO_EXECUTE, PRESENT, WRITABLE
from emu.slab import PAGE_OFFSET
from emu.symbol_file import build_id
from emu.vmlinux import KERNEL_BASE

__all__ = ["OSRELEASE", "START_KERNEL_MAP", "save_core"]

# arch/x86/include/asm/page_64_types.h: __START_KERNEL_map
START_KERNEL_MAP: Final = 0xFFFF_FFFF_8000_0000
# No fixture kernel has a release of its own; its structs are those of 6.1.
OSRELEASE: Final = "6.1.0-klpemu"

NT_PRSTATUS: Final = 1
# include/uapi/linux/elfcore.h: signal and 4 ids, 4 times, the registers of user_regs_struct, pr_fpvalid.
_PRSTATUS: Final = Struct("<3ih2xQQ4i8q27Qi4x")
# arch/x86/include/asm/user_64.h
_USER_REGS: Final = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
_NO_SYSTEM_CALL: Final = 0xFFFF_FFFF_FFFF_FFFF

_TABLE: Final = Struct(f"<{ENTRIES}Q")
_ZERO_PAGE: Final = bytes(PAGE_SIZE)


@dataclass(frozen=True, slots=True, order=True)
class _Run:
    """Pages that follow each other both in virtual and in physical memory; `size` in bytes."""

    virtual: int
    physical: int
    size: int
    flags: int


def save_core(machine: Machine, path: str | os.PathLike[str]) -> None:
    """Save the machine's memory, page tables and registers as an ELF core; the machine stays as it is.

    The file appears when it is complete.  Raises KlpemuError if it cannot be written.  `save_symbols` writes
    the vmlinux that a debugger wants beside it.
    """
    root = machine.cpus[0].register("cr3")
    arena = machine.space.arena
    notes = b"".join(note("CORE", NT_PRSTATUS, _prstatus(cpu)) for cpu in machine.cpus)
    notes += note("VMCOREINFO", 0, _vmcoreinfo(machine, root))
    in_use = arena.in_use()
    runs = list(_joined(sorted(_pages(arena, root, in_use))))
    notes_at = len(file_header(ET_CORE, [Segment(PT_NOTE, 0, 0, 0)] * (1 + len(runs))))
    memory_at = -(-(notes_at + len(notes)) // PAGE_SIZE) * PAGE_SIZE
    offsets = {}
    end = memory_at
    for span in in_use:
        offsets[span] = end - span.start
        end += len(span)

    def load(run: _Run) -> Segment:
        offset = next(run.physical + offsets[span] for span in in_use if run.physical in span)
        return Segment(PT_LOAD, run.flags, offset, run.size, run.virtual, run.physical, PAGE_SIZE)

    header = file_header(ET_CORE, [Segment(PT_NOTE, 0, notes_at, len(notes)), *map(load, runs)])
    pages = (
        (frame + offsets[span], page)
        for span in in_use
        for frame in range(span.start, span.stop, PAGE_SIZE)
        # A page of zeros is a hole in the file.
        if (page := arena.bytes[frame : frame + PAGE_SIZE]) != _ZERO_PAGE
    )
    write_file(path, end, chain([(0, header + notes)], pages))


def _pages(arena: Arena, root: int, in_use: tuple[range, range]) -> Iterator[_Run]:
    """Every page the tables map, then every frame in use that no page is mapped to."""
    mapped = set()
    for address, entry in _mapped(arena, root, 39, 0):
        frame = entry & FRAME_MASK
        if not any(frame in span for span in in_use):
            continue  # nothing is there to be saved
        mapped.add(frame)
        flags = PF_R | (PF_W if entry & WRITABLE else 0) | (0 if entry & NO_EXECUTE else PF_X)
        yield _Run(address, frame, PAGE_SIZE, flags)
    for span in in_use:
        for frame in range(span.start, span.stop, PAGE_SIZE):
            if frame not in mapped:
                yield _Run(PAGE_OFFSET + frame, frame, PAGE_SIZE, PF_R | PF_W)


def _mapped(arena: Arena, table: int, shift: int, base: int) -> Iterator[tuple[int, int]]:
    """Virtual address and entry of every page below a table whose entries span 1 << `shift` bytes each."""
    for index, entry in enumerate(_TABLE.unpack_from(arena.bytes, table)):
        if not entry & PRESENT:
            continue
        address = base | index << shift
        if shift > 12:
            yield from _mapped(arena, entry & FRAME_MASK, shift - 9, address)
        else:
            # SDM Vol. 1, 3.3.7.1: bits 48 to 63 repeat bit 47.
            yield address | (0xFFFF << 48 if address >> 47 else 0), entry


def _joined(pages: Iterable[_Run]) -> Iterator[_Run]:
    last: _Run | None = None
    for page in pages:
        if last is not None and page == replace(
            last, virtual=last.virtual + last.size, physical=last.physical + last.size, size=page.size
        ):
            last = replace(last, size=last.size + page.size)
            continue
        if last is not None:
            yield last
        last = page
    if last is not None:
        yield last


def _prstatus(cpu: VCpu) -> bytes:
    """`struct elf_prstatus` of a vCPU: its registers as they are.

    pr_pid is the vCPU's number plus one, as QEMU has it, and not the pid of the task current there, as kdump
    has it: gdb takes it for a thread's name, and idle tasks all have pid 0.
    """
    general = cpu.registers() | {"orig_rax": _NO_SYSTEM_CALL}
    values = [general[name] if name in general else cpu.register(name) for name in _USER_REGS]
    return _PRSTATUS.pack(*[0] * 6, cpu.number + 1, *[0] * 3, *[0] * 8, *values, 0)


def _vmcoreinfo(machine: Machine, root: int) -> bytes:
    """What a reader needs to translate addresses, under the names of crash_save_vmcoreinfo_init().

    All vCPUs' roots share the kernel half; the one named is vCPU 0's.  By the rule that readers find it with
    (__pa_symbol: minus __START_KERNEL_map, plus phys_base) it gets an address, but no page is mapped there.
    """
    swapper_pg_dir = START_KERNEL_MAP + root
    lines = (
        f"OSRELEASE={OSRELEASE}",
        f"BUILD-ID={build_id(machine).hex()}",
        f"PAGESIZE={PAGE_SIZE}",
        f"SYMBOL(swapper_pg_dir)={swapper_pg_dir:x}",
        f"SYMBOL(_stext)={KERNEL_BASE:x}",
        "NUMBER(phys_base)=0",
        f"SYMBOL(init_top_pgt)={swapper_pg_dir:x}",
        "NUMBER(pgtable_l5_enabled)=0",
        "KERNELOFFSET=0",
        f"NUMBER(KERNEL_IMAGE_SIZE)={MODULES_VADDR - START_KERNEL_MAP}",
        "NUMBER(sme_mask)=0",
    )
    return "".join(f"{line}\n" for line in lines).encode()
