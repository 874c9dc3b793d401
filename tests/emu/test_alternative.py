"""Alternatives, retpolines, return thunks, LOCK prefixes: the bytes that the kernel writes."""

from dataclasses import replace

import pytest
from capstone import CS_ARCH_X86, CS_MODE_64, Cs
from hypothesis import given
from hypothesis import strategies as st

from elf.errors import KlpemuError
from elf.text_tables import ALTINSTR_FLAG_INV, AltInstr, ParavirtPatchSite
from emu.alternative import (
    X86_NOPS,
    ArchSymbols,
    add_nops,
    alternatives_smp_unlock,
    apply_alternatives,
    apply_ibt_endbr,
    apply_paravirt,
    apply_retpolines,
    apply_returns,
    optimize_nops,
)
from emu.cpu_features import CPUS, FEATURES, Cpu, Vendor, capability_of
from emu.mitigations import Mitigations, select_mitigations
from emu.text_image import TextImage
from emu.text_poke import text_gen_insn

AT = 0xFFFFFFFF81000000
THUNKS = {f"__x86_indirect_thunk_{name}": AT + 0x800 + 32 * number
          for number, name in ((0, "rax"), (4, "rsp"), (11, "r11"))}  # fmt: skip
SYMBOLS = {
    **THUNKS,
    "__x86_return_thunk": AT + 0xA00,
    "its_return_thunk": AT + 0xA20,
    "srso_return_thunk": AT + 0xA40,
    "__x86_indirect_its_thunk_array": AT + 0xB00,
    "pv_ops": AT + 0xC00,
    "_paravirt_nop": AT + 0xD00,
    "paravirt_BUG": AT + 0xD10,
}
ARCH = ArchSymbols(SYMBOLS.get)
ALWAYS = FEATURES["ALWAYS"]


def cpu_with(features: str, thunk: str = "__x86_return_thunk") -> Mitigations:
    return Mitigations(Cpu("test", Vendor.INTEL, 6, 1, 1, capability_of(features)), thunk, {})


def text(code: str = "", *, size: int = 0x1000) -> TextImage:
    return TextImage([(AT, bytearray(bytes.fromhex(code).ljust(size, b"\xcc")))])


def alternative(old: str, new: str, cpuid: int, features: str = "ALWAYS") -> str:
    """What becomes of `old` at AT with one replacement, which lies at AT + 0x400."""
    image = text(old)
    image.write(AT + 0x400, bytes.fromhex(new))
    sizes = len(bytes.fromhex(old)), len(bytes.fromhex(new))
    apply_alternatives(image, [AltInstr(AT, AT + 0x400, cpuid, *sizes)], cpu_with(features))
    return image.read(AT, sizes[0]).hex(" ")


def test_a_shorter_replacement_is_filled_up_with_one_long_nop() -> None:
    assert alternative("e8 00 00 00 00 90 90 90", "f3 aa", ALWAYS) == "f3 aa 66 0f 1f 44 00 00"


def test_the_feature_decides_and_its_absence_where_the_flag_says_so() -> None:
    absent = FEATURES["ERMS"]
    assert alternative("01 c0", "31 c0", absent) == "01 c0"
    assert alternative("01 c0", "31 c0", absent | ALTINSTR_FLAG_INV) == "31 c0"
    assert alternative("01 c0", "31 c0", ALWAYS | ALTINSTR_FLAG_INV) == "01 c0"


def test_nops_are_made_longer_where_nothing_is_replaced_too() -> None:
    assert alternative("01 c0 90 90 90", "31 c0", FEATURES["ERMS"]) == "01 c0 0f 1f 00"


def test_a_call_goes_on_calling_the_same_function() -> None:
    call = text_gen_insn(0xE8, AT + 0x400, AT + 0x900).hex()
    assert bytes.fromhex(alternative("90 90 90 90 90", call, ALWAYS)) == text_gen_insn(0xE8, AT, AT + 0x900)


@pytest.mark.parametrize(
    ("target", "wanted"),
    [(AT + 129, "eb 7f 0f 1f 00"), (AT + 130, "e9 7d 00 00 00"), (AT - 4, "e9 f7 ff ff ff")],
)
def test_a_jump_becomes_short_only_forward(target: int, wanted: str) -> None:
    jump = text_gen_insn(0xE9, AT + 0x400, target).hex()
    assert alternative("90 90 90 90 90", jump, ALWAYS) == wanted


