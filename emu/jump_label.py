"""Jump labels: kernel/jump_label.c and arch/x86/kernel/jump_label.c of 6.1.

A `struct static_key` begins with `enabled`, a 32-bit count, and has at +8 `type`, whose bit 0 says whether
the key is true at first.  The compiler and objtool leave the branches of a key in its first state; only keys
that have changed since are of interest when text is loaded.
"""

from collections.abc import Iterable
from struct import Struct
from typing import Final

from elf.errors import KlpemuError
from elf.text_tables import JumpEntry
from emu.alternative import JMP8_OPCODE, X86_NOPS, Applied
from emu.memory import Memory
from emu.text_image import TextImage
from emu.text_poke import JMP32_OPCODE, text_gen_insn

__all__ = ["JUMP_TYPE_TRUE", "jump_label_patch", "jump_label_update", "static_key_enabled"]

JUMP_TYPE_TRUE: Final = 1
_STATIC_KEY: Final = Struct("<i4xQ")


def static_key_enabled(memory: Memory, key: int) -> tuple[bool, bool]:
    """Whether the key is enabled now, and whether it was at first (its type)."""
    enabled, kind = _STATIC_KEY.unpack(memory.read(key, _STATIC_KEY.size))
    return enabled > 0, bool(kind & JUMP_TYPE_TRUE)


def jump_label_patch(entry: JumpEntry, code: bytes, *, enabled: bool) -> bytes:
    """__jump_label_patch(): the jump or NOP, of 2 or 5 bytes, that belongs at `entry.code`.

    `code` is what stands there; `KlpemuError` where the kernel would crash with "unexpected op".
    """
    jump = _jump(entry, 2 if code[:2] == X86_NOPS[2] or code[0] == JMP8_OPCODE else 5)
    nop = X86_NOPS[len(jump)]
    new, old = (jump, nop) if enabled != entry.branch else (nop, jump)
    if code[: len(jump)] not in (old, new):
        raise KlpemuError(
            f"jump_label: Fatal kernel bug, unexpected op ({code[:5].hex(' ')} != {old.hex(' ')})",
            where=f"{entry.code:#018x}",
        )
    return new


def _jump(entry: JumpEntry, size: int) -> bytes:
    if size == 5:
        return text_gen_insn(JMP32_OPCODE, entry.code, entry.target)
    distance = entry.target - (entry.code + 2)
    if not -128 <= distance < 128:
        raise KlpemuError(f"{entry.target:#x} is out of reach of a short jump", where=f"{entry.code:#018x}")
    return bytes([JMP8_OPCODE, distance & 0xFF])


def jump_label_update(text: TextImage, entries: Iterable[JumpEntry]) -> Applied:
    """Give the branches of every key that has changed since it was defined their present state.

    Keys are read through `text`: in the object itself, or in the memory behind it.
    """
    done = Applied("jump labels")
    states: dict[int, tuple[bool, bool]] = {}
    for entry in entries:
        if not text.holds(entry.code, 2):  # in a section that is not loaded
            done.left += 1
            continue
        state = states.get(entry.key)
        if state is None:
            state = states[entry.key] = static_key_enabled(text, entry.key)
        enabled, first = state
        if enabled == first:
            done.left += 1
            continue
        text.write(entry.code, jump_label_patch(entry, text.read_some(entry.code, 5), enabled=enabled))
        done.applied += 1
    return done
