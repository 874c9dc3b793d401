"""What is wrong with klp relocations is found: what the kernel does not check, what the core has wrong."""

from pathlib import Path

import pytest
from klp_modules import (
    KLP_LAMP,
    LAMP,
    LAMP_32S,
    LAMP_DATA,
    LAMP_TEXT,
    VMLINUX_DATA,
    VMLINUX_TEXT,
    Changed,
    section_of,
)
from livepatches import Raw

from elf.klp_sections import klp_relocations
from klpemu import Kernel
from patches import klp_relocation
from patches.invariants.finding import Finding

RIGHT = "klp_relocations_are_right"
TEXT = "text_matches_records"


def found(kernel: Kernel, invariant: str = RIGHT) -> list[Finding]:
    return [each for each in kernel.verify().findings if each.invariant == invariant]


def location(kernel: Kernel, section: str, number: int = 0) -> int:
    """Address of the field of a klp relocation."""
    placement = kernel.machine.modules.objects["klp_lamp"].placement
    rela = section_of(placement.image, section)
    return placement.addresses[rela.info] + list(klp_relocations(placement.image, rela))[number].offset


def test_each_relocation_is_checked_three_times_and_one_for_an_absent_object_not_at_all(
    kernel: Kernel,
) -> None:
    assert kernel.verify().checks[RIGHT] == 0
    kernel.insmod(KLP_LAMP)
    assert kernel.verify().checks[RIGHT] == 5 * 3
    kernel.load_module(LAMP)
    assert kernel.verify().checks[RIGHT] == 9 * 3
    assert kernel.verify().holds


@pytest.mark.parametrize("section", [VMLINUX_TEXT, LAMP_TEXT, LAMP_32S])
def test_a_damaged_field_is_found_in_text(kernel: Kernel, raw: Raw, section: str) -> None:
    kernel.load_module(LAMP)
    kernel.insmod(KLP_LAMP)
    at = location(kernel, section)
    raw.flip(at, 0x10)
    (finding,) = found(kernel, TEXT)
    assert finding.address <= at < finding.address + len(finding.expected)


def test_a_field_that_stays_from_a_module_that_has_gone_is_still_checked(kernel: Kernel, raw: Raw) -> None:
    kernel.insmod(KLP_LAMP)
    kernel.load_module(LAMP)
    kernel.unload_module("lamp")
    assert kernel.verify().holds
    raw.flip(location(kernel, LAMP_TEXT), 0x10)
    assert len(found(kernel, TEXT)) == 1


def test_a_field_that_nothing_was_written_to_yet_must_be_as_in_the_file(kernel: Kernel, raw: Raw) -> None:
    kernel.insmod(KLP_LAMP)
    raw.flip(location(kernel, LAMP_TEXT), 0x10)
    assert len(found(kernel, TEXT)) == 1


def test_relocations_that_are_forgotten_when_the_object_comes_are_found(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.insmod(KLP_LAMP)
    monkeypatch.setattr(klp_relocation, "klp_apply_section_relocs", lambda *arguments: None)
    kernel.load_module(LAMP)
    assert [each.what for each in found(kernel)] == [
        "R_X86_64_64 against .klp.sym.lamp.level,0 is not written",
        "R_X86_64_PLT32 against .klp.sym.lamp.glow,2 is not written",
        "R_X86_64_PC32 against .klp.sym.lamp.level,0 is not written",
        "R_X86_64_32S against .klp.sym.lamp.level,0 is not written",
    ]


def test_a_symbol_that_is_resolved_to_another_one_is_found(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_symbol = klp_relocation.resolve_symbol
    wrong = kernel.address_of("same_name,2")
    monkeypatch.setattr(
        klp_relocation,
        "resolve_symbol",
        lambda *arguments: wrong if arguments[1].name.sympos == 1 else resolve_symbol(*arguments),
    )
    kernel.insmod(KLP_LAMP)
    findings = found(kernel)
    right = kernel.address_of("same_name,1")
    assert [each.address for each in findings] == [
        location(kernel, VMLINUX_DATA),
        location(kernel, VMLINUX_TEXT),
    ]
    for each in findings:
        assert "against .klp.sym.vmlinux.same_name,1 is written for another address" in each.what
        assert (each.expected, each.found) == (right.to_bytes(8, "little"), wrong.to_bytes(8, "little"))


def test_a_sum_that_the_core_gets_wrong_is_found_in_text(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(klp_relocation.FIELDS, 2, (4, False))  # PC32 without its P
    kernel.insmod(KLP_LAMP)
    assert {each.symbol.partition("+")[0] for each in found(kernel, TEXT)} == {
        "livepatch_call_same_one",
        "livepatch_call_same_two",
    }


def test_a_relative_value_that_is_cut_off_is_a_finding_and_no_error(kernel: Kernel, tmp_path: Path) -> None:
    """Under #if 0 in __apply_relocate_add()."""
    kernel.insmod(Changed().entry(VMLINUX_TEXT, 1, addend=2**40).saved(tmp_path))
    (finding,) = found(kernel)
    assert finding.address == location(kernel, VMLINUX_TEXT, 1)
    assert "R_X86_64_PC32 against .klp.sym.vmlinux.twin,2 is cut off" in finding.what
    assert finding.symbol.startswith("livepatch_call_same_two+0x11/")
    assert found(kernel, TEXT) == []


@pytest.mark.parametrize(
    ("value", "findings"), [(2**31 - 1, 0), (2**31, 1), (-(2**31), 0), (-(2**31) - 1, 1)]
)
def test_a_relative_value_may_be_as_large_as_its_field(
    kernel: Kernel, tmp_path: Path, value: int, findings: int
) -> None:
    first = Kernel.load()
    first.insmod(KLP_LAMP)
    at = location(first, VMLINUX_TEXT, 1)
    addend = value - (first.address_of("twin,2") - at)
    kernel.insmod(Changed().entry(VMLINUX_TEXT, 1, addend=addend).saved(tmp_path))
    assert location(kernel, VMLINUX_TEXT, 1) == at
    assert len(found(kernel)) == findings


def test_a_field_outside_of_its_section_is_a_finding_and_no_error(kernel: Kernel, tmp_path: Path) -> None:
    """The entry for same_names[1] is moved to where level_at stands."""
    image = Changed().image
    kernel.insmod(KLP_LAMP)
    offset = location(kernel, LAMP_DATA) - location(kernel, VMLINUX_DATA)
    kernel.disable("klp_lamp")
    assert offset >= image.sections[section_of(image, VMLINUX_DATA).info].size
    kernel.insmod(Changed().entry(VMLINUX_DATA, 1, offset=offset).saved(tmp_path))
    (finding,) = found(kernel)
    assert finding.address == location(kernel, LAMP_DATA)
    symbol, section = ".klp.sym.vmlinux.same_name,2", ".data.same_names"
    assert finding.what == f"R_X86_64_64 against {symbol} lies outside of {section}, which has 0x10 bytes"


def test_a_section_for_an_object_that_is_not_patched_is_a_finding(kernel: Kernel, tmp_path: Path) -> None:
    name = ".klp.rela.damp..text.livepatch_lamp_light"
    kernel.insmod(Changed().section_name(LAMP_TEXT, name).saved(tmp_path))
    (finding,) = found(kernel)
    assert finding.what == f"{name} is never applied: the patch has no object 'damp'"
    assert finding.symbol.startswith("livepatch_lamp_light+0x0/")
