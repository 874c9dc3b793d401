"""Klp relocations that are refused: with which errno and which words, and that nothing stays.

The lines are those of kernel/livepatch/core.c and arch/x86/kernel/module.c.
"""

import random
from pathlib import Path

import pytest
from klp_modules import (
    KPATCH_LAMP,
    LAMP,
    LAMP_TEXT,
    VMLINUX_DATA,
    Changed,
    trace_of,
)

from elf.errors import KlpemuError, RelocationError
from elf.relocation import R_X86_64_32, R_X86_64_32S, R_X86_64_PC32, R_X86_64_PLT32, RULES
from emu.errno import KernelErrno
from klpemu import Kernel
from patches.klp_relocation import FIELDS, overflows

EINVAL, ENOEXEC = "EINVAL", "ENOEXEC"
NONZERO = "x86/modules: Skipping invalid relocation target, existing value is nonzero"
GOT32 = 3


def refused(
    kernel: Kernel, path: Path, error: type[KlpemuError] = KernelErrno
) -> tuple[KlpemuError, list[str]]:
    """Load a livepatch that must be refused without a trace; returns the error and the lines logged."""
    lines = len(kernel.log)
    before = trace_of(kernel)
    with pytest.raises(error) as caught:
        kernel.insmod(path)
    assert trace_of(kernel) == before
    assert kernel.verify().holds
    return caught.value, kernel.log[lines:]


def name_of(error: KlpemuError) -> str:
    assert isinstance(error, KernelErrno)
    return error.name


# What is refused when the livepatch is loaded.


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            ".klp.sym.vmlinux.same_name,1",
            ".klp.sym.vmlinux.same_nome,1",
            "symbol 'same_nome' not found in symbol table",
        ),
        (
            ".klp.sym.vmlinux.same_name,1",
            ".klp.sym.vmlinux.same_name,0",
            "unresolvable ambiguity for symbol 'same_name' in object '(null)'",
        ),
        (
            ".klp.sym.vmlinux.same_name,1",
            ".klp.sym.vmlinux.same_name,3",
            "symbol position 3 for symbol 'same_name' in object 'vmlinux' not found",
        ),
        (
            ".klp.sym.vmlinux.same_name,1",
            ".klp.sym.vmlinux.same_name;1",
            "symbol .klp.sym.vmlinux.same_name;1 has an incorrectly formatted name",
        ),
    ],
)
def test_a_symbol_that_vmlinux_does_not_have_refuses_the_livepatch(
    kernel: Kernel, tmp_path: Path, old: str, new: str, message: str
) -> None:
    error, log = refused(kernel, Changed().symbol_name(old, new).saved(tmp_path))
    assert name_of(error) == EINVAL
    assert log == [f"livepatch: {message}"]


def test_a_symbol_that_is_not_marked_refuses_the_livepatch(kernel: Kernel, tmp_path: Path) -> None:
    name = ".klp.sym.vmlinux.div_errors,0"
    error, log = refused(kernel, Changed(KPATCH_LAMP).symbol_section(name, 0xFFF1).saved(tmp_path))
    assert name_of(error) == EINVAL
    assert log == [f"livepatch: symbol {name} is not marked as a livepatch symbol"]


def test_a_section_that_names_no_object_refuses_the_livepatch(kernel: Kernel, tmp_path: Path) -> None:
    name = ".klp.rela..amp..text.livepatch_lamp_light"
    error, log = refused(kernel, Changed().section_name(LAMP_TEXT, name).saved(tmp_path))
    assert name_of(error) == EINVAL
    assert log == [f"livepatch: section {name} has an incorrectly formatted name"]


def test_a_field_that_is_not_zero_refuses_the_livepatch(kernel: Kernel, tmp_path: Path) -> None:
    path = Changed().contents(".data.same_names", 8, b"\1").saved(tmp_path)
    error, (line,) = refused(kernel, path)
    assert name_of(error) == ENOEXEC
    assert line.startswith(f"{NONZERO} for type 1, loc ffffffffc")
    assert line.endswith(f", val {kernel.address_of('same_name,2'):x}")


def test_the_value_shown_of_a_relative_one_is_not_relative_yet(kernel: Kernel, tmp_path: Path) -> None:
    """The jump to invalid_relocation stands before `val -= (u64)loc`."""
    path = Changed().contents(".text.livepatch_call_same_two", 0xA, b"\1").saved(tmp_path)
    _, (line,) = refused(kernel, path)
    assert line.endswith(f", val {kernel.address_of('same_name,1') - 4:x}")


