"""Klp relocations: when they are written, what the code then does, and what is refused with which words.

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
    section_of,
)

from elf.errors import KlpemuError, RelocationError
from elf.klp_sections import klp_relocations
from elf.relocation import (
    R_X86_64_32,
    R_X86_64_32S,
    R_X86_64_64,
    R_X86_64_PC32,
    R_X86_64_PC64,
    R_X86_64_PLT32,
    RULES,
)
from emu.errno import KernelErrno
from emu.events import EventKind
from klpemu import Kernel
from patches.klp_relocation import FIELDS, overflows

EINVAL, ENOEXEC = "EINVAL", "ENOEXEC"
NONZERO = "x86/modules: Skipping invalid relocation target, existing value is nonzero"
GOT32 = 3

both = pytest.mark.parametrize("path", [KLP_LAMP, KPATCH_LAMP], ids=lambda path: path.stem)


def fields(kernel: Kernel, section: str, module: str = "klp_lamp") -> list[bytes]:
    """The bytes that a klp relocation section's entries stand for, as guest memory has them."""
    placement = kernel.machine.modules.objects[module].placement
    rela = section_of(placement.image, section)
    base = placement.addresses[rela.info]
    return [
        kernel.machine.space.read(base + each.offset, RULES[each.type].size if each.type else 8)
        for each in klp_relocations(placement.image, rela)
    ]


def are_zero(values: list[bytes]) -> bool:
    return not any(any(value) for value in values)


def trace_of(kernel: Kernel) -> dict[str, object]:
    """What a module that is refused could leave behind."""
    machine = kernel.machine
    return {
        "modules": list(machine.modules.objects),
        "slab": dict(machine.slab.live),
        "area": dict(machine.area.live),
        "symbols": list(machine.kallsyms.modules()),
        "records": {record.ip: record.flags for record in machine.ftrace.records},
        "list": machine.space.read(machine.vmlinux.symbols["modules"], 16),
        "enabled": [each.patch.name for each in kernel.enabled],
    }


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
    assert caught.value.name == ENOEXEC
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
    assert caught.value.name == ENOEXEC
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


def _copy(path: Path, target: Path, old: bytes, new: bytes) -> Path:
    target.write_bytes(path.read_bytes().replace(old, new))
    return target
