"""Fentry sites: against objdump on real objects, and each kind of site and table written byte by byte."""

import re
from pathlib import Path
from struct import pack

import pytest
from elf_writer import (
    ALLOC,
    EXEC,
    GLOBAL_FUNC,
    GLOBAL_NOTYPE,
    LOCAL_SECTION,
    SHT_NOBITS,
    SHT_NULL,
    SHT_RELA,
    SHT_STRTAB,
    SHT_SYMTAB,
    Section,
    elf_file,
    module,
    rela,
    symbols,
)
from objects import compiled, each_built, run

from elf.errors import ElfError
from elf.image import Image
from elf.kernel_symbols import KernelSymbols
from elf.mcount import SiteKind, fentry_sites, function_names, functions_at, patchable_sites

CALL = bytes.fromhex("e800000000")
NOP5 = bytes.fromhex("0f1f440000")
SECTION, FENTRY, FUNCTION = 1, 2, 3


def object_with_sites(
    text: bytes,
    text_rela: bytes = b"",
    places: tuple[tuple[int, int], ...] = ((SECTION, 0),),
    *,
    table: str = "__mcount_loc",
    functions: tuple[tuple[str, int, int, int, int], ...] = (("f", GLOBAL_FUNC, 1, 0, 5),),
) -> Image:
    """An object whose site table has one R_X86_64_64 for each (symbol index, addend) of `places`."""
    named = (("", LOCAL_SECTION, 1, 0, 0), ("__fentry__", GLOBAL_NOTYPE, 0, 0, 0), *functions)
    entries = rela(*[(8 * i, 1, index, addend) for i, (index, addend) in enumerate(places)])
    return Image.parse(
        module(
            text,
            text_rela,
            named,
            Section(table, bytes(8 * len(places)), alignment=8),
            Section(f".rela{table}", entries, SHT_RELA, 0, link=3, info=5, entry_size=24),
        ),
        "m.ko",
    )


@pytest.mark.parametrize("kind", [2, 4])
def test_a_call_with_a_relocation_against_fentry_is_a_call_site(kind: int) -> None:
    (site,) = fentry_sites(object_with_sites(CALL, rela((1, kind, FENTRY, -4))))
    assert (site.section, site.offset, site.address, site.code) == (1, 0, 0, CALL)
    assert (site.kind, site.reason) == (SiteKind.CALL, "")


def test_a_five_byte_nop_is_a_nop5_site() -> None:
    (site,) = fentry_sites(object_with_sites(NOP5))
    assert (site.kind, site.reason) == (SiteKind.NOP5, "")


@pytest.mark.parametrize(
    ("text", "text_rela", "reason"),
    [
        (CALL, b"", "the call has no relocation"),
        (CALL, rela((1, 2, FUNCTION, -4)), "relocated by R_X86_64_PC32 against 'f' -4"),
        (CALL, rela((1, 2, FENTRY, 0)), "relocated by R_X86_64_PC32 against '__fentry__' +0"),
        (CALL, rela((1, 11, FENTRY, -4)), "relocated by R_X86_64_32S against '__fentry__' -4"),
        (CALL, rela((2, 2, FENTRY, -4)), "relocated by R_X86_64_PC32 against '__fentry__' -4"),
        (NOP5, rela((4, 2, FUNCTION, -4)), "relocated by R_X86_64_PC32 against 'f' -4"),
        (b"\x90" * 5, b"", "five single-byte NOPs: a task can be preempted between them"),
        (bytes.fromhex("0f18240000"), b"", "0f 18 24 00 00 is neither call __fentry__ nor a five-byte NOP"),
        (bytes.fromhex("e900000000"), rela((1, 2, FENTRY, -4)), "is neither"),
    ],
)
def test_whatever_else_stands_at_a_site_is_refused_with_its_reason(
    text: bytes, text_rela: bytes, reason: str
) -> None:
    (site,) = fentry_sites(object_with_sites(text, text_rela))
    assert site.kind is SiteKind.OTHER
    assert reason in site.reason


