"""Klp relocations: when they are written, what the code then does, and what stays of them.

The lines are those of kernel/livepatch/core.c and arch/x86/kernel/module.c.
"""

from pathlib import Path

import pytest
from klp_modules import (
    KLP_LAMP,
    KPATCH_LAMP,
    LAMP,
    LAMP_32S,
    LAMP_DATA,
    LAMP_TEXT,
    VMLINUX_DATA,
    VMLINUX_TEXT,
    Changed,
    are_zero,
    fields,
    section_of,
)

from elf.klp_sections import klp_relocations
from elf.relocation import R_X86_64_64, R_X86_64_PC32, R_X86_64_PC64, R_X86_64_PLT32
from emu.errno import KernelErrno
from emu.events import EventKind
from klpemu import Kernel

NONZERO = "x86/modules: Skipping invalid relocation target, existing value is nonzero"

both = pytest.mark.parametrize("path", [KLP_LAMP, KPATCH_LAMP], ids=lambda path: path.stem)


# When, and what the code then does.


@both
def test_those_for_vmlinux_are_there_once_the_livepatch_is_loaded(kernel: Kernel, path: Path) -> None:
    """same_name is there twice: sympos 1 adds 100, sympos 2 adds 200; the twin that is data holds 7."""
    kernel.call("checked_div", 9, 0)  # div_errors becomes 9
    kernel.insmod(path)
    assert kernel.call("call_same_one", 1) == 1 + 200 + 9 + 7000
    assert kernel.call("call_same_two", 1) == 1 + 100 + 7 + 5000
    kernel.verify().raise_for_findings()


@both
def test_those_for_a_module_that_is_there_are_written_when_the_patch_is_enabled(
    kernel: Kernel, path: Path
) -> None:
    """glow is there twice in the symbol table: sympos 2 adds 2000; level is 40."""
    kernel.load_module(LAMP)
    kernel.insmod(path)
    assert kernel.call("lamp:lamp_light", 1) == 1 + 2000 + 40 + 40
    assert kernel.call("lamp:lamp_flash", 2) == kernel.address_of("lamp:level") + 2
    kernel.verify().raise_for_findings()


@both
def test_those_for_a_module_are_written_when_it_comes(kernel: Kernel, path: Path) -> None:
    name = kernel.insmod(path)
    for section in (LAMP_TEXT, LAMP_DATA, LAMP_32S):
        assert are_zero(fields(kernel, section, name))
    kernel.verify("without its object").raise_for_findings()
    kernel.load_module(LAMP)
    assert kernel.call("lamp:lamp_light", 1) == 1 + 2000 + 40 + 40
    assert kernel.call("lamp:lamp_flash", 2) == kernel.address_of("lamp:level") + 2
    kernel.verify("with it").raise_for_findings()


def test_a_symbol_index_of_data_and_of_text_is_an_address(kernel: Kernel) -> None:
    kernel.insmod(KLP_LAMP)
    first, second = fields(kernel, VMLINUX_DATA)
    assert int.from_bytes(first, "little") == kernel.address_of("same_name,1")
    assert int.from_bytes(second, "little") == kernel.address_of("same_name,2")


def test_early_ones_are_plain_stores_and_late_ones_pokes_and_a_sync_under_text_mutex(kernel: Kernel) -> None:
    """apply_relocate_add(): memcpy for an UNFORMED module, else text_poke() and text_poke_sync()."""
    machine = kernel.machine
    held: list[bool] = []
    text_mutex = machine.view("mutex", machine.symbol("text_mutex"))
    owner = text_mutex.owner.address_

    def listen(event: object) -> None:
        if getattr(event, "note", "") == "text_poke":
            held.append(any(machine.space.read(owner, 8)))

    machine.events.listeners.append(listen)
    kernel.insmod(KLP_LAMP)
    assert held == []
    number = machine.events.total
    kernel.load_module(LAMP)
    assert held == [True] * 4
    kinds = [
        (event.kind, event.note)
        for event in machine.events.since(number)
        if event.kind is EventKind.SYNC or event.note == "text_poke"
    ]
    poke, sync = (EventKind.POKE, "text_poke"), (EventKind.SYNC, "text_poke_sync")
    # One section after the other, in file order: level_at, lamp_light, lamp_flash.
    assert kinds[: len(kinds) - 6] == [poke, sync, poke, poke, sync, poke, sync]
    assert not any(machine.space.read(owner, 8))