def test_a_type_that_the_kernel_does_not_know_refuses_the_livepatch(kernel: Kernel, tmp_path: Path) -> None:
    error, log = refused(kernel, Changed().entry(VMLINUX_DATA, 1, type=GOT32).saved(tmp_path))
    assert name_of(error) == ENOEXEC
    assert log == ["klp_lamp: Unknown rela relocation: 3"]


@pytest.mark.parametrize(("type", "addend"), [(R_X86_64_32S, 2**32), (R_X86_64_32, 0)])
def test_an_absolute_value_that_does_not_fit_refuses_the_livepatch(
    kernel: Kernel, tmp_path: Path, type: int, addend: int
) -> None:
    path = Changed().entry(VMLINUX_DATA, 1, type=type, addend=addend).saved(tmp_path)
    error, log = refused(kernel, path)
    value = (kernel.address_of("same_name,2") + addend) % 2**64
    assert name_of(error) == ENOEXEC
    assert log == [
        f"overflow in relocation type {type} val {value:x}",
        "`klp_lamp' likely not compiled with -mcmodel=kernel",
    ]


@pytest.mark.parametrize(
    ("type", "value", "is_too_large"),
    [
        (R_X86_64_32, 0xFFFF_FFFF, False),
        (R_X86_64_32, 0x1_0000_0000, True),
        (R_X86_64_32S, 0x7FFF_FFFF, False),
        (R_X86_64_32S, 0x8000_0000, True),
        (R_X86_64_32S, 0xFFFF_FFFF_7FFF_FFFF, True),
        (R_X86_64_32S, 0xFFFF_FFFF_8000_0000, False),
        (R_X86_64_PC32, 0x1_0000_0000, False),  # #if 0 in the kernel
        (R_X86_64_PLT32, 0x1_0000_0000, False),
    ],
)
def test_two_types_are_checked_and_a_relative_value_is_not(type: int, value: int, is_too_large: bool) -> None:
    assert overflows(type, value) is is_too_large


def test_the_fields_are_those_of_the_psabi() -> None:
    assert {type: (rule.size, rule.is_relative) for type, rule in RULES.items()} == FIELDS


@pytest.mark.parametrize("offset", [1 << 40, -(1 << 40) % 2**64])
def test_a_field_outside_of_the_module_is_an_error_of_ours(
    kernel: Kernel, tmp_path: Path, offset: int
) -> None:
    path = Changed().entry(VMLINUX_DATA, 1, offset=offset).saved(tmp_path)
    error, log = refused(kernel, path, RelocationError)
    assert "is in no section of the module" in error.what
    assert VMLINUX_DATA in error.where
    assert log == []


def test_a_late_section_that_is_not_kept_in_memory_is_an_error_of_ours(
    kernel: Kernel, tmp_path: Path
) -> None:
    """copy_module_elf() keeps the address at which the file was read, which is freed."""
    error, log = refused(kernel, Changed().flags(LAMP_TEXT, 0x00100040).saved(tmp_path), RelocationError)
    assert "freed memory" in error.what
    assert log == []


def test_a_section_for_vmlinux_may_be_gone_after_the_load(kernel: Kernel, tmp_path: Path) -> None:
    kernel.insmod(Changed().flags(VMLINUX_DATA, 0x00100040).saved(tmp_path))
    assert kernel.call("call_same_one", 1) == 7201
    kernel.verify().raise_for_findings()


def test_a_section_for_vmlinux_that_applies_to_nothing_in_memory_is_passed_over(
    kernel: Kernel, tmp_path: Path
) -> None:
    """apply_relocations(): "Don't bother with non-allocated sections"."""
    kernel.insmod(Changed().target(VMLINUX_DATA, ".comment").saved(tmp_path))
    assert kernel.call("call_same_two", 1) == 5108
    (finding,) = kernel.verify().findings
    assert finding.what == f"{VMLINUX_DATA} is never applied: .comment is not in the module's memory"


# What is refused when the object is there.