def test_sites_keep_the_order_of_the_table_and_may_be_named_by_any_symbol() -> None:
    functions = (("f", GLOBAL_FUNC, 1, 5, 10),)
    image = object_with_sites(
        NOP5 * 3, places=((SECTION, 10), (FUNCTION, 0), (SECTION, 0)), functions=functions
    )
    assert [site.offset for site in fentry_sites(image)] == [10, 5, 0]


@pytest.mark.parametrize("addend", [-10, -1, 11, 15, 2**62])
def test_a_site_outside_its_section_is_refused(addend: int) -> None:
    with pytest.raises(ElfError, match="__mcount_loc"):
        fentry_sites(object_with_sites(NOP5 * 3, places=((SECTION, addend),)))


def test_a_site_named_by_an_undefined_symbol_is_refused() -> None:
    with pytest.raises(ElfError, match=r"__mcount_loc\+0x0: '__fentry__' \+0x0 is in no section"):
        fentry_sites(object_with_sites(NOP5, places=((FENTRY, 0),)))


def table_object(contents: bytes, entries: bytes, type: int = 1) -> Image:
    named = (("", LOCAL_SECTION, 1, 0, 0),)
    return Image.parse(
        module(
            NOP5,
            b"",
            named,
            Section("__mcount_loc", contents, type),
            Section(".rela", entries, SHT_RELA, 0, link=3, info=5, entry_size=24),
        )
    )


def test_a_null_entry_without_relocation_is_skipped() -> None:
    """kernel/trace/ftrace.c, ftrace_process_locs(): "Skip any NULL pointers", linkers pad with them."""
    sites = fentry_sites(table_object(bytes(24), rela((8, 1, 1, 0))))
    assert [site.offset for site in sites] == [0]


@pytest.mark.parametrize(
    ("contents", "entries", "message"),
    [
        (pack("<Q", 5), b"", r"entry \+0x0 is 0x5, which has no relocation"),
        (bytes(8), rela((0, 2, 1, 0)), "R_X86_64_PC32 here; expected R_X86_64_64"),
        (bytes(8), rela((4, 1, 1, 0)), "expected R_X86_64_64, one an entry"),
        (bytes(8), rela((8, 1, 1, 0)), "expected R_X86_64_64, one an entry"),
        (bytes(8), rela((0, 1, 9, 0)), "symbol 9 does not exist, there are 2"),
        (bytes(12), b"", "0xc bytes are no table of addresses"),
    ],
)
def test_a_table_that_is_no_table_is_refused(contents: bytes, entries: bytes, message: str) -> None:
    with pytest.raises(ElfError, match=message):
        fentry_sites(table_object(contents, entries))


def test_an_object_without_a_table_has_no_sites() -> None:
    assert fentry_sites(Image.parse(module(NOP5, b"", ()))) == []
    for type_ in (SHT_NULL, SHT_NOBITS):
        assert fentry_sites(Image.parse(elf_file(Section("__mcount_loc", type=type_, size=2**60)))) == []


TEXT_AT = 0xFFFF_FFFF_8100_0000


def linked(text: bytes, *entries: tuple[str, int], type: int = 2, more: tuple[Section, ...] = ()) -> Image:
    """1 `.text` at TEXT_AT, 2 `.symtab`, 3 `.strtab`, then `more`; symbols are (name, address)."""
    table, strings = symbols(*[(name, GLOBAL_NOTYPE, 1, address, 0) for name, address in entries])
    return Image.parse(
        elf_file(
            Section(".text", text, flags=ALLOC | EXEC, address=TEXT_AT),
            Section(".symtab", table, SHT_SYMTAB, 0, link=3, entry_size=24),
            Section(".strtab", strings, SHT_STRTAB, 0),
            *more,
            type=type,
        )
    )


def call_from(offset: int, callee: int) -> bytes:
    return b"\xe8" + pack("<i", callee - (TEXT_AT + offset + 5))


