"""What an unwind table says about a range of code: where the caller's frame is, and where its rbp was kept.

Whatever says it ends up in this one form: the kernel's ORC (`elf.orc`), DWARF call frame information
(`elf.eh_frame`), frame pointers.  Offsets are in bytes.
"""

import enum
from dataclasses import dataclass

__all__ = ["FrameBase", "FrameKind", "UnwindRow"]


class FrameBase(enum.Enum):
    """What the caller's stack pointer is counted from."""

    SP = "rsp"
    BP = "rbp"
    DX = "rdx"
    DI = "rdi"
    R10 = "r10"
    R13 = "r13"
    SP_INDIRECT = "[rsp]"
    BP_INDIRECT = "[rbp]"
    UNDEFINED = "undefined"


class FrameKind(enum.Enum):
    """What is found at the caller's stack pointer."""

    CALL = "call"  # the return address lies right below it
    REGS = "regs"  # a whole struct pt_regs lies at it
    REGS_PARTIAL = "regs partial"  # only its last five words, as the CPU pushes them
    END = "end"  # there is no caller


@dataclass(frozen=True, slots=True)
class UnwindRow:
    """How to leave one frame: the caller's rsp is `base` + `offset`.

    The caller's rbp is kept at its rsp + `bp_offset`, or at rbp + `bp_offset` if `bp_from_bp`; None says that
    it is in rbp.  A row for `calls_only` holds for code that waits in a call, not for code that was
    interrupted.
    """

    base: FrameBase
    offset: int
    bp_offset: int | None = None
    bp_from_bp: bool = False
    kind: FrameKind = FrameKind.CALL
    calls_only: bool = False
