"""Klp relocations cleared when their module goes, and what 6.1 does instead."""

from pathlib import Path

import pytest
from klp_modules import KLP_LAMP, LAMP, LAMP_32S, LAMP_DATA, LAMP_TEXT, VMLINUX_DATA, Changed, section_of

from elf.klp_sections import klp_relocations
from elf.relocation import RULES
from emu.errno import KernelErrno
from emu.events import EventKind
from klpemu import Kernel
from patches import core, klp_relocation
from patches.variants.clear_relocations import relocation_targets_cleared

INVALID = "x86/modules: Invalid relocation target, existing value"


def locations(kernel: Kernel, section: str) -> list[tuple[int, int]]:
    """Address and size of each field that a klp relocation section fills."""
    placement = kernel.machine.modules.objects["klp_lamp"].placement
    rela = section_of(placement.image, section)
    base = placement.addresses[rela.info]
    return [(base + each.offset, RULES[each.type].size) for each in klp_relocations(placement.image, rela)]


def values(kernel: Kernel, *sections: str) -> set[bytes]:
    """The different contents of the fields, cut to four bytes."""
    return {
        kernel.machine.space.read(at, size)[:4]
        for section in sections
        for at, size in locations(kernel, section)
    }


def come_and_go(kernel: Kernel) -> None:
    kernel.load_module(LAMP)
    assert kernel.call("lamp:lamp_light", 1) == 2081
    kernel.verify("there").raise_for_findings()
    kernel.unload_module("lamp")
    kernel.verify("gone").raise_for_findings()


def test_without_the_variant_the_values_stay_and_the_module_cannot_come_back(kernel: Kernel) -> None:
    kernel.insmod(KLP_LAMP)
    come_and_go(kernel)
    assert bytes(4) not in values(kernel, LAMP_TEXT, LAMP_DATA, LAMP_32S)
    with pytest.raises(KernelErrno, match="Skipping invalid relocation target, existing value is nonzero"):
        kernel.load_module(LAMP)


def test_with_the_variant_the_fields_are_zero_and_the_module_comes_back(kernel: Kernel) -> None:
    with relocation_targets_cleared():
        kernel.insmod(KLP_LAMP)
        for _ in range(3):
            come_and_go(kernel)
            assert values(kernel, LAMP_TEXT, LAMP_DATA, LAMP_32S) == {bytes(4)}
        assert bytes(4) not in values(kernel, VMLINUX_DATA)
        assert kernel.call("call_same_one", 1) == 7201
        kernel.disable("klp_lamp")
    kernel.verify().raise_for_findings()


def test_the_fields_are_cleared_after_the_object_was_unpatched(kernel: Kernel) -> None:
    with relocation_targets_cleared():
        kernel.insmod(KLP_LAMP)
        kernel.load_module(LAMP)
        site, _ = kernel.site_of("lamp:lamp_light")
        fields = {at for section in (LAMP_TEXT, LAMP_DATA, LAMP_32S) for at, _ in locations(kernel, section)}
        number = kernel.machine.events.total
        kernel.unload_module("lamp")
    pokes = [each for each in kernel.machine.events.since(number) if each.kind is EventKind.POKE]
    order = [each.address for each in pokes if each.address == site or each.address in fields]
    assert site in order
    assert set(order[len(order) - len(fields) :]) == fields


def test_a_field_that_somebody_has_changed_is_left_with_a_warning(kernel: Kernel) -> None:
    """clear_relocate_add() ends the section there; its neighbours are cleared all the same."""
    with relocation_targets_cleared():
        kernel.insmod(KLP_LAMP)
        kernel.load_module(LAMP)
        (at, size), *_ = locations(kernel, LAMP_DATA)
        value = int.from_bytes(kernel.machine.space.read(at, size), "little")
        kernel.machine.space.write(at, bytes(7) + b"\1")
        lines = len(kernel.log)
        kernel.unload_module("lamp")
        warning = f"{INVALID} does not match expected value for type 1, loc {at:016x}, val {value:x}"
        assert warning in kernel.log[lines:]
        assert kernel.machine.space.read(at, size) == bytes(7) + b"\1"
        assert values(kernel, LAMP_TEXT, LAMP_32S) == {bytes(4)}
        lines = len(kernel.log)
        with pytest.raises(KernelErrno):
            kernel.load_module(LAMP)
        assert kernel.log[lines].startswith(f"{INVALID} is nonzero for type 1, loc {at:016x}, val ")


def test_the_value_of_a_relative_one_is_relative_in_the_message(kernel: Kernel, tmp_path: Path) -> None:
    """The commit computes all of the value before it looks at the field."""
    path = Changed().contents(".text.livepatch_call_same_two", 0xA, b"\1").saved(tmp_path)
    with relocation_targets_cleared(), pytest.raises(KernelErrno):
        kernel.insmod(path)
    found = int(kernel.log[-1].rpartition(" val ")[2], 16)
    location = int(kernel.log[-1].partition(" loc ")[2][:16], 16)
    assert (found + location) % 2**64 == kernel.address_of("same_name,1") - 4


def test_what_does_not_fit_is_not_written(kernel: Kernel, tmp_path: Path) -> None:
    path = Changed().entry(LAMP_32S, 0, addend=2**32).saved(tmp_path)
    with relocation_targets_cleared():
        kernel.insmod(path)
        with pytest.raises(KernelErrno, match="overflow in relocation type 11"):
            kernel.load_module(LAMP)
        assert values(kernel, LAMP_32S) == {bytes(4)}
        # As in the kernel nothing is undone for the patch that has failed.
        assert bytes(4) not in values(kernel, LAMP_TEXT)
    kernel.verify().raise_for_findings()


def test_afterwards_everything_is_as_before(kernel: Kernel) -> None:
    before = (klp_relocation.relocate_entries, core.klp_free_object_loaded)
    with relocation_targets_cleared():
        assert klp_relocation.relocate_entries is not before[0]
        assert core.klp_free_object_loaded is not before[1]
    assert (klp_relocation.relocate_entries, core.klp_free_object_loaded) == before
    kernel.insmod(KLP_LAMP)
    come_and_go(kernel)
    assert bytes(4) not in values(kernel, LAMP_TEXT)
