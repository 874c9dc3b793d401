"""Text rewritten once, before it can run: arch/x86/kernel/alternative.c of 6.1.

Every function works on a `TextImage` and on tables read by elf/text_tables.py; it raises `KlpemuError` where
the kernel would BUG, and counts as `refused` where it would WARN and go on.  For modules the kernel calls
them in module_finalize(), for vmlinux in alternative_instructions(), in one and the same order.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from struct import Struct
from typing import Final

from capstone import CS_ARCH_X86, CS_MODE_64, Cs

from elf.errors import KlpemuError
from elf.text_tables import ALTINSTR_FLAG_INV, AltInstr, ParavirtPatchSite
from emu.cpu_features import FEATURES
from emu.mitigations import Mitigations
from emu.text_image import TextImage
from emu.text_poke import CALL_OPCODE, INSN_SIZE, INT3, JMP32_OPCODE, text_gen_insn

__all__ = [
    "JMP8_OPCODE",
    "RET_OPCODE",
    "X86_NOPS",
    "Applied",
    "ArchSymbols",
    "add_nops",
    "alternatives_smp_unlock",
    "apply_alternatives",
    "apply_ibt_endbr",
    "apply_paravirt",
    "apply_retpolines",
    "apply_returns",
    "cpu_wants_rethunk_at",
]

# arch/x86/include/asm/nops.h: NOPs of 1 to 8 bytes; longer gaps get several.
X86_NOPS: Final = tuple(
    bytes.fromhex(nop)
    for nop in (
        "",
        "90",
        "6690",
        "0f1f00",
        "0f1f4000",
        "0f1f440000",
        "660f1f440000",
        "0f1f8000000000",
        "0f1f840000000000",
    )
)
RET_OPCODE: Final = 0xC3
JMP8_OPCODE: Final = 0xEB
ENDBR64: Final = bytes.fromhex("f30f1efa")
ENDBR_POISON: Final = bytes.fromhex("660f1f00")  # gen_endbr_poison(): nopw (%rax)
BRANCH: Final = Struct("<Bi")  # opcode and displacement
TRAMP_UD: Final = bytes.fromhex("0fb9cc")  # marks a static call trampoline (arch/x86/kernel/static_call.c)
MAX_PATCH_LEN: Final = 254
MAX_INSN_SIZE: Final = 15
LOCK_PREFIX, DS_PREFIX = 0xF0, 0x3E
_REGISTERS: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))


@dataclass(eq=False, slots=True)
class Applied:
    """What became of one table: sites that were rewritten, left as they are, and refused with a warning."""

    kind: str
    applied: int = 0
    left: int = 0
    refused: list[str] = field(default_factory=list)


class ArchSymbols:
    """The kernel's own symbols that rewriting needs, by `lookup(name)`, which gives None for a missing one.

    Retpoline thunks are known by name, `__x86_indirect_thunk_<register>`; in a kernel image they lie in
    `__x86_indirect_thunk_array`, 32 bytes apart.
    """

    def __init__(self, lookup: Callable[[str], int | None]) -> None:
        self._lookup = lookup
        self.registers: dict[int, int] = {}
        for number, register in enumerate(_REGISTERS):
            thunk = lookup(f"__x86_indirect_thunk_{register}")
            if thunk is not None:
                self.registers[thunk] = number

    def find(self, name: str) -> int | None:
        """The symbol's address, or None."""
        return self._lookup(name)

    def address_of(self, name: str) -> int:
        """The symbol's address; `KlpemuError` if the kernel has none of that name."""
        found = self._lookup(name)
        if found is None:
            raise KlpemuError(
                f"the kernel has no symbol {name}",
                advice="state a CPU whose mitigations it was built for",
            )
        return found


