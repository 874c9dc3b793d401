"""Static calls: what stands at a site for what its key holds."""

import pytest

from elf.errors import KlpemuError
from elf.text_tables import StaticCallSite
from emu.alternative import ArchSymbols
from emu.cpu_features import Cpu, Vendor, capability_of
from emu.mitigations import Mitigations
from emu.static_call import XOR5RAX, static_call_add_module, static_call_init, static_call_transform
from emu.text_image import TextImage
from emu.text_poke import CALL_OPCODE, JMP32_OPCODE, NOP5, text_gen_insn

AT = 0xFFFFFFFFC0001000
KERNEL = 0xFFFFFFFF81000000
KEY = AT + 0x200
FUNC = KERNEL + 0x500
TRAMP = KERNEL + 0x900
SYMBOLS = {
    "__static_call_return0": KERNEL + 0x10,
    "__static_call_return": KERNEL + 0x20,
    "__x86_return_thunk": KERNEL + 0x30,
    "srso_return_thunk": KERNEL + 0x40,
}
ARCH = ArchSymbols(SYMBOLS.get)
CALL = text_gen_insn(CALL_OPCODE, AT, TRAMP)
JUMP = text_gen_insn(JMP32_OPCODE, AT, TRAMP)
JCC = b"\x0f" + text_gen_insn(0x84, AT + 1, TRAMP)


def chosen(features: str = "", thunk: str = "__x86_return_thunk") -> Mitigations:
    return Mitigations(Cpu("test", Vendor.AMD, 6, 1, 1, capability_of(features)), thunk, {})


def transformed(code: bytes, func: int, *, tail: bool, cpu: Mitigations | None = None) -> bytes:
    return static_call_transform(code, AT, func, tail=tail, chosen=cpu or chosen(), symbols=ARCH)


def test_a_call_goes_to_the_function_itself() -> None:
    assert transformed(CALL, FUNC, tail=False) == text_gen_insn(CALL_OPCODE, AT, FUNC)


def test_a_call_of_nothing_is_a_nop_and_one_of_return0_clears_rax() -> None:
    assert transformed(CALL, 0, tail=False) == NOP5
    assert transformed(NOP5, SYMBOLS["__static_call_return0"], tail=False) == XOR5RAX
    assert transformed(XOR5RAX, FUNC, tail=False) == text_gen_insn(CALL_OPCODE, AT, FUNC)


def test_a_tail_call_jumps_and_of_nothing_it_returns() -> None:
    assert transformed(JUMP, FUNC, tail=True) == text_gen_insn(JMP32_OPCODE, AT, FUNC)
    assert transformed(JUMP, 0, tail=True).hex() == "c3cccccccc"


def test_where_returns_need_a_thunk_a_tail_call_of_nothing_jumps_there() -> None:
    cpu = chosen("RETHUNK", "srso_return_thunk")
    thunk = SYMBOLS["srso_return_thunk"]
    assert transformed(JUMP, 0, tail=True, cpu=cpu) == text_gen_insn(JMP32_OPCODE, AT, thunk)


def test_a_conditional_tail_call_keeps_its_condition() -> None:
    assert transformed(JCC, FUNC, tail=True) == b"\x0f" + text_gen_insn(0x84, AT + 1, FUNC)
    nothing = SYMBOLS["__static_call_return"]
    assert transformed(JCC, 0, tail=True) == b"\x0f" + text_gen_insn(0x84, AT + 1, nothing)


@pytest.mark.parametrize("tail", [False, True])
def test_what_is_no_site_is_refused(tail: bool) -> None:
    with pytest.raises(KlpemuError, match="unexpected static_call insn opcode 0x55"):
        transformed(bytes.fromhex("554889e5c3cc"), FUNC, tail=tail)


def module_text(func: int) -> TextImage:
    data = bytearray(0x300)
    data[:5] = CALL
    data[0x200:0x208] = func.to_bytes(8, "little")
    return TextImage([(AT, data)])


def test_a_site_follows_its_key_and_one_that_is_right_already_stays() -> None:
    text = module_text(FUNC)
    sites = [StaticCallSite(AT, KEY, False)]
    assert static_call_init(text, sites, chosen(), ARCH).applied == 1
    assert text.read(AT, 5) == text_gen_insn(CALL_OPCODE, AT, FUNC)
    again = static_call_init(text, sites, chosen(), ARCH)
    assert (again.applied, again.left) == (0, 1)


def test_a_site_that_names_a_trampoline_finds_its_key_through_the_kernel() -> None:
    text = module_text(FUNC)
    sites = [StaticCallSite(AT, TRAMP, False)]
    is_text = range(KERNEL, KERNEL + 0x1000).__contains__
    unknown = static_call_add_module(text, sites, {}, is_text, chosen(), ARCH)
    assert text.read(AT, 5) == CALL
    assert "Failed to fixup __raw_static_call() usage" in unknown.refused[0]
    static_call_add_module(text, sites, {TRAMP: KEY}, is_text, chosen(), ARCH)
    assert text.read(AT, 5) == text_gen_insn(CALL_OPCODE, AT, FUNC)