def test_a_later_alternative_replaces_what_an_earlier_one_has_put_there() -> None:
    image = text("01 c0")
    image.write(AT + 0x400, bytes.fromhex("31 c0 29 c0"))
    table = [AltInstr(AT, AT + 0x400, ALWAYS, 2, 2), AltInstr(AT, AT + 0x402, ALWAYS, 2, 2)]
    done = apply_alternatives(image, table, cpu_with("ALWAYS"))
    assert image.read(AT, 2).hex() == "29c0"
    assert (done.applied, done.left) == (2, 0)


def test_an_unknown_feature_is_refused() -> None:
    with pytest.raises(KlpemuError, match=r"feature 24\*32\+0"):
        alternative("01 c0", "31 c0", 24 * 32)


@given(st.integers(0, 300))
def test_nops_fill_exactly_and_decode_as_nops(size: int) -> None:
    code = add_nops(size)
    assert len(code) == size
    decoded = list(Cs(CS_ARCH_X86, CS_MODE_64).disasm_lite(code, 0))
    assert sum(each[1] for each in decoded) == size
    # 66 90 is xchg %ax, %ax to the decoder.
    assert {each[2] for each in decoded} <= {"nop", "xchg"}
    assert all(len(nop) == index for index, nop in enumerate(X86_NOPS))
    assert size < 8 or code.startswith(X86_NOPS[8])


def test_a_0x90_within_an_instruction_is_no_nop() -> None:
    code = bytes.fromhex("48 c7 c0 90 90 90 90 90 90")
    assert optimize_nops(code, code).hex(" ") == "48 c7 c0 90 90 90 90 66 90"


@pytest.mark.parametrize(
    ("features", "thunk", "code", "wanted"),
    [
        ("RETPOLINE", "rax", "e8", None),
        ("", "rax", "e8", "ff d0 0f 1f 00"),
        ("", "rax", "2e e8", "ff d0 0f 1f 40 00"),
        ("", "r11", "2e e9", "41 ff e3 cc 66 90"),
        ("", "rax", "0f 84", "75 04 ff e0 cc 90"),
        ("RETPOLINE RETPOLINE_LFENCE", "rax", "e8", "0f ae e8 ff d0"),
        ("RETPOLINE RETPOLINE_LFENCE", "r11", "2e e8", "0f ae e8 41 ff d3"),
        ("RETPOLINE RETPOLINE_LFENCE", "r11", "e8", None),
    ],
)
def test_branches_to_retpolines(features: str, thunk: str, code: str, wanted: str | None) -> None:
    opcode = bytes.fromhex(code)
    start = AT + 0x20  # in the upper half of a cache line
    target = THUNKS[f"__x86_indirect_thunk_{thunk}"]
    branch = opcode + (target - (start + len(opcode) + 4)).to_bytes(4, "little", signed=True)
    image = text()
    image.write(start, branch)
    done = apply_retpolines(image, [start], cpu_with(features), ARCH)
    assert image.read(start, len(branch)).hex(" ") == (wanted or branch.hex(" "))
    assert (done.applied, done.left) == ((1, 0) if wanted else (0, 1))


@pytest.mark.parametrize(("thunk", "last"), [("rax", 1), ("r11", 2)])
def test_with_its_a_branch_whose_last_byte_is_in_the_lower_half_of_a_line_goes_through_a_thunk(
    thunk: str, last: int
) -> None:
    image = text()
    target, number = THUNKS[f"__x86_indirect_thunk_{thunk}"], {"rax": 0, "r11": 11}[thunk]
    low, high = AT + 0x1F - last, AT + 0x60 - last
    for start in (low, high):
        image.write(start, text_gen_insn(0xE8, start, target))
    apply_retpolines(image, [low, high], cpu_with("INDIRECT_THUNK_ITS"), ARCH)
    its = SYMBOLS["__x86_indirect_its_thunk_array"] + 64 * number
    assert image.read(low, 5) == text_gen_insn(0xE8, low, its)
    assert image.read(high, 5).hex(" ") == {0: "ff d0 0f 1f 00", 11: "41 ff d3 66 90"}[number]