def add_nops(size: int) -> bytes:
    """NOPs that fill `size` bytes, the longest first."""
    return X86_NOPS[8] * (size // 8) + X86_NOPS[size % 8]


def apply_paravirt(text: TextImage, sites: Iterable[ParavirtPatchSite], symbols: ArchSymbols) -> Applied:
    """Indirect calls through pv_ops become direct ones, or NOPs where the operation does nothing."""
    done = Applied("paravirt")
    pv_ops, nothing = symbols.find("pv_ops"), symbols.find("_paravirt_nop")
    for site in sites:
        if pv_ops is None:
            done.left += 1
            continue
        opfunc = int.from_bytes(text.read(pv_ops + 8 * site.type, 8), "little")
        if opfunc == 0:
            opfunc = symbols.address_of("paravirt_BUG")
        code = b"" if opfunc == nothing else text_gen_insn(CALL_OPCODE, site.instr, opfunc)
        if len(code) > site.len:
            raise KlpemuError(
                f"a paravirt site of {site.len} bytes has no room for a call", where=f"{site.instr:#018x}"
            )
        text.write(site.instr, code + add_nops(site.len - len(code)))
        done.applied += 1
    return done


def apply_retpolines(
    text: TextImage,
    sites: Iterable[int],
    chosen: Mitigations,
    symbols: ArchSymbols,
    its_thunk: Callable[[int], int] | None = None,
) -> Applied:
    """Calls of and jumps to retpoline thunks become indirect ones where the CPU needs no retpoline.

    `its_thunk(register)` allocates a thunk in the upper half of a cache line; without it the kernel's static
    ones are used, as the kernel does when it has no memory.
    """
    done = Applied("retpolines")
    for site in sites:
        code = text.read_some(site, 6)
        length = _length_of_branch(code)
        target = site + length + int.from_bytes(code[length - 4 : length], "little", signed=True)
        register = symbols.registers.get(target)
        if not length or register is None:
            done.refused.append(f"{site:#x}: no jump to a retpoline thunk: {code.hex(' ')}")
            continue
        if register == 4:
            raise KlpemuError("an indirect branch through RSP", where=f"{site:#018x}")
        new = _patch_retpoline(site, code[:length], register, chosen, symbols, its_thunk)
        if new is None or len(new) != length:
            done.left += 1
            continue
        text.write(site, optimize_nops(new, new))
        done.applied += 1
    return done


def _length_of_branch(code: bytes) -> int:
    """Length of `[cs] call`, `[cs] jmp` or `jcc` with a 32-bit displacement; 0 if it is something else."""
    if code[0] in (CALL_OPCODE, JMP32_OPCODE):
        return 5
    if code[0] == 0x2E and code[1] in (CALL_OPCODE, JMP32_OPCODE):
        return 6
    return 6 if code[0] == 0x0F and code[1] & 0xF0 == 0x80 else 0


def _patch_retpoline(
    site: int,
    code: bytes,
    register: int,
    chosen: Mitigations,
    symbols: ArchSymbols,
    its_thunk: Callable[[int], int] | None,
) -> bytes | None:
    """patch_retpoline(): the new bytes, or None to leave the call of the thunk."""
    cpu = chosen.cpu
    lfence = cpu.has("RETPOLINE_LFENCE")
    if cpu.has("RETPOLINE") and not lfence:
        return None
    new = bytearray()
    opcode = code[1] if code[0] == 0x2E else code[0]
    if opcode == 0x0F:  # jcc thunk: the inverse condition jumps over an indirect jump
        new += bytes([0x70 + (code[1] & 0xF ^ 1), len(code) - 2])
        opcode = JMP32_OPCODE
    if lfence:
        new += b"\x0f\xae\xe8"
    # The last byte of the branch in the lower half of a cache line is what ITS is about.
    if cpu.has("INDIRECT_THUNK_ITS") and not (site + len(new) + 1 + register // 8) & 0x20:
        static = symbols.address_of("__x86_indirect_its_thunk_array") + 64 * register
        return _emit_trampoline(site, code, its_thunk(register) if its_thunk else static)
    if register >= 8:
        new.append(0x41)
    new += bytes([0xFF, (0xD0 if opcode == CALL_OPCODE else 0xE0) + register % 8])
    if opcode == JMP32_OPCODE and len(new) < len(code):
        new.append(INT3)
    return bytes(new) + b"\x90" * (len(code) - len(new))


def _emit_trampoline(site: int, code: bytes, thunk: int) -> bytes:
    """__emit_trampoline(): the same branch, to another thunk."""
    prefix = code[: len(code) - 5]
    return prefix + text_gen_insn(code[len(prefix)], site + len(prefix), thunk)


def cpu_wants_rethunk_at(address: int, chosen: Mitigations) -> bool:
    """Whether the return at `address` has to go through the return thunk."""
    if not chosen.cpu.has("RETHUNK"):
        return False
    return chosen.return_thunk != "its_return_thunk" or not address & 0x20


def apply_returns(
    text: TextImage, sites: Iterable[int], chosen: Mitigations, symbols: ArchSymbols
) -> Applied:
    """`jmp __x86_return_thunk` becomes `ret; int3 …`, or a jump to the thunk that the CPU needs."""
    done = Applied("returns")
    placeholder = symbols.find("__x86_return_thunk")
    thunk = symbols.address_of(chosen.return_thunk) if chosen.cpu.has("RETHUNK") else 0
    plain = bytes([RET_OPCODE]) + bytes([INT3]) * 4
    never = not chosen.cpu.has("RETHUNK")
    for site in sites:
        data, at = text.place(site, INSN_SIZE)
        opcode, displacement = BRANCH.unpack_from(data, at)
        if opcode != JMP32_OPCODE or site + INSN_SIZE + displacement != placeholder:
            # __static_call_fixup(): a NULL trampoline may have got its function already.
            if data[at + 5 : at + 8] != TRAMP_UD:
                done.refused.append(f"{site:#x}: missing return thunk: {data[at : at + 5].hex(' ')}")
                continue
            if opcode != RET_OPCODE:
                done.left += 1
                continue
        wants = not never and cpu_wants_rethunk_at(site, chosen)
        data[at : at + INSN_SIZE] = text_gen_insn(JMP32_OPCODE, site, thunk) if wants else plain
        done.applied += 1
    return done


def apply_alternatives(text: TextImage, table: Iterable[AltInstr], chosen: Mitigations) -> Applied:
    """What the CPU has, or lacks, decides which instructions stay; later entries may replace earlier ones."""
    done = Applied("alternatives")
    capability = chosen.cpu.capability
    limit = max(FEATURES.values()) | 31
    for entry in table:
        feature = entry.cpuid & ~ALTINSTR_FLAG_INV
        if entry.instrlen > MAX_PATCH_LEN or feature > limit:
            raise KlpemuError(
                f"an alternative of {entry.instrlen} bytes for feature {feature // 32}*32+{feature % 32}",
                where=f"{entry.instr:#018x}",
                advice="the object was built for another kernel",
            )
        if bool(capability >> feature & 1) != bool(entry.cpuid & ALTINSTR_FLAG_INV):
            new = _relocated_replacement(text, entry)
            text.write(entry.instr, new + b"\x90" * (entry.instrlen - len(new)))
            done.applied += 1
        else:
            done.left += 1
        found = text.read(entry.instr, entry.instrlen)
        if b"\x90\x90" in found:  # else there is nothing to optimize
            better = optimize_nops(found, text.read_some(entry.instr, entry.instrlen + MAX_INSN_SIZE))
            if better != found:
                text.write(entry.instr, better)
    return done


def _relocated_replacement(text: TextImage, entry: AltInstr) -> bytes:
    """The replacement's bytes with the displacement that they need at the place of the original."""
    code = text.read(entry.replacement, entry.replacementlen) if entry.replacementlen else b""
    if len(code) != 5:
        return code
    target = entry.replacement + 5 + int.from_bytes(code[1:], "little", signed=True)
    if code[0] == CALL_OPCODE:
        return text_gen_insn(CALL_OPCODE, entry.instr, target)
    if code[0] not in (JMP32_OPCODE, JMP8_OPCODE):
        return code
    # recompute_jump(): short forms only forward; backward the kernel's test never holds.
    distance = target - entry.instr
    if 0 <= distance <= 129:
        return bytes([JMP8_OPCODE, (distance - 2) & 0xFF]) + X86_NOPS[3]
    return text_gen_insn(JMP32_OPCODE, entry.instr, target)


def optimize_nops(code: bytes, stream: bytes) -> bytes:
    """`code` with runs of single-byte NOPs made longer ones; `stream` is the code and what follows it."""
    new = bytearray(code)
    at = 0
    while at < len(code):
        length = _insn_length(stream[at : at + MAX_INSN_SIZE])
        if not length:
            break
        if length == 1 and code[at] == 0x90:
            end = at
            while end < len(code) and code[end] == 0x90:
                end += 1
            if end - at > 1:
                new[at:end] = add_nops(end - at)
            length = end - at
        at += length
    return bytes(new)


def apply_ibt_endbr(text: TextImage, sites: Iterable[int]) -> Applied:
    """ENDBR64 of functions whose address nobody takes becomes a NOP, so that indirect calls of them fault."""
    done = Applied("ibt_endbr")
    for site in sites:
        if text.read(site, 4) != ENDBR64:
            done.refused.append(f"{site:#x}: no ENDBR64")
            continue
        text.write(site, ENDBR_POISON)
        done.applied += 1
    return done


def alternatives_smp_unlock(text: TextImage, sites: Iterable[int], start: int, end: int) -> Applied:
    """On a machine with one CPU LOCK prefixes in [start, end) become DS prefixes, which do nothing."""
    done = Applied("smp_locks")
    for site in sites:
        if start <= site < end and text.read(site, 1)[0] == LOCK_PREFIX:
            text.write(site, bytes([DS_PREFIX]))
            done.applied += 1
        else:
            done.left += 1
    return done


@lru_cache(maxsize=4096)
def _insn_length(code: bytes) -> int:
    """Length of the first instruction, as insn_decode_kernel() finds it; 0 if there is none."""
    decoded = next(_DECODER.disasm_lite(code, 0, 1), None)
    return decoded[1] if decoded else 0


_DECODER: Final = Cs(CS_ARCH_X86, CS_MODE_64)
