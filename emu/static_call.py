"""Static calls: arch/x86/kernel/static_call.c and kernel/static_call_inline.c of 6.1.

A site is compiled as a call of, or a jump to, a trampoline `__SCT__<name>`.  When its object is loaded it is
made to go to the function that the key `__SCK__<name>` holds (struct static_call_key: the function first),
and so it is at every later change of the key.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from elf.errors import KlpemuError
from elf.text_tables import StaticCallSite
from emu.alternative import RET_OPCODE, X86_NOPS, Applied, ArchSymbols, cpu_wants_rethunk_at
from emu.memory import MemoryFault
from emu.mitigations import Mitigations
from emu.text_image import TextImage
from emu.text_poke import CALL_OPCODE, INT3, JMP32_OPCODE, text_gen_insn

__all__ = ["XOR5RAX", "static_call_add_module", "static_call_init", "static_call_transform"]

XOR5RAX: Final = bytes.fromhex("2e2e2e31c0")  # cs cs cs xor %eax, %eax
_RETINSN: Final = bytes([RET_OPCODE, INT3, INT3, INT3, INT3])


def static_call_transform(
    code: bytes, site: int, func: int, *, tail: bool, chosen: Mitigations, symbols: ArchSymbols
) -> bytes:
    """What a site that holds `code` has to hold for `func`, a virtual address or 0 (NULL)."""
    is_jcc = tail and code[0] == 0x0F and code[1] & 0xF0 == 0x80
    if tail:
        valid = is_jcc or code[0] in (JMP32_OPCODE, RET_OPCODE)
    else:
        valid = code[0] == CALL_OPCODE or code[:5] in (X86_NOPS[5], XOR5RAX)
    if not valid:
        raise KlpemuError(f"unexpected static_call insn opcode {code[0]:#x}", where=f"{site:#018x}")
    if is_jcc:
        if not func:
            thunk = "__x86_return_thunk" if chosen.cpu.has("RETHUNK") else "__static_call_return"
            func = symbols.address_of(thunk)
        # The displacement counts from the end of the 6 bytes: that of 5 bytes one further on.
        return b"\x0f" + text_gen_insn(code[1], site + 1, func)
    if func and tail:
        return text_gen_insn(JMP32_OPCODE, site, func)
    if tail:
        if cpu_wants_rethunk_at(site, chosen):
            return text_gen_insn(JMP32_OPCODE, site, symbols.address_of(chosen.return_thunk))
        return _RETINSN
    if not func:
        return X86_NOPS[5]
    if func == symbols.find("__static_call_return0"):
        return XOR5RAX
    return text_gen_insn(CALL_OPCODE, site, func)


def static_call_init(
    text: TextImage, sites: Iterable[StaticCallSite], chosen: Mitigations, symbols: ArchSymbols
) -> Applied:
    """__static_call_init() for sites whose keys are known: each goes to the function in its key."""
    done = Applied("static calls")
    for site in sites:
        if not text.holds(site.addr, 5):  # in a section that is not loaded
            done.left += 1
            continue
        code = text.read_some(site.addr, 6)
        func = int.from_bytes(text.read(site.key, 8), "little")
        new = static_call_transform(code, site.addr, func, tail=site.is_tail, chosen=chosen, symbols=symbols)
        if new == code[: len(new)]:
            done.left += 1
        else:
            text.write(site.addr, new)
            done.applied += 1
    return done


def static_call_add_module(
    text: TextImage,
    sites: Iterable[StaticCallSite],
    tramp_keys: Mapping[int, int],
    is_kernel_text: Callable[[int], bool],
    chosen: Mitigations,
    symbols: ArchSymbols,
) -> Applied:
    """static_call_add_module(): the sites of a module.

    Where the key is not exported the entry names the trampoline, and the key is looked up in `tramp_keys`; a
    site of which neither is known is left as it is, and listed as refused.
    """
    known = []
    refused = []
    for site in sites:
        if is_kernel_text(site.key):
            key = tramp_keys.get(site.key)
            if key is None:
                refused.append(f"{site.addr:#x}: Failed to fixup __raw_static_call() usage")
                continue
            site = site._replace(key=key)
        known.append(site)
    try:
        done = static_call_init(text, known, chosen, symbols)
    except MemoryFault as fault:
        raise KlpemuError(
            "the key of a static call is not mapped", where=fault.where, advice="check the module's tables"
        ) from fault
    done.refused += refused
    return done
