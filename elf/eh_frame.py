"""DWARF call frame information as gcc writes it to `.eh_frame`.

Source: DWARF 5, 6.4; the register numbers are the psABI's (3.6.2).

Only what the compiler emits for kernel-like C is decoded: a frame found from rsp or rbp plus an offset.  A
function whose frame needs an expression has no row there, which an unwinder must take for "unreliable".
"""

import bisect
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from elf.errors import ElfError
from elf.unwind_row import FrameBase, UnwindRow

__all__ = ["CallFrames", "read_eh_frame"]

RBP, RSP = 6, 7
RETURN_ADDRESS = 16
DW_EH_PE_OMIT = 0xFF


@dataclass(frozen=True, slots=True)
class CallFrames:
    """The rows of all functions, sorted: row i holds from address i to the next; None: nothing is known."""

    addresses: list[int]
    rows: list[UnwindRow | None]

    def row_at(self, address: int) -> UnwindRow | None:
        """The row that holds at a guest virtual address; None outside of all functions."""
        index = bisect.bisect_right(self.addresses, address) - 1
        return self.rows[index] if index >= 0 else None


@dataclass(frozen=True, slots=True)
class _Cie:
    code_factor: int
    data_factor: int
    encoding: int
    has_augmentation: bool
    program: bytes


@dataclass(slots=True)
class _State:
    """The row under construction; `cfa` is None while it is an expression.

    `returns`: the return address lies right below the caller's stack pointer, where a call puts it.
    """

    cfa: tuple[int, int] | None
    bp: int | None
    returns: bool = True

    def row(self) -> UnwindRow | None:
        if self.cfa is None or self.cfa[0] not in (RBP, RSP) or not self.returns:
            return None
        base = FrameBase.SP if self.cfa[0] == RSP else FrameBase.BP
        return UnwindRow(base, self.cfa[1], self.bp)


class _Reader:
    """A position in bytes; running off the end is an ElfError."""

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data = data
        self.at = at

    def take(self, size: int) -> bytes:
        part = self.data[self.at : self.at + size]
        if len(part) < size:
            raise ElfError(f"call frame information ends at +{len(self.data):#x}", where=".eh_frame")
        self.at += size
        return part

    def number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def leb(self, *, signed: bool = False) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
        if signed and byte & 0x40:
            value -= 1 << shift
        return value

    def string(self) -> bytes:
        end = self.data.find(0, self.at)
        if end < 0:
            raise ElfError("call frame information without end of string", where=".eh_frame")
        return self.take(end + 1 - self.at)[:-1]

    @property
    def left(self) -> bool:
        return self.at < len(self.data)


def read_eh_frame(data: bytes, address: int) -> CallFrames:
    """Decode a relocated `.eh_frame` that lies at guest virtual `address`."""
    found: list[tuple[int, UnwindRow | None]] = []
    cies: dict[int, _Cie] = {}
    reader = _Reader(data)
    while reader.left:
        start = reader.at
        length = reader.number(4)
        if length == 0:  # a terminator: linked objects have one between their parts
            continue
        if length == 0xFFFF_FFFF:
            raise ElfError("64-bit call frame information", where=f".eh_frame+{start:#x}")
        body_at = reader.at
        body = reader.take(length)
        identity = int.from_bytes(body[:4], "little")
        if identity == 0:
            cies[start] = _read_cie(body)
            continue
        cie = cies.get(body_at - identity)
        if cie is None:
            raise ElfError("a frame description refers to no common entry", where=f".eh_frame+{start:#x}")
        found += _read_fde(body, cie, address + body_at)
    found.sort(key=lambda item: (item[0], item[1] is not None))
    return CallFrames([at for at, _ in found], [row for _, row in found])


def _read_cie(body: bytes) -> _Cie:
    reader = _Reader(body, 4)
    version = reader.number(1)
    augmentation = reader.string()
    if version not in (1, 3):
        raise ElfError(f"call frame information of version {version}", where=".eh_frame")
    code_factor, data_factor = reader.leb(), reader.leb(signed=True)
    column = reader.number(1) if version == 1 else reader.leb()
    if column != RETURN_ADDRESS:
        raise ElfError(f"a return address in column {column}", where=".eh_frame")
    encoding = 0
    if augmentation.startswith(b"z"):
        size = reader.leb()
        fields = _Reader(reader.take(size))
        for letter in augmentation[1:]:
            match chr(letter):
                case "R":
                    encoding = fields.number(1)
                case "L":
                    fields.number(1)
                case "P":
                    _pointer(fields, fields.number(1), 0)
                case _:  # "S", a signal frame, among them
                    raise ElfError(f"call frame augmentation {augmentation!r}", where=".eh_frame")
    elif augmentation:
        raise ElfError(f"call frame augmentation {augmentation!r}", where=".eh_frame")
    return _Cie(code_factor, data_factor, encoding, augmentation.startswith(b"z"), body[reader.at :])


