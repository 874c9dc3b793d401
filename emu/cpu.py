"""A vCPU: one Unicorn instance over the arena, with its own page-table root, GS base and translations.

Every odd line here answers a trait of Unicorn 2.1.4 that was measured, not guessed:

- Kernel addresses work only with paging on, so CR0, CR3, CR4 and EFER are set up as long mode wants them (SDM
  Vol. 3A, 4.1.1).
- Every run passes a count.  A run without one in between makes Unicorn drop all translated code.
- `int3` and page faults arrive through the interrupt hook with RIP past the `int3`, and on the faulting
  instruction; `ud2` arrives as an error with RIP on it; a guest leaves by `hlt`, with RIP past it.
- A fault leaves QEMU's "old exception" set, and the next one would come out as a double fault; restoring a
  clean context clears it.
- The hook that records executed addresses costs half a microsecond an instruction, so it lives on an instance
  of its own (`trace=True`), and the others run without any.
"""

import ctypes
import enum
import struct
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import unicorn as untyped_unicorn
import unicorn.x86_const as x86
from unicorn.unicorn_py3.unicorn import uclib  # the bindings' own reads cost 2.6 us a register

from elf.errors import KlpemuError
from emu.paging import AddressSpace

__all__ = ["REGISTERS", "UD2", "BlockHooks", "Stop", "StopKind", "VCpu"]

unicorn: Any = untyped_unicorn  # the bindings have annotations, but incomplete ones

REGISTERS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "eflags"),
)

_IDS = (ctypes.c_int * len(REGISTERS))(*(getattr(x86, f"UC_X86_REG_{name.upper()}") for name in REGISTERS))
XMM_COUNT = 16
_XMM_IDS = (ctypes.c_int * XMM_COUNT)(*(x86.UC_X86_REG_XMM0 + index for index in range(XMM_COUNT)))
_VALUES = struct.Struct(f"<{len(REGISTERS)}Q")
# uc_ctl()'s requests, as the macros of unicorn.h make them: what, how many arguments, and that it is a write.
_REMOVE_CACHE = unicorn.UC_CTL_TB_REMOVE_CACHE | 2 << 26 | unicorn.UC_CTL_IO_WRITE << 30
_FLUSH_TLB = unicorn.UC_CTL_TLB_FLUSH | unicorn.UC_CTL_IO_WRITE << 30
_INDEX = {name: index for index, name in enumerate(REGISTERS)}

MSR_EFER = 0xC000_0080
EFER_LME_LMA_NXE = 1 << 8 | 1 << 10 | 1 << 11
CR0_PE_MP_WP_PG = 1 << 0 | 1 << 1 | 1 << 16 | 1 << 31
CR4_PAE_OSFXSR_OSXMMEXCPT = 1 << 5 | 1 << 9 | 1 << 10
EFLAGS_FIXED = 1 << 1

UD2 = bytes.fromhex("0f0b")
MAX_INSTRUCTION = 15  # bytes (SDM Vol. 2A, 2.3.11)
INTERRUPT_BREAKPOINT = 3
INTERRUPT_PAGE_FAULT = 14
RUNS_KEPT = 16  # as many as the flight recorder shows instructions
# Room for the translated code of 10,000 redirected functions; with less, each call translates anew.
TRANSLATION_BUFFER = 128 << 20


class StopKind(enum.Enum):
    """Why a vCPU left the guest."""

    BUDGET = "instruction budget spent, or hlt"
    BREAKPOINT = "int3"
    UNDEFINED = "undefined instruction"
    FAULT = "exception"


class Stop(NamedTuple):
    """Where and why a run ended.  `rip` is past a `hlt` or `int3`, and on the instruction otherwise."""

    kind: StopKind
    rip: int
    vector: int = 0
    address: int = 0  # CR2 of a page fault


class BlockHooks(list[Callable[[int], None]]):
    """Who is told of the basic blocks of a vCPU: for good, so no restore point puts it back."""


