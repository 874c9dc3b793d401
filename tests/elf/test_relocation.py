"""Relocation: psABI table 4.10 at the exact borders, against ld, and the refusals of the kernel's loader."""

import re
from pathlib import Path

import pytest
from elf_writer import GLOBAL_NOTYPE, elf_file, module, rela
from objects import compiled, each_built, run

from elf.errors import ElfError, RelocationError
from elf.image import Image
from elf.relocation import (
    NAMES,
    R_X86_64_32,
    R_X86_64_32S,
    R_X86_64_64,
    R_X86_64_NONE,
    R_X86_64_PC32,
    R_X86_64_PC64,
    R_X86_64_PLT32,
    RULES,
    apply_relocations,
    relocations,
)

P = 0xFFFF_FFFF_A000_0000
FIELD = 4


def relocate(
    kind: int,
    value: int | None,
    addend: int = 0,
    *,
    offset: int = FIELD,
    text: bytes = bytes(16),
    index: int = 1,
    address: int = P,
) -> bytes:
    """The text after one relocation against symbol 's'."""
    data = module(text, rela((offset, kind, index, addend)), (("s", GLOBAL_NOTYPE, 0, 0, 0),))
    image = Image.parse(data, "m.ko")
    target = bytearray(text)
    apply_relocations(
        image, image.sections[2], target=target, target_address=address, symbol_values=[0, value]
    )
    return bytes(target)


def field(data: bytes, size: int, *, signed: bool = False) -> int:
    assert not any(data[:FIELD])
    assert not any(data[FIELD + size :])
    return int.from_bytes(data[FIELD : FIELD + size], "little", signed=signed)


@pytest.mark.parametrize(
    ("value", "addend"), [(0, 0), (2**64 - 1, 0), (2**63, 5), (8, -8), (2**64 - 1, 2), (0, -1), (3, -(2**63))]
)
def test_64_holds_s_plus_a_modulo_two_to_the_64(value: int, addend: int) -> None:
    """psABI: R_X86_64_64, word64, S + A."""
    assert field(relocate(R_X86_64_64, value, addend), 8) == (value + addend) % 2**64


@pytest.mark.parametrize(("value", "addend"), [(0, 0), (P + 2**40, 0), (P, -(2**62)), (2**64 - 1, 2**62)])
def test_pc64_holds_s_plus_a_minus_p_modulo_two_to_the_64(value: int, addend: int) -> None:
    """psABI: R_X86_64_PC64, word64, S + A - P."""
    assert field(relocate(R_X86_64_PC64, value, addend), 8) == (value + addend - P - FIELD) % 2**64


@pytest.mark.parametrize(("value", "addend"), [(0, 0), (2**32 - 1, 0), (2**32, -1), (2**64 - 1, 2), (1, -1)])
def test_32_holds_what_zero_extends_to_the_value(value: int, addend: int) -> None:
    """psABI: R_X86_64_32, word32, S + A; "the linker must verify ... zero-extends to the original value"."""
    assert field(relocate(R_X86_64_32, value, addend), 4) == (value + addend) % 2**64


@pytest.mark.parametrize(("value", "addend"), [(2**32, 0), (2**32 - 1, 1), (0, -1), (2**64 - 1, 0), (P, 0)])
def test_32_refuses_what_does_not_zero_extend(value: int, addend: int) -> None:
    with pytest.raises(RelocationError, match="overflow in relocation type 10 val"):
        relocate(R_X86_64_32, value, addend)


@pytest.mark.parametrize(
    ("value", "addend"),
    [(0, 0), (2**31 - 1, 0), (2**64 - 2**31, 0), (2**64 - 1, 0), (2**31, -1), (P, 8), (0, -5)],
)
def test_32s_holds_what_sign_extends_to_the_value(value: int, addend: int) -> None:
    """psABI: R_X86_64_32S, word32, S + A; sign-extends to the original value."""
    assert field(relocate(R_X86_64_32S, value, addend), 4, signed=True) % 2**64 == (value + addend) % 2**64


