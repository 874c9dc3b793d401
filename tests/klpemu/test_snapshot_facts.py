"""What is compared of two snapshots: names in place of addresses, and nothing can change unseen."""

from typing import Any

import pytest

from klpemu.recording import Poke, Snapshot
from klpemu.snapshot_facts import Names, plain_line, poke_fact, snapshot_facts

SITE, TRAMPOLINE, HANDLER, THUNK = (
    0xFFFFFFFF81410000,
    0xFFFFFFFFC0209000,
    0xFFFFFFFF8113F000,
    0xFFFFFFFF81E01000,
)
NAMES = Names({THUNK: "srso_return_thunk"}, exact=False)


def rel32(opcode: str, address: int, target: int) -> str:
    return opcode + (target - address - 5).to_bytes(4, "little", signed=True).hex()


def patched(move: int = 0, **changes: Any) -> Snapshot:
    """A function with a trampoline: sub, a load of the ops, the call, a return through a thunk; all `move`d
    by so many bytes but the thunk.
    """
    site, trampoline, handler = SITE + move, TRAMPOLINE + 2 * move, HANDLER + move
    code = "4881eca8000000" + "488b150a000000"  # the pointer is at +24
    code += rel32("e8", trampoline + 14, handler) + rel32("e9", trampoline + 19, THUNK)
    facts: dict[str, Any] = {
        "addr": f"{site:#x}",
        "module": "",
        "bytes16": rel32("e8", site, trampoline) + "5348",
        "kind": "call",
        "target": f"{trampoline:#x}",
        "target_sym": "ftrace_trampoline [__builtin__ftrace]",
        "tramp_bytes": code,
        "tramp_len": 32,
        "call_target": f"{handler:#x}",
        "call_target_sym": "klp_ftrace_handler",
    }
    line = (
        f"f (1)   I  \ttramp: {trampoline:#x} (klp_ftrace_handler+0x0/0x110) ->klp_ftrace_handler+0x0/0x110"
    )
    return Snapshot("", {"f": facts | changes}, (line,), {}, f"own_a 16384 1 - Live {trampoline:#x} (OEK)\n")


def test_where_things_lie_makes_no_difference() -> None:
    facts = snapshot_facts(patched(), NAMES)
    assert facts == snapshot_facts(patched(0x10000), NAMES)
    assert facts["f site"] == "e8 -> ftrace_trampoline [__builtin__ftrace]"
    assert facts["f trampoline"] == (
        "4881eca8000000488b150a000000e8<klp_ftrace_handler>e9<srso_return_thunk>"
    )
    assert facts["enabled_functions 1"].startswith(
        "f (1)   I  \ttramp: <target of f> (klp_ftrace_handler+0x0)"
    )
    assert facts["/proc/modules 1"] == "own_a 16384 1 - Live <address> (OEK)"


def test_the_same_build_is_compared_with_addresses_sizes_and_the_bytes_behind_the_site() -> None:
    facts = snapshot_facts(patched(), Names(NAMES.at, exact=True))
    assert facts["f address"] == f"{SITE:#x}"
    assert facts["f bytes behind the site"] == "5348"
    assert "+0x0/0x110" in facts["enabled_functions 1"]


@pytest.mark.parametrize("byte", range(24))
def test_no_byte_of_a_trampoline_can_change_unseen(byte: int) -> None:
    code = bytearray.fromhex(patched().sites["f"]["tramp_bytes"])
    code[byte] ^= 1
    assert snapshot_facts(patched(tramp_bytes=code.hex()), NAMES) != snapshot_facts(patched(), NAMES)


@pytest.mark.parametrize("byte", range(5))
def test_no_byte_of_a_site_can_change_unseen(byte: int) -> None:
    code = bytearray.fromhex(patched().sites["f"]["bytes16"])
    code[byte] ^= 1
    assert snapshot_facts(patched(bytes16=code.hex()), NAMES) != snapshot_facts(patched(), NAMES)


def test_an_old_func_that_is_not_the_function_of_that_name_is_told() -> None:
    func = {
        "old_name": "f",
        "old_func": f"{SITE:#x}",
        "new_sym": "g [m]",
        "nop": 0,
        "patched": 1,
        "transition": 0,
    }
    right = snapshot_facts(patched(func_stack=[func]), NAMES)["f func_stack 1"]
    assert right == "f -> g [m]: nop 0, patched 1, transition 0"
    wrong = snapshot_facts(patched(func_stack=[func | {"old_func": "0x10"}]), NAMES)["f func_stack 1"]
    assert wrong == "f (old_func is 0x10) -> g [m]: nop 0, patched 1, transition 0"


def test_a_change_of_text_names_what_it_leads_to_in_every_phase() -> None:
    names = Names({TRAMPOLINE: "ftrace_trampoline [__builtin__ftrace]"}, exact=False)
    call = bytes.fromhex(rel32("e8", SITE, TRAMPOLINE))
    nop = bytes.fromhex("0f1f440000")
    phases = [(nop, b"\xcc" + nop[1:]), (b"\xcc" + nop[1:], b"\xcc" + call[1:]), (b"\xcc" + call[1:], call)]
    assert [
        poke_fact(Poke("enable", "f", SITE, before, after, number + 1), names)
        for number, (before, after) in enumerate(phases)
    ] == [
        "enable f phase 1: 0f 1f 44 00 00 becomes cc 1f 44 00 00",
        "enable f phase 2: cc 1f 44 00 00 becomes cc -> ftrace_trampoline",
        "enable f phase 3: cc -> ftrace_trampoline becomes e8 -> ftrace_trampoline",
    ]


def test_addresses_in_log_lines_are_left_out() -> None:
    assert plain_line("at 0xffffffffc0201000 in 0x10") == "at <address> in 0x10"
