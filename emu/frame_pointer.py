"""Unwind rows of compiled code that has no table but keeps a frame pointer: arch/x86/kernel/unwind_frame.c.

A kernel built with CONFIG_FRAME_POINTER may trust rbp because objtool has followed every path of every
function (tools/objtool/check.c, validate_branch()).  Nothing in an object says how it was compiled, so the
same is done here with its code: from each function's entry on, `push rbp` must be the first thing on the
stack and `mov rbp, rsp` must follow; from there to the first instruction that changes rbp the caller's rbp
lies at rbp and the return address behind it.  Where two paths disagree, or an instruction does something that
is not understood, there is no row.

As in the kernel, such a row is good for a frame that waits in a call and not for one that was interrupted.
"""

import bisect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from elf.eh_frame import CallFrames
from elf.unwind_row import FrameBase, UnwindRow
from emu.assembly import Instruction, disassemble

__all__ = ["frame_pointer_rows"]

FRAME = UnwindRow(FrameBase.BP, 16, -16, calls_only=True)
LONGEST_INSTRUCTION = 15
WORD = 8

_NAMES = {"rsp": re.compile(r"\b(rsp|esp|spl?)\b"), "rbp": re.compile(r"\b(rbp|ebp|bpl?)\b")}
_MEMORY = re.compile(r"\[[^]]*\]")
_FROM_FRAME = re.compile(r"lea rsp, \[rbp(?: - (0x[0-9a-f]+|\d+))?\]")
# Of the instructions that name rsp or rbp first, those that do not write it.
_READERS = frozenset(("push", "cmp", "test", "call", "jmp", "bt", "nop"))
_ENDS = frozenset(("jmp", "int3", "ud2", "hlt", ".byte"))


@dataclass(frozen=True, slots=True)
class _State:
    """The stack before an instruction executes.

    `depth` is the distance of rsp from the return address in bytes, None where it is not known.  `saved`: the
    caller's rbp lies right below the return address.  `frame`: and rbp points at it.
    """

    depth: int | None
    saved: bool = False
    frame: bool = False


_ENTERED = _State(0)
_LOST = _State(None)


def frame_pointer_rows(texts: Mapping[int, bytes], functions: Iterable[int]) -> CallFrames:
    """The rows of an object's code: `texts` are its executable sections by guest virtual address, `functions`
    the addresses that calls enter at.  Addresses without a row are those where nothing is certain.
    """
    flow = _Flow(texts, functions)
    flow.follow()
    ends = {at + size for at, size in flow.sizes.items()} - flow.states.keys()
    rows: dict[int, UnwindRow | None] = dict.fromkeys(ends)
    rows |= {at: FRAME if state.frame else None for at, state in flow.states.items()}
    addresses = sorted(rows)
    return CallFrames(addresses, [rows[at] for at in addresses])


class _Flow:
    """What is known before each instruction, made weaker until all paths agree."""

    def __init__(self, texts: Mapping[int, bytes], functions: Iterable[int]) -> None:
        self.states: dict[int, _State] = {}
        self.sizes: dict[int, int] = {}
        self._texts = texts
        self._starts = sorted(texts)
        self._functions = frozenset(functions)
        self._work = [(at, _ENTERED) for at in sorted(self._functions, reverse=True)]

    def follow(self) -> None:
        """Walk every path from every function."""
        while self._work:
            at, state = self._work.pop()
            self._follow_one(at, state)

    def _follow_one(self, at: int, state: _State) -> None:
        while instruction := self._decode(at):
            if at in self.states:
                state = _join(self.states[at], state)
                if state == self.states[at]:
                    return
            self.states[at] = state
            self.sizes[at] = len(instruction.code)
            name = instruction.mnemonic.removeprefix("bnd ").removeprefix("notrack ")
            if (target := _jump_target(name, instruction.operands)) is not None:
                self._jump(target, state)
            if name in _ENDS or "ret" in name:
                return
            state = _after(name, instruction.operands, state)
            at += len(instruction.code)
            if at in self._functions:  # behind a call that does not return
                return

    def _jump(self, target: int, state: _State) -> None:
        if target not in self._functions:
            self._work.append((target, state))
        elif state != _ENTERED:  # no tail call: something is still on the stack
            self._work.append((target, _LOST))

    def _decode(self, at: int) -> Instruction | None:
        index = bisect.bisect_right(self._starts, at) - 1
        if index < 0:
            return None
        start = self._starts[index]
        code = self._texts[start][at - start : at - start + LONGEST_INSTRUCTION]
        return next(disassemble(bytes(code), at), None)


def _join(one: _State, other: _State) -> _State:
    if one == other:
        return one
    return _State(None, saved=True, frame=True) if one.frame and other.frame else _LOST


def _jump_target(name: str, operands: str) -> int | None:
    if (name.startswith(("j", "loop"))) and operands.startswith("0x"):
        return int(operands, 16)
    return None


def _after(name: str, operands: str, state: _State) -> _State:
    """What holds behind an instruction before which `state` holds."""
    if state == _LOST:
        return _LOST
    if name in ("push", "pushfq"):
        first = operands == "rbp" and state.depth == 0
        return _moved(replace(state, saved=state.saved or first), WORD)
    if name == "leave":
        return _ENTERED if state.frame else _LOST
    if name == "pop" and operands == "rbp":
        return _ENTERED if state.saved and state.depth == WORD else _LOST
    if name in ("pop", "popfq") and not _writes("rsp", name, operands):
        return _moved(state, -WORD)
    if name == "mov" and operands == "rbp, rsp":
        return replace(state, frame=True) if state.saved and state.depth == WORD else _LOST
    if _writes("rbp", name, operands):
        return _LOST
    if _writes("rsp", name, operands):
        return _stack_pointer_written(name, operands, state)
    return state


def _stack_pointer_written(name: str, operands: str, state: _State) -> _State:
    amount = operands.removeprefix("rsp, ")
    if name in ("sub", "add") and amount.removeprefix("0x").isalnum() and amount[0].isdigit():
        return _moved(state, int(amount, 0) if name == "sub" else -int(amount, 0))
    if not state.frame:
        return _LOST
    if name == "mov" and operands == "rsp, rbp":
        return replace(state, depth=WORD)
    if found := _FROM_FRAME.fullmatch(f"{name} {operands}"):
        return replace(state, depth=WORD + int(found[1] or "0", 0))
    return replace(state, depth=None)


def _moved(state: _State, distance: int) -> _State:
    """rsp has gone down by `distance` bytes; never above what the function has saved."""
    if state.depth is None:
        return state
    depth = state.depth + distance
    return replace(state, depth=depth) if depth >= (WORD if state.saved else 0) else _LOST


def _writes(register: str, name: str, operands: str) -> bool:
    """The instruction may write the register: it is the first operand, or one of an exchange."""
    named = _NAMES[register]
    parts = _MEMORY.sub("", operands).split(",")
    if name.startswith(("x", "cmpxchg", "lock x", "mulx")) and name != "xor":
        return any(named.search(part) for part in parts)
    if name == "enter":
        return True
    return name not in _READERS and named.search(parts[0]) is not None