def test_a_linked_call_is_judged_by_where_it_goes() -> None:
    text = call_from(0, TEXT_AT + 0x100) + call_from(5, TEXT_AT + 0x101) + NOP5
    table = Section("__mcount_loc", pack("<3Q", TEXT_AT, TEXT_AT + 5, TEXT_AT + 10))
    sites = fentry_sites(linked(text, ("__fentry__", TEXT_AT + 0x100), more=(table,)))
    assert [site.address for site in sites] == [TEXT_AT, TEXT_AT + 5, TEXT_AT + 10]
    assert [site.offset for site in sites] == [0, 5, 10]
    assert [site.kind for site in sites] == [SiteKind.CALL, SiteKind.OTHER, SiteKind.NOP5]
    assert sites[1].reason == "calls 0xffffffff81000101, which is not __fentry__"


def test_a_linked_call_cannot_be_judged_without_fentry() -> None:
    (site,) = fentry_sites(linked(CALL, more=(Section("__mcount_loc", pack("<Q", TEXT_AT)),)))
    assert site.kind is SiteKind.OTHER
    assert "no symbol __fentry__" in site.reason


def test_vmlinux_has_its_table_between_two_symbols() -> None:
    """include/asm-generic/vmlinux.lds.h, MCOUNT_REC: the table is a part of .init.data."""
    data_at = TEXT_AT + 0x1000
    holder = Section(".init.data", pack("<4Q", 99, TEXT_AT + 5, TEXT_AT, 99), address=data_at)
    bounds = (("__start_mcount_loc", data_at + 8), ("__stop_mcount_loc", data_at + 24))
    sites = fentry_sites(linked(NOP5 * 2, *bounds, more=(holder,)))
    assert [site.offset for site in sites] == [5, 0]
    beyond = (bounds[0], ("__stop_mcount_loc", data_at + 40))
    with pytest.raises(ElfError, match=r"__start_mcount_loc to __stop_mcount_loc: .* is in no section"):
        fentry_sites(linked(NOP5 * 2, *beyond, more=(holder,)))


def test_a_stripped_vmlinux_has_its_table_where_the_symbols_given_say() -> None:
    data_at = TEXT_AT + 0x1000
    holder = Section(".init.data", pack("<4Q", 99, TEXT_AT, TEXT_AT + 5, 99), address=data_at)
    image = linked(call_from(0, TEXT_AT + 0x40) + call_from(5, TEXT_AT), more=(holder,))
    given = KernelSymbols.sorted(
        [
            ("__fentry__", "T", TEXT_AT + 0x40),
            ("__start_mcount_loc", "D", data_at + 8),
            ("__stop_mcount_loc", "D", data_at + 24),
        ]
    )
    assert fentry_sites(image) == []
    assert [site.kind for site in fentry_sites(image, given)] == [SiteKind.CALL, SiteKind.OTHER]


@pytest.mark.parametrize(
    ("contents", "entries"),
    [
        (bytes(8), rela((TEXT_AT + 0x1000, 8, 0, TEXT_AT + 5 - 2**64))),  # R_X86_64_RELATIVE
        (bytes(8), rela((TEXT_AT + 0x1000, 1, 1, 1))),  # R_X86_64_64
        (pack("<Q", TEXT_AT + 5), b""),  # RELR
    ],
)
def test_a_shared_object_has_its_table_in_dynamic_relocations(contents: bytes, entries: bytes) -> None:
    """psABI: R_X86_64_RELATIVE is B + A; with RELR the address stands in the table."""
    table = Section("__mcount_loc", contents, address=TEXT_AT + 0x1000)
    dynamic = Section(".rela.dyn", entries, SHT_RELA, ALLOC, link=2, entry_size=24)
    (site,) = fentry_sites(linked(NOP5 * 2, ("f", TEXT_AT + 4), type=3, more=(table, dynamic)))
    assert (site.address, site.kind) == (TEXT_AT + 5, SiteKind.NOP5)