def _read_fde(body: bytes, cie: _Cie, address: int) -> Iterator[tuple[int, UnwindRow | None]]:
    reader = _Reader(body, 4)
    start = _pointer(reader, cie.encoding, address + reader.at)
    size = _pointer(reader, cie.encoding & 0x0F, 0)
    if cie.has_augmentation:
        reader.take(reader.leb())
    initial = _State((RSP, 8), None)
    _rows(cie.program, cie, initial, start, initial)
    state = replace(initial)
    yield from _rows(body[reader.at :], cie, state, start, initial)
    yield start + size, None


def _rows(
    program: bytes, cie: _Cie, state: _State, at: int, initial: _State
) -> list[tuple[int, UnwindRow | None]]:
    """Execute call frame instructions (DWARF 5, 6.4.2) on `state`; the rows and where each starts."""
    reader, remembered = _Reader(program), list[_State]()
    rows: list[tuple[int, UnwindRow | None]] = []
    while reader.left:
        opcode = reader.number(1)
        high, low = opcode & 0xC0, opcode & 0x3F
        advance = None
        if high == 0x40:
            advance = low
        elif high == 0x80:
            _offset(state, low, reader.leb() * cie.data_factor)
        elif high == 0xC0:
            _restore(state, low, initial)
        else:
            match opcode:
                case 0x00:  # DW_CFA_nop
                    pass
                case 0x02 | 0x03 | 0x04:  # DW_CFA_advance_loc1, 2, 4
                    advance = reader.number(1 << (opcode - 2))
                case 0x05:  # DW_CFA_offset_extended
                    register = reader.leb()
                    _offset(state, register, reader.leb() * cie.data_factor)
                case 0x06:  # DW_CFA_restore_extended
                    _restore(state, reader.leb(), initial)
                case 0x07 | 0x08:  # DW_CFA_undefined, DW_CFA_same_value
                    register = reader.leb()
                    if register == RBP:
                        state.bp = None
                    elif register == RETURN_ADDRESS:
                        state.returns = False
                case 0x0A:  # DW_CFA_remember_state
                    remembered.append(replace(state))
                case 0x0B:  # DW_CFA_restore_state
                    if not remembered:
                        raise ElfError("a frame state is restored that was not remembered", where=".eh_frame")
                    before = remembered.pop()
                    state.cfa, state.bp, state.returns = before.cfa, before.bp, before.returns
                case 0x0C:  # DW_CFA_def_cfa
                    state.cfa = (reader.leb(), reader.leb())
                case 0x0D:  # DW_CFA_def_cfa_register
                    register = reader.leb()
                    state.cfa = (register, state.cfa[1]) if state.cfa else None
                case 0x0E:  # DW_CFA_def_cfa_offset
                    offset = reader.leb()
                    state.cfa = (state.cfa[0], offset) if state.cfa else None
                case 0x0F:  # DW_CFA_def_cfa_expression
                    reader.take(reader.leb())
                    state.cfa = None
                case 0x10 | 0x16:  # DW_CFA_expression, DW_CFA_val_expression
                    register = reader.leb()
                    reader.take(reader.leb())
                    if register in (RBP, RETURN_ADDRESS):
                        state.cfa = None  # it cannot be told from an offset, so nothing above can be trusted
                case 0x2E:  # DW_CFA_GNU_args_size
                    reader.leb()
                case _:
                    raise ElfError(f"call frame instruction {opcode:#x}", where=".eh_frame")
        if advance is not None:
            rows.append((at, state.row()))
            at += advance * cie.code_factor
    return [*rows, (at, state.row())]


def _offset(state: _State, register: int, offset: int) -> None:
    if register == RBP:
        state.bp = offset
    elif register == RETURN_ADDRESS:
        state.returns = offset == -8


def _restore(state: _State, register: int, initial: _State) -> None:
    if register == RBP:
        state.bp = initial.bp
    elif register == RETURN_ADDRESS:
        state.returns = initial.returns


def _pointer(reader: _Reader, encoding: int, address: int) -> int:
    """A value in one of the DW_EH_PE encodings; `address` is where it stands."""
    if encoding == DW_EH_PE_OMIT:
        return 0
    formats = {0x00: "<Q", 0x02: "<H", 0x03: "<I", 0x04: "<Q", 0x0A: "<h", 0x0B: "<i", 0x0C: "<q"}
    code = formats.get(encoding & 0x0F)
    if code is None or encoding & 0x70 not in (0x00, 0x10):
        raise ElfError(f"pointer encoding {encoding:#x}", where=".eh_frame")
    (value,) = struct.unpack(code, reader.take(struct.calcsize(code)))
    return int(value + (address if encoding & 0x70 == 0x10 else 0)) % 2**64
