"""Jump labels: a branch is a NOP or a jump, as its key says."""

import pytest

from elf.errors import KlpemuError
from elf.text_tables import JumpEntry
from emu.alternative import X86_NOPS
from emu.jump_label import jump_label_patch, jump_label_update, static_key_enabled
from emu.text_image import TextImage
from emu.text_poke import NOP5, text_gen_insn

AT = 0xFFFFFFFFC0001000
KEY = AT + 0x200
NEAR, FAR = AT + 0x20, AT + 0x180
SHORT, LONG = bytes.fromhex("eb1e"), text_gen_insn(0xE9, AT, FAR)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("branch", [False, True])
def test_a_branch_jumps_if_key_and_branch_differ(enabled: bool, branch: bool) -> None:
    for target, jump, nop in ((FAR, LONG, NOP5), (NEAR, SHORT, X86_NOPS[2])):
        wanted = jump if enabled != branch else nop
        for stands in (jump, nop):
            entry = JumpEntry(AT, target, KEY, branch)
            assert jump_label_patch(entry, stands.ljust(5, b"\x90"), enabled=enabled) == wanted


def test_anything_else_at_a_branch_is_a_fatal_bug() -> None:
    with pytest.raises(KlpemuError, match="Fatal kernel bug, unexpected op"):
        jump_label_patch(JumpEntry(AT, FAR, KEY, False), bytes.fromhex("5548 89e5 90"), enabled=True)


def text(enabled: int, kind: int) -> TextImage:
    data = bytearray(0x300)
    data[:5] = NOP5
    data[0x200:0x204] = enabled.to_bytes(4, "little")
    data[0x208:0x210] = kind.to_bytes(8, "little")
    return TextImage([(AT, data)])


@pytest.mark.parametrize(
    ("enabled", "kind", "state"),
    [(0, 0x1000, (False, False)), (2, 0x1001, (True, True)), (1, 0x1002, (True, False))],
)
def test_a_key_is_a_count_and_its_first_state(enabled: int, kind: int, state: tuple[bool, bool]) -> None:
    assert static_key_enabled(text(enabled, kind), KEY) == state


def test_only_branches_of_a_key_that_has_changed_are_touched() -> None:
    entry = JumpEntry(AT, FAR, KEY, False)
    changed, same = text(1, 0), text(1, 1)
    assert jump_label_update(changed, [entry]).applied == 1
    assert changed.read(AT, 5) == LONG
    assert jump_label_update(same, [entry]).left == 1
    assert same.read(AT, 5) == NOP5


def test_a_branch_in_a_section_that_is_not_loaded_is_left() -> None:
    assert jump_label_update(text(1, 0), [JumpEntry(AT - 0x1000, FAR, KEY, False)]).left == 1