def test_a_linked_site_in_no_section_is_refused() -> None:
    with pytest.raises(ElfError, match=r"__mcount_loc: entry \+0x0 is 0x10, which is in no section"):
        fentry_sites(linked(NOP5, more=(Section("__mcount_loc", pack("<Q", 0x10)),)))


def test_patchable_function_entries_are_padding() -> None:
    image = object_with_sites(b"\x90" * 3, table="__patchable_function_entries")
    (site,) = patchable_sites(image)
    assert (site.kind, site.code) == (SiteKind.PADDING, b"\x90" * 3)
    assert fentry_sites(image) == []
    with pytest.raises(ElfError, match=r"__patchable_function_entries -> \.text"):
        patchable_sites(object_with_sites(b"", table="__patchable_function_entries"))


def test_a_site_has_the_names_of_all_functions_that_cover_it() -> None:
    functions = (
        ("outer", GLOBAL_FUNC, 1, 0, 20),
        ("f", GLOBAL_FUNC, 1, 5, 5),
        ("alias", GLOBAL_FUNC, 1, 5, 5),
        ("data", GLOBAL_NOTYPE, 1, 5, 5),
        ("elsewhere", GLOBAL_FUNC, 5, 5, 5),
    )
    places = ((SECTION, 20), (SECTION, 9), (SECTION, 5), (SECTION, 10), (SECTION, 4))
    image = object_with_sites(NOP5 * 5, places=places, functions=functions)
    sites = fentry_sites(image)
    assert function_names(image, sites) == [
        (),
        ("outer", "f", "alias"),
        ("outer", "f", "alias"),
        ("outer",),
        ("outer",),
    ]
    offsets = [
        [site.address - function.value for function in found]
        for site, found in zip(sites, functions_at(image, sites), strict=True)
    ]
    assert offsets == [[], [9, 4, 4], [5, 0, 0], [10], [4]]


def test_a_function_without_size_reaches_to_the_next() -> None:
    functions = (("a", GLOBAL_FUNC, 1, 0, 0), ("b", GLOBAL_FUNC, 1, 5, 5), ("c", GLOBAL_FUNC, 1, 10, 0))
    image = object_with_sites(
        NOP5 * 3, places=((SECTION, 4), (SECTION, 5), (SECTION, 10)), functions=functions
    )
    assert function_names(image, fentry_sites(image)) == [("a",), ("b",), ()]


@each_built
def test_call_sites_are_the_fentry_calls_that_objdump_shows(path: Path) -> None:
    image = Image.open(path)
    shown, section = set(), ""
    for line in run("objdump", "-drw", path).splitlines():
        if start := re.match(r"Disassembly of section (.*):$", line):
            section = start[1]
        if call := re.match(
            r"\s*([0-9a-f]+):\s+e8 00 00 00 00\s.*R_X86_64_P(?:LT|C)32\s+__fentry__-0x4", line
        ):
            shown.add((section, int(call[1], 16)))
    sites = fentry_sites(image)
    calls = {(image.sections[s.section].name, s.offset) for s in sites if s.kind is SiteKind.CALL}
    assert calls <= shown
    if all(site.kind is SiteKind.CALL for site in sites) and sites:
        assert calls == shown


SOURCE = """
    static __attribute__((noinline)) int one(int a) { return a + 1; }
    int two(int a) { return one(a) * 2; }
    int also_two(int a) __attribute__((alias("two")));
    __attribute__((section(".init.text"))) int three(int a) { return two(a); }
"""


@pytest.mark.parametrize(
    ("flags", "kind"),
    [((), SiteKind.CALL), (("-mnop-mcount",), SiteKind.NOP5), (("-ffunction-sections",), SiteKind.CALL)],
)
def test_every_compiled_function_has_its_site(tmp_path: Path, flags: tuple[str, ...], kind: SiteKind) -> None:
    image = Image.open(compiled(tmp_path, SOURCE, *flags))
    sites = fentry_sites(image)
    assert {site.kind for site in sites} == {kind}
    assert sorted(map(sorted, function_names(image, sites))) == [["also_two", "two"], ["one"], ["three"]]