def test_relocations_of_type_none_are_left_alone(kernel: Kernel, tmp_path: Path) -> None:
    path = Changed().entry(VMLINUX_DATA, 0, type=0).saved(tmp_path)
    kernel.insmod(path)
    first, second = fields(kernel, VMLINUX_DATA)
    assert (first, second) == (bytes(8), kernel.address_of("same_name,2").to_bytes(8, "little"))
    kernel.verify().raise_for_findings()


# What 6.1 leaves behind.


def test_what_was_written_for_a_module_stays_when_it_goes(kernel: Kernel) -> None:
    kernel.insmod(KLP_LAMP)
    kernel.load_module(LAMP)
    written = fields(kernel, LAMP_TEXT)
    kernel.unload_module("lamp")
    assert fields(kernel, LAMP_TEXT) == written
    assert not are_zero(written)
    kernel.verify().raise_for_findings()


def test_a_module_that_was_patched_cannot_come_back(kernel: Kernel) -> None:
    """The message that 0c05e7bd2d01 quotes; level_at comes first in the file."""
    kernel.insmod(KLP_LAMP)
    kernel.load_module(LAMP)
    kernel.unload_module("lamp")
    written, lines = fields(kernel, LAMP_TEXT), len(kernel.log)
    with pytest.raises(KernelErrno) as caught:
        kernel.load_module(LAMP)
    assert caught.value.name == "ENOEXEC"
    (first, *rest) = kernel.log[lines:]
    assert first.startswith(f"{NONZERO} for type 1, loc ffffffffc")
    assert rest == [
        "livepatch: failed to initialize patch 'klp_lamp' for module 'lamp' (-8)",
        "livepatch: patch 'klp_lamp' failed for module 'lamp', refusing to load module 'lamp'",
    ]
    assert fields(kernel, LAMP_TEXT) == written
    assert "lamp" not in kernel.machine.modules.objects
    kernel.verify().raise_for_findings()


def test_it_can_come_back_once_the_livepatch_has_gone(kernel: Kernel) -> None:
    kernel.insmod(KLP_LAMP)
    kernel.load_module(LAMP)
    kernel.unload_module("lamp")
    kernel.disable("klp_lamp")
    kernel.load_module(LAMP)
    kernel.insmod(KLP_LAMP)
    assert kernel.call("lamp:lamp_light", 1) == 2081
    kernel.verify().raise_for_findings()


def test_a_late_value_that_does_not_fit_is_written_and_then_refused(kernel: Kernel, tmp_path: Path) -> None:
    """6.1 checks what it has read back: the two entries before the error are there, and so is its own."""
    path = Changed().entry(LAMP_32S, 0, addend=2**32).saved(tmp_path)
    kernel.insmod(path)
    with pytest.raises(KernelErrno) as caught:
        kernel.load_module(LAMP)
    assert caught.value.name == "ENOEXEC"
    assert "overflow in relocation type 11" in kernel.log[-4]
    assert not are_zero(fields(kernel, LAMP_TEXT))
    assert not are_zero(fields(kernel, LAMP_32S))
    assert kernel.call("call_same_two", 1) == 5108


def test_types_are_told_by_size_and_not_confused(kernel: Kernel, tmp_path: Path) -> None:
    """A relative one of 64 bits, in the place of an absolute one."""
    kernel.insmod(Changed().entry(VMLINUX_DATA, 1, type=R_X86_64_PC64).saved(tmp_path))
    placement = kernel.machine.modules.objects["klp_lamp"].placement
    location = placement.addresses[section_of(placement.image, VMLINUX_DATA).info] + 8
    distance = (kernel.address_of("same_name,2") - location) % 2**64
    assert fields(kernel, VMLINUX_DATA)[1] == distance.to_bytes(8, "little")
    kernel.verify().raise_for_findings()


def test_the_kinds_that_the_tests_change_are_what_they_say() -> None:
    rela = section_of(Changed().image, VMLINUX_TEXT)
    assert [each.type for each in klp_relocations(Changed().image, rela)] == [R_X86_64_PLT32, R_X86_64_PC32]
    rela = section_of(Changed().image, VMLINUX_DATA)
    assert [each.type for each in klp_relocations(Changed().image, rela)] == [R_X86_64_64] * 2