@pytest.mark.parametrize(("value", "addend"), [(2**31, 0), (2**31 - 1, 1), (2**64 - 2**31, -1), (2**63, 0)])
def test_32s_refuses_what_does_not_sign_extend(value: int, addend: int) -> None:
    with pytest.raises(RelocationError, match="overflow in relocation type 11 val"):
        relocate(R_X86_64_32S, value, addend)


@pytest.mark.parametrize("kind", [R_X86_64_PC32, R_X86_64_PLT32])
@pytest.mark.parametrize("distance", [0, 1, -1, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("address", [P, 0x1000, 2**64 - 32])
def test_pc32_and_plt32_reach_two_gib_either_way(kind: int, distance: int, address: int) -> None:
    """psABI: R_X86_64_PC32, word32, S + A - P; PLT32 is L + A - P, and kernel code has no PLT."""
    value = (address + FIELD + 4 + distance) % 2**64
    assert field(relocate(kind, value, -4, address=address), 4, signed=True) == distance


@pytest.mark.parametrize("kind", [R_X86_64_PC32, R_X86_64_PLT32])
@pytest.mark.parametrize("distance", [2**31, -(2**31) - 1, 2**63, 2**32])
def test_pc32_and_plt32_reach_no_further(kind: int, distance: int) -> None:
    with pytest.raises(
        RelocationError, match=f"overflow in relocation type {kind} val .*against 's'|'s': overflow"
    ):
        relocate(kind, (P + FIELD + 4 + distance) % 2**64, -4)


def test_none_changes_nothing() -> None:
    assert relocate(R_X86_64_NONE, 1234, 5, text=b"\xff" * 16) == b"\xff" * 16


@pytest.mark.parametrize("kind", [*sorted(set(NAMES) - set(RULES) - {R_X86_64_NONE}), 100])
def test_other_types_are_refused_by_name_section_and_offset(kind: int) -> None:
    """arch/x86/kernel/module.c, apply_relocate_add(): "Unknown rela relocation: %llu"."""
    with pytest.raises(
        RelocationError, match=rf"m\.ko: \.text\+0x4: .*: Unknown rela relocation: {kind}"
    ) as caught:
        relocate(kind, 0)
    assert NAMES.get(kind, f"type {kind}") in str(caught.value)


@pytest.mark.parametrize("kind", RULES)
def test_a_field_that_is_not_zero_is_refused(kind: int) -> None:
    """apply_relocate_add(): an "existing value" that is nonzero is an invalid relocation target."""
    size = RULES[kind].size
    for place in (FIELD, FIELD + size - 1):
        text = bytearray(16)
        text[place] = 1
        with pytest.raises(
            RelocationError, match=f"existing value is nonzero for type {kind}, loc {P + FIELD:#x}"
        ):
            relocate(kind, 0x10, text=bytes(text))
    for place in (FIELD - 1, FIELD + size):
        text = bytearray(16)
        text[place] = 1
        relocate(kind, P if RULES[kind].is_relative else 0x10, text=bytes(text))


@pytest.mark.parametrize("kind", RULES)
def test_a_field_must_be_inside_its_section(kind: int) -> None:
    value = P if RULES[kind].is_relative else 0
    last = 16 - RULES[kind].size
    relocate(kind, value, offset=last)
    for offset in (last + 1, 16, 2**31, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 4):
        with pytest.raises(RelocationError, match="outside the section of 0x10"):
            relocate(kind, value, offset=offset)


@pytest.mark.parametrize("kind", RULES)
def test_an_undefined_symbol_is_named(kind: int) -> None:
    with pytest.raises(RelocationError, match="against 's', which has no value"):
        relocate(kind, None)


@pytest.mark.parametrize("index", [2, 2**32 - 1])
def test_a_symbol_that_does_not_exist_is_refused(index: int) -> None:
    with pytest.raises(RelocationError, match=f"symbol {index} does not exist, there are 2"):
        relocate(R_X86_64_64, 0, index=index)


def test_a_target_of_another_size_is_refused() -> None:
    image = Image.parse(module(bytes(16), rela((0, 1, 0, 0)), ()))
    with pytest.raises(ElfError, match="0xf bytes and 1 symbol values given"):
        apply_relocations(image, image.sections[2], target=bytearray(15), target_address=0, symbol_values=[0])


@each_built
def test_relocations_are_those_that_readelf_lists(path: Path) -> None:
    image = Image.open(path)
    listed = re.findall(
        r"^([0-9a-f]{16})  ([0-9a-f]{16}) (R_X86_64_\w+)", run("readelf", "-rW", path), re.MULTILINE
    )
    ours = [
        (offset, index << 32 | kind, NAMES[kind])
        for section in image.sections
        if section.type == 4
        for offset, kind, index, _addend in relocations(image, section)
    ]
    assert ours == [(int(offset, 16), int(info, 16), name) for offset, info, name in listed]


def test_type_names_are_those_of_readelf(tmp_path: Path) -> None:
    (tmp_path / "all.o").write_bytes(module(bytes(8), rela(*[(0, kind, 0, 0) for kind in range(43)]), ()))
    names = re.findall(r"(R_X86_64_\w+|unrecognized: \w+)", run("readelf", "-rW", tmp_path / "all.o"))
    for kind, name in enumerate(names):
        # psABI: 39 and 40 are the withdrawn MPX types; readelf cuts long names off.
        assert NAMES[kind].startswith(name) or name.startswith("unrecognized"), kind
    assert len(names) == 43


def test_a_linked_object_is_what_ld_makes_of_it(tmp_path: Path) -> None:
    source = """
        extern int far_away; int here = 5, *pointer = &here + 3, *other = &far_away;
        static int table[4] = {1, 2, 3}; int elsewhere(int);
        int function(int i) { return elsewhere(table[i & 3]) + far_away + (long)&here; }
        int (*const functions[])(int) = {function, elsewhere};
    """
    path = compiled(tmp_path, source)
    image = Image.open(path)
    base = 0xFFFF_FFFF_8100_0000
    placed = {s.index: base + 0x1000 * s.index for s in image.sections if s.is_alloc}
    known = {"far_away": base + 0x10_0000, "elsewhere": base + 0x20_0000, "__fentry__": base + 0x30_0000}
    script = "".join(
        f"{image.sections[i].name} {address:#x} : {{ {path}({image.sections[i].name}) }}\n"
        for i, address in placed.items()
    )
    (tmp_path / "script").write_text(f"SECTIONS {{ {script} }}")
    defined = [f"--defsym={name}={value:#x}" for name, value in known.items()]
    run(
        "ld", "-T", tmp_path / "script", "-e0", "-z", "noexecstack", *defined, "-o", tmp_path / "linked", path
    )
    linked = Image.open(tmp_path / "linked")
    values = [
        (known[s.name] if s.name in known else placed.get(s.section, 0) + s.value) if s.index else 0
        for s in image.symbols
    ]
    checked = 0
    for index, address in placed.items():
        section, theirs = image.sections[index], linked.section(image.sections[index].name)
        for relocation_section in image.relocation_sections(section):
            target = bytearray(image.contents(section))
            apply_relocations(
                image, relocation_section, target=target, target_address=address, symbol_values=values
            )
            assert theirs is not None
            assert theirs.address == address
            assert target == linked.contents(theirs)
            checked += relocation_section.size // 24
    assert checked >= 8


def test_a_linked_image_is_not_relocated_again() -> None:
    image = Image.parse(elf_file(type=2))
    with pytest.raises(ElfError, match="only ET_REL"):
        apply_relocations(image, image.sections[0], target=bytearray(), target_address=0, symbol_values=[])
