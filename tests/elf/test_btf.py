"""BTF: its types by number and name, as written by hand and as bpftool shows it."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from btf_writer import BtfWriter
from elf_writer import Section, elf_file
from hypothesis import given
from hypothesis import strategies as st
from objects import compiled, run

from elf.btf import Btf, Kind, read_btf
from elf.btf_layout import BtfLayouts
from elf.errors import ElfError
from elf.image import Image
from elf.kernel_symbols import KernelSymbols

BASE = 0xFFFF_FFFF_824C_1B88
SOURCE = """
    enum state { FIRST, SECOND = 7 }; union word { int number; char bytes[4]; };
    typedef struct { int counter; } atomic_t; struct opaque;
    struct list { struct list *next; const volatile union word word; atomic_t count; enum state state;
                  unsigned low:3, high:29; struct opaque *opaque; int (*call)(struct list *, long); };
    struct list list; int function(struct list *list) { return list->low; }
"""


def written() -> BtfWriter:
    btf = BtfWriter()
    btf.integer("int", 4, encoding=1)
    btf.struct("list_head", 16, ("next", 3, 0), ("prev", 3, 64))
    btf.add(Kind.PTR, "", 2)
    btf.add(Kind.ENUM, "state", 4, *(btf.name("LIVE"), 0, btf.name("GONE"), 2**32 - 1), vlen=2, flag=True)
    wide = (btf.name("WIDE"), 1, 2)
    btf.add(Kind.ENUM64, "wide", 8, *wide, btf.name("LOW"), 2**32 - 2, 2**32 - 1, vlen=2, flag=True)
    btf.add(Kind.VAR, "variable", 1, 1)
    btf.add(Kind.DATASEC, ".data", 4, 6, 0, 4, vlen=1)
    btf.add(Kind.FUNC_PROTO, "", 1, btf.name("argument"), 3, vlen=1)
    btf.add(Kind.FUNC, "function", 8, vlen=1)
    btf.add(Kind.DECL_TAG, "tag", 6, -1)
    btf.add(Kind.TYPEDEF, "list_t", 2)
    btf.struct("list_head", 8, ("other", 1, 0))
    return btf


DATA = written().data()
BTF = Btf(DATA, "btf")


def test_every_kind_has_its_length() -> None:
    kinds = [BTF.kind(number) for number in range(BTF.count)]
    assert kinds == [
        *(Kind.VOID, Kind.INT, Kind.STRUCT, Kind.PTR, Kind.ENUM, Kind.ENUM64, Kind.VAR, Kind.DATASEC),
        *(Kind.FUNC_PROTO, Kind.FUNC, Kind.DECL_TAG, Kind.TYPEDEF, Kind.STRUCT),
    ]


def test_the_first_of_a_name_is_found() -> None:
    assert BTF.named[Kind.STRUCT, "list_head"] == 2
    assert BTF.named[Kind.TYPEDEF, "list_t"] == 11
    assert [member.name for member in BTF.members(2)] == ["next", "prev"]


def test_enumerators_have_their_values_with_their_signs() -> None:
    assert BTF.enumerators("state") == {"LIVE": 0, "GONE": -1}
    assert BTF.enumerators("wide") == {"WIDE": 1 | 2 << 32, "LOW": -2}
    with pytest.raises(ElfError, match="no enum nothing"):
        BTF.enumerators("nothing")


def test_split_btf_goes_on_where_its_base_ends() -> None:
    split = BtfWriter(first=BTF.count, string_base=BTF.string_end)
    pointer = split.add(Kind.PTR, "", 2)
    split.struct("of_module", 24, ("list", 2, 0), ("head", pointer, 128))
    split.add(Kind.TYPEDEF, "", pointer)
    btf = Btf(split.data(), "module", BTF)
    number = btf.named[Kind.STRUCT, "of_module"]
    assert number == BTF.count + 1
    assert [(m.name, m.type, m.bits) for m in btf.members(number)] == [("list", 2, 0), ("head", pointer, 128)]
    assert btf.name(btf.target(pointer)) == "list_head"
    assert BtfLayouts(btf)["of_module"].members["head"].offset == 16
    assert "list_head" in BtfLayouts(btf)


def test_btf_is_found_by_its_section_or_by_its_symbols() -> None:
    section = elf_file(Section(".BTF", DATA, address=BASE), type=2)
    merged = Image.parse(elf_file(Section(".rodata", bytes(8) + DATA + bytes(8), address=BASE), type=2))
    bounds = [("__start_BTF", "D", BASE + 8), ("__stop_BTF", "D", BASE + 8 + len(DATA))]
    assert read_btf(Image.parse(section)).count == BTF.count
    assert read_btf(merged, KernelSymbols.sorted(bounds)).count == BTF.count
    with pytest.raises(ElfError, match="no BTF; give an image with CONFIG_DEBUG_INFO_BTF=y"):
        read_btf(merged)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are no BTF"),
        (b"\x9f\xeb\x02" + DATA[3:], "magic 0xeb9f, version 2; expected 0xeb9f, 1"),
        (bytes(24), "magic 0x0, version 0"),
        (DATA[:-1], "bytes of strings at"),
        (DATA[:12] + b"\xff\xff\xff\x7f" + DATA[16:], "bytes of types at 0x18; BTF ends at"),
        (DATA[:12] + b"\x03\0\0\0" + DATA[16:], "0x3 bytes of types; expected whole words"),
        (DATA[:12] + b"\x0c\0\0\0" + DATA[16:], "the last type is cut off"),
        (DATA[:31] + b"\x1f" + DATA[32:], "type 1 is cut off or of an unknown kind"),
    ],
)
def test_what_is_no_btf_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ElfError, match=message):
        Btf(data, "btf")


def test_a_type_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ElfError, match=r"btf: type 99 does not exist, there are 13"):
        BTF.kind(99)


def test_the_types_of_gcc_are_those_that_bpftool_shows(tmp_path: Path) -> None:
    path = compiled(tmp_path, SOURCE, "-gbtf")
    shown = {
        entry["id"]: entry for entry in json.loads(run("bpftool", "-j", "btf", "dump", "file", path))["types"]
    }
    btf = read_btf(Image.open(path))
    assert btf.count == len(shown) + 1 > 10
    for number, entry in shown.items():
        assert btf.kind(number).name == entry["kind"]
        assert btf.name(number) == entry["name"].replace("(anon)", "")
        if "size" in entry:
            assert btf.size(number) == entry["size"]
        if "members" in entry:
            found = [(member.name, member.type, member.bits, member.width) for member in btf.members(number)]
            assert found == [
                (
                    member["name"].replace("(anon)", ""),
                    member["type_id"],
                    member["bits_offset"],
                    member.get("bitfield_size", 0),
                )
                for member in entry["members"]
            ]


@given(st.data())
def test_damaged_btf_is_read_or_refused(data: st.DataObject) -> None:
    damaged = bytearray(DATA)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.sampled_from([0, 1, 2, 4, 5, 13, 0x7F, 0x80, 0xFF, damaged[at] ^ 1]))
    with suppress(ElfError):
        layouts = BtfLayouts(Btf(bytes(damaged), "btf"))
        for name in list(layouts):
            with suppress(ElfError):
                layout = layouts[name]
                assert all(0 <= member.offset <= layout.size for member in layout.members.values())
        for kind, name in layouts.btf.named:
            if kind in (Kind.ENUM, Kind.ENUM64):
                layouts.btf.enumerators(name)