def test_a_reference_to_vmlinux_in_a_section_for_a_module_refuses_the_patch(
    kernel: Kernel, tmp_path: Path
) -> None:
    kernel.load_module(LAMP)
    path = Changed().symbol_name(".klp.sym.lamp.glow,2", ".klp.sym.vmlinux.x,0").saved(tmp_path)
    error, log = refused(kernel, path)
    assert name_of(error) == EINVAL
    assert log == [
        "livepatch: invalid access to vmlinux symbol 'x' from module-specific livepatch relocation section"
    ]


def test_a_symbol_that_the_module_does_not_have_refuses_the_patch_if_it_is_there(
    kernel: Kernel, tmp_path: Path
) -> None:
    kernel.load_module(LAMP)
    path = Changed().symbol_name(".klp.sym.lamp.glow,2", ".klp.sym.lamp.glow,3").saved(tmp_path)
    error, log = refused(kernel, path)
    assert name_of(error) == EINVAL
    assert log == ["livepatch: symbol position 3 for symbol 'glow' in object 'lamp' not found"]
    assert kernel.call("lamp:lamp_light", 1) == 1 + 1000 + 40


def test_a_symbol_that_the_module_does_not_have_refuses_the_module_if_it_comes_later(
    kernel: Kernel, tmp_path: Path
) -> None:
    path = Changed().symbol_name(".klp.sym.lamp.glow,2", ".klp.sym.lamp.glow,3").saved(tmp_path)
    kernel.insmod(path)
    lines, before = len(kernel.log), list(kernel.machine.modules.objects)
    with pytest.raises(KernelErrno) as caught:
        kernel.load_module(LAMP)
    assert caught.value.name == EINVAL
    assert kernel.log[lines:] == [
        "livepatch: symbol position 3 for symbol 'glow' in object 'lamp' not found",
        "livepatch: failed to initialize patch 'klp_lamp' for module 'lamp' (-22)",
        "livepatch: patch 'klp_lamp' failed for module 'lamp', refusing to load module 'lamp'",
    ]
    assert list(kernel.machine.modules.objects) == before
    assert kernel.call("call_same_two", 1) == 5108
    kernel.verify().raise_for_findings()


def test_a_symbol_of_a_third_module_must_be_there_too(kernel: Kernel, tmp_path: Path) -> None:
    """klp_apply_section_relocs(): "or one of its module dependencies"."""
    path = Changed().symbol_name(".klp.sym.lamp.glow,2", ".klp.sym.damp.glow,2").saved(tmp_path)
    kernel.insmod(path)
    with pytest.raises(KernelErrno, match="symbol 'glow' not found in symbol table"):
        kernel.load_module(LAMP)
    kernel.load_module(_copy(LAMP, tmp_path / "damp.ko", b"lamp", b"damp"))
    kernel.disable("klp_lamp")
    kernel.insmod(path)
    kernel.load_module(LAMP)
    assert kernel.call("lamp:lamp_light", 1) == 1 + 2000 + 40 + 40
    kernel.verify().raise_for_findings()


@pytest.mark.parametrize(("seed", "count"), [(1, 30), pytest.param(2, 500, marks=pytest.mark.slow)])
def test_damaged_klp_relocations_are_refused_whole_or_written(tmp_path: Path, seed: int, count: int) -> None:
    """Random bytes in the entries, the names and the headers: an error, or the kernel goes on working."""
    chance = random.Random(seed)
    sections = [section for section in Changed().image.sections if section.is_klp_relocation]
    refusals = 0
    for _ in range(count):
        damaged, section = Changed(), chance.choice(sections)
        match chance.choice(("entry", "name", "header")):
            case "entry":
                damaged.contents(section.name, chance.randrange(section.size), chance.randbytes(1))
            case "name":
                damaged.contents(".strtab", chance.randrange(0x200, 0x290), chance.randbytes(1))
            case "header":
                damaged.header(section.name, chance.randrange(64), chance.randbytes(1))
        kernel = Kernel.load()
        kernel.load_module(LAMP)
        before = trace_of(kernel)
        error = ""
        try:
            kernel.insmod(damaged.saved(tmp_path))
        except KlpemuError as raised:
            error = str(raised)
        if error:
            refusals += 1
            assert "\n" not in error
            assert trace_of(kernel) == before
            assert kernel.call("lamp:lamp_light", 1) == 1041
        else:
            kernel.disable("klp_lamp")
        kernel.verify().raise_for_findings()
    assert 0 < refusals < count


def _copy(path: Path, target: Path, old: bytes, new: bytes) -> Path:
    target.write_bytes(path.read_bytes().replace(old, new))
    return target
