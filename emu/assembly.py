"""Assembling the machine code that is our own: Keystone writes it, Capstone reads it back before it is used.

Keystone 0.9.2 encodes some instructions wrongly (a long NOP becomes a prefetch), so every byte that it
returns is decoded again and the mnemonics compared.  What must have one exact encoding (calls, jumps, NOPs,
RIP-relative loads) is emitted as bytes in the first place.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import capstone
import keystone

from elf.errors import KlpemuError

__all__ = ["Code", "Instruction", "assemble", "disassemble"]


@dataclass(frozen=True, slots=True)
class Instruction:
    """One decoded instruction: guest virtual address, its bytes, mnemonic and operands."""

    address: int
    code: bytes
    mnemonic: str
    operands: str

    def __str__(self) -> str:
        return f"{self.mnemonic} {self.operands}".rstrip()


# Jumps whose targets lie in another chunk always have the 32-bit form (SDM Vol. 2A, Jcc; JMP).
_NEAR_JUMPS = {"jmp": "e9", "je": "0f84", "jne": "0f85", "jz": "0f84", "jnz": "0f85"}


class Code:
    """Machine code under construction: chunks of assembly and raw bytes, with labels between them."""

    def __init__(self) -> None:
        self.bytes = bytearray()
        self.labels: dict[str, int] = {}
        self.warnings: dict[int, str] = {}

    def label(self, name: str) -> "Code":
        """Name the place reached so far."""
        self.labels[name] = len(self.bytes)
        return self

    def asm(self, source: str) -> "Code":
        """Append position-independent assembly, Intel syntax, labels local to the chunk."""
        self.bytes += assemble(source)
        return self

    def raw(self, code: bytes | str) -> "Code":
        """Append bytes as they are."""
        self.bytes += bytes.fromhex(code) if isinstance(code, str) else code
        return self

    def warn(self, text: str) -> "Code":
        """Append a WARN_ON_ONCE: the `ud2` that traps, and what it means."""
        self.warnings[len(self.bytes)] = text
        return self.raw("0f0b")

    def jump(self, mnemonic: str, target: int | None = None) -> int:
        """Append a near jump, to the offset `target` or to where `land` will say.

        Returns the offset of its displacement.
        """
        self.raw(_NEAR_JUMPS[mnemonic]).raw(bytes(4))
        place = len(self.bytes) - 4
        if target is not None:
            self.bytes[place:] = (target - len(self.bytes)).to_bytes(4, "little", signed=True)
        return place

    def land(self, displacement: int) -> None:
        """Make a near jump land here."""
        distance = len(self.bytes) - (displacement + 4)
        self.bytes[displacement : displacement + 4] = distance.to_bytes(4, "little", signed=True)

    def align(self, boundary: int) -> "Code":
        """Fill with `int3` up to a multiple of `boundary`."""
        self.bytes += b"\xcc" * (-len(self.bytes) % boundary)
        return self


@cache
def assemble(source: str) -> bytes:
    """The bytes of an assembly text at address 0."""
    lines = [line.split("#")[0].strip() for line in source.splitlines()]
    text = "\n".join(line for line in lines if line)
    try:
        encoded, _ = keystone.Ks(keystone.KS_ARCH_X86, keystone.KS_MODE_64).asm(text)
    except keystone.KsError as error:
        raise KlpemuError(f"Keystone refuses the assembly: {error}") from error
    code = bytes(encoded or ())
    decoded = list(disassemble(code, 0))
    wanted = [_mnemonic(line) for line in text.splitlines() if not line.endswith(":")]
    found = [_mnemonic(str(each)) for each in decoded]
    if wanted != found:
        raise KlpemuError(f"Keystone assembled something else: wanted {wanted}, got {found}")
    if any("rip" in each.operands for each in decoded):
        raise KlpemuError("Keystone made an absolute address relative to RIP; emit that instruction as bytes")
    return code


def _mnemonic(line: str) -> str:
    """The mnemonic of a line of assembly without prefixes, Capstone's name where there are two."""
    if line.startswith(".byte"):
        line = str(next(disassemble(bytes(int(value, 0) for value in line[5:].split(",")), 0)))
    word = line.removeprefix("rep ").removeprefix("lock ").split()[0]
    return _SYNONYMS.get(word, word)


_SYNONYMS = {"jz": "je", "jnz": "jne", "jc": "jb", "movabs": "mov"}


@cache
def _decoder(att: bool) -> capstone.Cs:
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    if att:
        decoder.syntax = capstone.CS_OPT_SYNTAX_ATT
    return decoder


def disassemble(code: bytes, address: int, *, att: bool = False) -> Iterator[Instruction]:
    """Decode `code` at a guest virtual address; bytes that are no instruction come out as `.byte`."""
    done = 0
    decoder = _decoder(att)
    while done < len(code):
        for at, size, mnemonic, operands in decoder.disasm_lite(code[done:], address + done):
            yield Instruction(at, code[done : done + size], mnemonic, operands)
            done += size
        if done < len(code):
            yield Instruction(address + done, code[done : done + 1], ".byte", f"{code[done]:#04x}")
            done += 1