def test_a_call_through_rsp_and_one_of_something_else_are_noticed() -> None:
    image = text()
    image.write(AT, text_gen_insn(0xE8, AT, THUNKS["__x86_indirect_thunk_rsp"]))
    image.write(AT + 16, text_gen_insn(0xE8, AT + 16, AT))
    with pytest.raises(KlpemuError, match="through RSP"):
        apply_retpolines(image, [AT], cpu_with(""), ARCH)
    done = apply_retpolines(image, [AT + 16], cpu_with(""), ARCH)
    assert len(done.refused) == 1
    assert image.read(AT + 16, 5) == text_gen_insn(0xE8, AT + 16, AT)


@pytest.mark.parametrize(
    ("features", "thunk", "jumps"),
    [
        ("", "__x86_return_thunk", (False, False)),
        ("RETHUNK", "srso_return_thunk", (True, True)),
        ("RETHUNK", "its_return_thunk", (True, False)),
    ],
)
def test_returns_at_both_halves_of_a_cache_line(features: str, thunk: str, jumps: tuple[bool, bool]) -> None:
    image = text()
    sites = AT, AT + 0x20
    for site in sites:
        image.write(site, text_gen_insn(0xE9, site, SYMBOLS["__x86_return_thunk"]))
    apply_returns(image, sites, cpu_with(features, thunk), ARCH)
    for site, jump in zip(sites, jumps, strict=True):
        wanted = text_gen_insn(0xE9, site, SYMBOLS[thunk]) if jump else bytes.fromhex("c3cccccccc")
        assert image.read(site, 5) == wanted


def test_a_trampoline_that_has_got_its_function_keeps_it() -> None:
    image = text()
    image.write(AT, text_gen_insn(0xE9, AT, AT + 0x500) + bytes.fromhex("0fb9cc"))
    image.write(AT + 16, text_gen_insn(0xE9, AT + 16, AT + 0x500))
    done = apply_returns(image, [AT, AT + 16], cpu_with("RETHUNK", "srso_return_thunk"), ARCH)
    assert (done.applied, done.left, len(done.refused)) == (0, 1, 1)
    assert image.read(AT, 5) == text_gen_insn(0xE9, AT, AT + 0x500)


def test_paravirt_calls_become_direct_and_empty_operations_vanish() -> None:
    image = text("ff 15 00 00 00 00 90" * 3)
    for slot, target in enumerate((AT + 0x500, SYMBOLS["_paravirt_nop"], 0)):
        image.write(SYMBOLS["pv_ops"] + 8 * slot, target.to_bytes(8, "little"))
    apply_paravirt(image, [ParavirtPatchSite(AT + 7 * slot, slot, 7) for slot in range(3)], ARCH)
    assert image.read(AT, 7) == text_gen_insn(0xE8, AT, AT + 0x500) + X86_NOPS[2]
    assert image.read(AT + 7, 7) == X86_NOPS[7]
    assert image.read(AT + 14, 5) == text_gen_insn(0xE8, AT + 14, SYMBOLS["paravirt_BUG"])


def test_lock_prefixes_of_the_text_become_ds_prefixes_on_one_cpu() -> None:
    image = text("f0 ff 00 f0 ff 00 90 f0 ff 00")
    done = alternatives_smp_unlock(image, [AT, AT + 3, AT + 6, AT + 7], AT, AT + 7)
    assert image.read(AT, 10).hex(" ") == "3e ff 00 3e ff 00 90 f0 ff 00"
    assert (done.applied, done.left) == (2, 2)


def test_sealed_functions_lose_their_endbr() -> None:
    image = text("f3 0f 1e fa 90")
    done = apply_ibt_endbr(image, [AT, AT + 1])
    assert image.read(AT, 5).hex(" ") == "66 0f 1f 00 90"
    assert (done.applied, len(done.refused)) == (1, 1)


def test_a_kernel_without_the_thunk_that_the_cpu_needs_is_named() -> None:
    chosen = replace(select_mitigations(CPUS["zen2"]), return_thunk="srso_return_thunk")
    with pytest.raises(KlpemuError, match="no symbol srso_return_thunk"):
        apply_returns(text(), [AT], chosen, ArchSymbols({}.get))
