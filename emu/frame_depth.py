"""Unwind rows for the machine code that is our own, found by following its pushes and pops.

What the assembler writes has no tables.  From each entry point every path is walked once, with the distance
of rsp from the return address and the place of the saved rbp; two paths that meet must agree.
"""

from collections.abc import Iterable

from elf.errors import KlpemuError
from elf.unwind_row import FrameBase, UnwindRow
from emu.assembly import Instruction, disassemble

__all__ = ["frame_rows"]

RETURN_ADDRESS = 8


def frame_rows(code: bytes, address: int, entries: Iterable[int]) -> dict[int, UnwindRow]:
    """The row of each instruction that can be reached from `entries`, by guest virtual address.

    An entry that lies inside a function walked before is a label in it, and adds nothing.
    """
    rows: dict[int, UnwindRow] = {}
    for entry in sorted(entries):
        if entry not in rows:
            _walk(code, address, entry, rows)
    return rows


def _walk(code: bytes, address: int, entry: int, rows: dict[int, UnwindRow]) -> None:
    work: list[tuple[int, int, int | None]] = [(entry, 0, None)]
    while work:
        at, depth, bp = work.pop()
        while address <= at < address + len(code):
            row = UnwindRow(FrameBase.SP, depth + RETURN_ADDRESS, bp)
            if at in rows:
                if rows[at] != row:
                    raise KlpemuError("two ways lead here with different frames", where=f"{at:#x}")
                break
            rows[at] = row
            instruction = next(disassemble(code[at - address : at - address + 15], at))
            target = _target(instruction)
            if target is not None and not instruction.mnemonic.startswith("call"):
                work.append((target, depth, bp))
            if instruction.mnemonic in ("ret", "jmp"):
                break
            depth, bp = _after(instruction, depth, bp)
            at += len(instruction.code)


def _target(instruction: Instruction) -> int | None:
    if instruction.mnemonic.startswith("j") and instruction.operands.startswith("0x"):
        return int(instruction.operands, 16)
    return None


def _after(instruction: Instruction, depth: int, bp: int | None) -> tuple[int, int | None]:
    """Distance of rsp from the return address, and where rbp is kept, behind an instruction."""
    name, operands = instruction.mnemonic, instruction.operands
    if name in ("push", "pushfq"):
        depth += 8
        if operands == "rbp" and bp is None:
            bp = -(depth + RETURN_ADDRESS)
    elif name in ("pop", "popfq"):
        depth -= 8
        if operands == "rbp":
            bp = None
    elif operands.startswith("rsp, ") and name in ("sub", "add"):
        change = int(operands.removeprefix("rsp, "), 0)
        depth += change if name == "sub" else -change
    return depth, bp
