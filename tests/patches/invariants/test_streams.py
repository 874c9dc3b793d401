"""A redirected call keeps what it must keep: each register, the return address, the stack and its pointer.

The trampoline's code is rewritten, in place and of the same length, so that exactly one thing is lost.
"""

import pytest
from livepatches import Raw, fix_area

from klpemu import Kernel

STREAMS = "calls_reach_the_expected_function"

# `mov qword ptr [rsp + 0x88], 0` of twelve bytes, which nothing in the redirect needs.
SPARE = 0x72
SPARE_CODE = bytes.fromhex("48c784248800000000000000")
# Offset of the load of each register in the trampoline's restore_mcount_regs.
RESTORES = {
    "rbp": 0x93,
    "r9": 0x98,
    "r8": 0x9D,
    "rdi": 0xA2,
    "rsi": 0xA7,
    "rdx": 0xAC,
    "rcx": 0xB1,
    "rax": 0xB6,
}


def trampoline_of(kernel: Kernel, raw: Raw) -> int:
    return raw.trampoline(raw.klp_ops(kernel.address_of("area_of")))


def lost(kernel: Kernel) -> list[str]:
    """What the stream check says about area_of."""
    found = [each for each in kernel.verify().findings if each.invariant == STREAMS]
    assert all(each.symbol.startswith("area_of") for each in found)
    return [each.what for each in found]


@pytest.mark.parametrize("register", RESTORES)
def test_a_register_that_is_restored_from_the_wrong_slot_is_named(
    register: str, kernel: Kernel, raw: Raw
) -> None:
    kernel.enable(fix_area())
    slot = trampoline_of(kernel, raw) + RESTORES[register] + 4
    raw.space.write(slot, b"\x00")  # pt_regs.r15, which the entry code never fills
    assert [what.split()[0] for what in lost(kernel)] == [register]


@pytest.mark.parametrize(
    ("register", "load"),
    [
        ("rbx", "48c7c378563412"),
        ("r12", "49c7c478563412"),
        ("r13", "49c7c578563412"),
        ("r14", "49c7c678563412"),
        ("r15", "49c7c778563412"),
    ],
)
def test_a_callee_saved_register_that_is_overwritten_is_named(
    register: str, load: str, kernel: Kernel, raw: Raw
) -> None:
    kernel.enable(fix_area())
    at = trampoline_of(kernel, raw) + SPARE
    assert raw.space.read(at, 12) == SPARE_CODE
    raw.space.write(at, bytes.fromhex(load + "0f1f440000"))
    assert len(lost(kernel)) == 1
    assert lost(kernel)[0].startswith(f"{register} was 0x")
    assert lost(kernel)[0].endswith("and is 0x12345678 at the expected function")


@pytest.mark.parametrize("offset", [0xB0, 0xB8, 0xB0 + 31 * 8], ids=["return address", "stack", "far up"])
def test_an_overwritten_return_address_or_stack_is_reported(offset: int, kernel: Kernel, raw: Raw) -> None:
    kernel.enable(fix_area())
    store = b"\xc6\x84\x24" + offset.to_bytes(4, "little") + b"\x77" + bytes.fromhex("0f1f4000")
    raw.space.write(trampoline_of(kernel, raw) + SPARE, store)
    assert lost(kernel) == ["the caller's return address or stack was overwritten"]


def test_a_stack_pointer_that_is_off_is_reported(kernel: Kernel, raw: Raw) -> None:
    kernel.enable(fix_area())
    raw.space.write(trampoline_of(kernel, raw) + 0xC2, bytes.fromhex("c20800"))  # ret 8
    assert [what.split()[0] for what in lost(kernel)] == ["rsp"]


def test_an_overwritten_vector_register_is_reported(kernel: Kernel, raw: Raw) -> None:
    kernel.enable(fix_area())
    raw.space.write(
        trampoline_of(kernel, raw) + SPARE, bytes.fromhex("0f57c9" + "0f1f440000" + "0f1f4000")
    )  # xorps xmm1, xmm1
    assert lost(kernel) == ["an SSE register changed"]


def test_the_registers_that_a_kernel_loses_may_be_lost(kernel: Kernel, raw: Raw) -> None:
    kernel.enable(fix_area())
    for load in ("49c7c278563412", "49c7c378563412"):  # r10, r11
        raw.space.write(trampoline_of(kernel, raw) + SPARE, bytes.fromhex(load + "0f1f440000"))
        assert lost(kernel) == []


def test_a_call_that_misses_the_handler_is_reported_although_it_arrives(kernel: Kernel, raw: Raw) -> None:
    kernel.enable(fix_area())
    site, _ = kernel.site_of("area_of")
    target = kernel.address_of("fix_area:fixed_area_of")
    raw.space.write(site, b"\xe9" + ((target - site - 5) & 0xFFFF_FFFF).to_bytes(4, "little"))
    assert kernel.call("area_of", 3, 4) == 12
    assert lost(kernel) == ["the stream went through area_of: the handler must run exactly once"]


def test_a_call_that_ends_elsewhere_says_where(kernel: Kernel, raw: Raw) -> None:
    kernel.enable(fix_area())
    func = raw.funcs(raw.klp_ops(kernel.address_of("area_of")))[0]
    raw.put(raw.member("klp_func", func, "new_func"), kernel.address_of("jump_nowhere"))
    assert len(lost(kernel)) == 1
    assert lost(kernel)[0].startswith("fixed_area_of+0x0/0x10 [fix_area] was not reached: ")


def test_a_warn_on_the_way_is_reported(kernel: Kernel, raw: Raw) -> None:
    kernel.enable(fix_area())
    task = raw.current(kernel)
    raw.put(raw.member("task_struct", task, "trace_recursion"), 0x18)
    found = [each for each in kernel.verify().findings if each.invariant == STREAMS]
    assert [each.symbol.split("+")[0] for each in found] == ["area_of", "perimeter_of"]
    assert all("undefined instruction at klp_ftrace_handler" in each.what for each in found)