class VCpu:
    """One vCPU: `number` is the kernel's, `gs_base` the virtual address of its per-CPU area.

    With `trace`, `executed` are the addresses of the instructions it has executed, and `accesses`, if it is
    not None, what these have loaded and stored: whether it was a store, the physical address, and what was
    there before.
    """

    def __init__(self, space: AddressSpace, number: int, gs_base: int, *, trace: bool = False) -> None:
        self.number = number
        self.gs_base = gs_base
        self.executed: list[int] = []
        self.began_at: deque[int] = deque(maxlen=RUNS_KEPT)  # where the last runs began, oldest first
        self.stop_at: int | None = None
        self._interrupt: tuple[int, int] | None = None
        self._values = (ctypes.c_uint64 * len(REGISTERS))()
        self._pointers = (ctypes.c_void_p * len(REGISTERS))(
            *(ctypes.addressof(self._values) + 8 * index for index in range(len(REGISTERS)))
        )
        self._rip: int | None = None  # where the last run stopped, if nobody has set a register since
        self._value = ctypes.c_uint64()
        self._value_at = ctypes.byref(self._value)
        self._xmm = (ctypes.c_ubyte * (16 * XMM_COUNT))()
        self._xmm_pointers = (ctypes.c_void_p * XMM_COUNT)(
            *(ctypes.addressof(self._xmm) + 16 * index for index in range(XMM_COUNT))
        )
        self._uc: Any = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        uc = self._uc
        # A model without RDRAND and RDSEED: they would return the host's randomness.
        uc.ctl_set_cpu_model(x86.UC_CPU_X86_WESTMERE)
        uc.ctl_set_tcg_buffer_size(TRANSLATION_BUFFER)
        uc.mem_map_ptr(0, space.arena.size, unicorn.UC_PROT_ALL, space.arena.host_address)
        uc.hook_add(unicorn.UC_HOOK_INTR, self._on_interrupt)
        self.accesses: list[tuple[bool, int, bytes]] | None = None
        self._memory = space.arena.bytes
        self._on_block = BlockHooks()
        if trace:
            uc.hook_add(unicorn.UC_HOOK_CODE, self._on_instruction)
            uc.hook_add(unicorn.UC_HOOK_MEM_READ | unicorn.UC_HOOK_MEM_WRITE, self._on_access)
        uc.reg_write(x86.UC_X86_REG_CR3, space.new_root())
        uc.reg_write(x86.UC_X86_REG_CR4, CR4_PAE_OSFXSR_OSXMMEXCPT)
        uc.msr_write(MSR_EFER, EFER_LME_LMA_NXE)
        uc.reg_write(x86.UC_X86_REG_CR0, CR0_PE_MP_WP_PG)
        uc.reg_write(x86.UC_X86_REG_GS_BASE, gs_base)
        uc.reg_write(x86.UC_X86_REG_EFLAGS, EFLAGS_FIXED)
        self._clean = uc.context_save()
        space.translators.append(self)

    def registers(self) -> dict[str, int]:
        """The general registers, RIP and RFLAGS by name."""
        uclib.uc_reg_read_batch(self._uc._uch, _IDS, self._pointers, len(REGISTERS))
        return dict(zip(REGISTERS, _VALUES.unpack(self._values), strict=True))

    def set_registers(self, values: Mapping[str, int]) -> None:
        """Set those registers that `values` names, and leave the others as they are."""
        if len(values) < len(REGISTERS):
            uclib.uc_reg_read_batch(self._uc._uch, _IDS, self._pointers, len(REGISTERS))
        self._rip = None
        for name, value in values.items():
            self._values[_INDEX[name]] = value & 0xFFFF_FFFF_FFFF_FFFF
        uclib.uc_reg_write_batch(self._uc._uch, _IDS, self._pointers, len(REGISTERS))

    def register(self, name: str) -> int:
        """Any one register by name, control and segment registers among them."""
        return int(self._uc.reg_read(getattr(x86, f"UC_X86_REG_{name.upper()}")))

    def reset(self) -> None:
        """Every register as right after long mode was entered: nothing that ran before has a say any more."""
        self._uc.context_restore(self._clean)
        self._rip = None
        self.set_gs_base(self.gs_base)

    def set_gs_base(self, address: int) -> None:
        """Point GS at another per-CPU area: the tracing instance stands in for any vCPU."""
        self.gs_base = address
        self._uc.reg_write(x86.UC_X86_REG_GS_BASE, address)

    def context(self) -> Any:
        """All that a CPU has: whatever it is that Unicorn saves."""
        return self._uc.context_save()

    def set_context(self, context: Any) -> None:
        """Every register as it was when `context()` gave this."""
        self._uc.context_restore(context)
        self._rip = None

    def vectors(self) -> bytes:
        """xmm0 to xmm15, 16 bytes each."""
        uclib.uc_reg_read_batch(self._uc._uch, _XMM_IDS, self._xmm_pointers, XMM_COUNT)
        return bytes(self._xmm)

    def set_vectors(self, values: bytes) -> None:
        """Set xmm0 to xmm15."""
        if len(values) != len(self._xmm):
            raise ValueError(f"{len(values)} bytes are not {XMM_COUNT} registers of 16")
        ctypes.memmove(self._xmm, values, len(values))
        uclib.uc_reg_write_batch(self._uc._uch, _XMM_IDS, self._xmm_pointers, XMM_COUNT)

    def run(self, count: int) -> Stop:
        """Execute at most `count` instructions from RIP on; every iteration of a `rep` counts, plus one."""
        self._interrupt = None
        start = self._rip
        if start is None:
            start = self._one_register(x86.UC_X86_REG_RIP)
        self._rip = None
        self.began_at.append(start)
        try:
            self._uc.emu_start(start, 0, count=count)
        except unicorn.UcError as error:
            if error.errno == unicorn.UC_ERR_INSN_INVALID:
                return Stop(StopKind.UNDEFINED, self._uc.reg_read(x86.UC_X86_REG_RIP), vector=6)
            rip = self._uc.reg_read(x86.UC_X86_REG_RIP)
            raise KlpemuError(f"Unicorn cannot go on: {error}", where=f"{rip:#018x}") from error
        rip = self._one_register(x86.UC_X86_REG_RIP)
        if self._interrupt is None:
            # A spent budget and a `hlt` look alike to Unicorn; only the caller's map of exits can tell them
            # apart.
            self._rip = rip
            return Stop(StopKind.BUDGET, rip)
        vector, address = self._interrupt
        if vector == INTERRUPT_BREAKPOINT:
            return Stop(StopKind.BREAKPOINT, rip, vector)
        self._clear_exception()
        return Stop(StopKind.FAULT, rip, vector, address if vector == INTERRUPT_PAGE_FAULT else 0)

    def observe(self, on_block: Callable[[int], None]) -> None:
        """Call `on_block` with the address of every basic block that is about to run; for good.

        Two to three microseconds a block.  Unicorn starts a block behind each jump, call and return, and
        wherever a run begins.
        """
        self._on_block.append(on_block)
        watching = self._on_block
        if len(watching) > 1:  # one hook tells all: most of what it takes is to get from Unicorn to here
            return

        def hook(_uc: Any, address: int, _size: int, _data: Any) -> None:
            for told in watching:
                told(address)

        self._uc.hook_add(unicorn.UC_HOOK_BLOCK, hook)
        self._uc.ctl_flush_tb()  # blocks that were translated before have no call of the hook in them

    def watch_memory(
        self, fetched: Callable[[int, int], None], accessed: Callable[[bool, int, int], None]
    ) -> None:
        """Tell, for good, what guest code fetches and accesses; it becomes ten times as slow.

        `fetched` gets the virtual address and the size of each instruction that is about to run, `accessed`
        whether it writes, the *physical* address (what Unicorn's memory hooks report) and the size.
        """

        def on_code(_uc: Any, address: int, size: int, _data: Any) -> None:
            # Of an instruction that is none (ud2) Unicorn does not know the size, and says 0xf1f1f1f1.
            fetched(address, size if size <= MAX_INSTRUCTION else len(UD2))

        def on_access(_uc: Any, kind: int, address: int, size: int, _value: int, _data: Any) -> None:
            accessed(kind == unicorn.UC_MEM_WRITE, address, size)

        self._uc.hook_add(unicorn.UC_HOOK_CODE, on_code)
        self._uc.hook_add(unicorn.UC_HOOK_MEM_READ | unicorn.UC_HOOK_MEM_WRITE, on_access)
        self._uc.ctl_flush_tb()

    def stack_pointer(self) -> int:
        """RSP, also in the middle of a run."""
        return self._one_register(x86.UC_X86_REG_RSP)

    def drop_translations(self, start: int, end: int) -> None:
        """Forget translated code of virtual [start, end): Unicorn does not notice our writes itself."""
        status = uclib.uc_ctl(self._uc._uch, _REMOVE_CACHE, ctypes.c_uint64(start), ctypes.c_uint64(end))
        if status != unicorn.UC_ERR_OK:
            raise KlpemuError(f"Unicorn keeps its translations: error {status}", where=f"{start:#018x}")

    def flush_tlb(self) -> None:
        """Forget all address translations, after page table entries have changed."""
        uclib.uc_ctl(self._uc._uch, _FLUSH_TLB)

    def _one_register(self, identifier: int) -> int:
        uclib.uc_reg_read(self._uc._uch, identifier, self._value_at)
        return self._value.value

    def _clear_exception(self) -> None:
        registers, vectors, gs_base = self.registers(), self.vectors(), self.gs_base
        self._uc.context_restore(self._clean)
        self.set_registers(registers)
        self.set_vectors(vectors)
        self.set_gs_base(gs_base)

    def _on_interrupt(self, uc: Any, vector: int, _data: Any) -> None:
        self._interrupt = (vector, uc.reg_read(x86.UC_X86_REG_CR2))
        uc.emu_stop()

    def _on_access(self, _uc: Any, kind: int, address: int, size: int, _value: int, _data: Any) -> None:
        if self.accesses is not None:
            self.accesses.append(
                (kind == unicorn.UC_MEM_WRITE, address, self._memory[address : address + size])
            )

    def _on_instruction(self, uc: Any, address: int, _size: int, _data: Any) -> None:
        if address == self.stop_at:
            uc.emu_stop()
        else:
            self.executed.append(address)
