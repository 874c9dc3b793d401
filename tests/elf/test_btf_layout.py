"""Struct layouts from BTF: the same that DWARF gives, and what BTF alone can say."""

from pathlib import Path

import pytest
from btf_writer import BtfWriter
from objects import compiled, each_built, run
from test_layout import SOURCE

from elf.btf import Btf, Kind
from elf.btf_layout import BtfLayouts, btf_layouts
from elf.errors import ElfError
from elf.image import Image
from elf.layout import Array, Integer, Member, Pointer, StructLayout, StructRef, TypeRef, struct_layouts

INT, ULONG = Integer(4, True), Integer(8, False)


def flat(layout: StructLayout) -> StructLayout:
    """With arrays of arrays as one array: pahole writes `int a[3][4]` as 12 ints."""

    def of(kind: TypeRef) -> TypeRef:
        if isinstance(kind, Array) and isinstance(kind.element, Array):
            return of(Array(kind.element.element, kind.count * kind.element.count))
        return kind

    members = {
        name: Member(name, member.offset, of(member.type), member.bit_offset, member.bit_size)
        for name, member in layout.members.items()
    }
    return StructLayout(layout.name, layout.size, members)


def assert_agrees_with_dwarf(image: Image) -> None:
    expected, found = struct_layouts(image), btf_layouts(image)
    assert set(expected) >= set(found)
    assert {name: flat(found[name]) for name in expected} == {
        name: flat(layout) for name, layout in expected.items()
    }


def test_what_pahole_makes_of_dwarf_gives_the_same_layouts(tmp_path: Path) -> None:
    path = compiled(tmp_path, SOURCE, "-gdwarf-5")
    run("pahole", "-J", "--btf_gen_floats", path)
    assert_agrees_with_dwarf(Image.open(path))


@each_built
def test_the_built_objects_have_the_same_layouts_in_btf(path: Path, tmp_path: Path) -> None:
    if Image.open(path).section(".debug_info") is None:
        pytest.skip("it has no DWARF")
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    run("pahole", "-J", "--btf_gen_floats", copy)
    assert_agrees_with_dwarf(Image.open(copy))


def test_the_btf_of_gcc_gives_the_same_layouts_as_its_dwarf(tmp_path: Path) -> None:
    # gcc 12 turns the dimensions of arrays around and forgets the signs of enums.
    source = SOURCE.replace("grid[3][4]", "grid[12]").replace("MINUS = -1", "MINUS")
    expected = struct_layouts(Image.open(compiled(tmp_path, source, "-gdwarf-5")))
    found = btf_layouts(Image.open(compiled(tmp_path, source, "-gbtf")))
    assert {name: found[name] for name in expected} == expected
    assert len(found["everything"].members) > 30


def test_a_struct_without_a_name_is_found_with_the_one_around_it() -> None:
    btf = BtfWriter()
    number = btf.integer("int", 4, encoding=1)
    inner = btf.struct("", 4, ("deep", number, 0))
    outer = btf.struct("", 8, ("inner", inner, 32))
    rows = btf.array(outer, 2)
    btf.struct("top", 24, ("first", number, 0), ("rows", rows, 32))
    layouts = BtfLayouts(Btf(btf.data(), "btf"))
    assert layouts["top.rows.inner"] == StructLayout("top.rows.inner", 4, {"deep": Member("deep", 0, INT)})
    assert layouts["top"].members["rows"] == Member("rows", 4, Array(StructRef("top.rows"), 2))
    assert list(layouts) == ["top"]
    for missing in ("top.first", "top.rows.outer", "nothing.rows", "nothing", ""):
        assert missing not in layouts
        with pytest.raises(KeyError):
            layouts[missing]


def test_members_of_nameless_members_are_reached_by_their_own_names() -> None:
    btf = BtfWriter()
    number = btf.integer("unsigned long", 8)
    pair = btf.struct("", 16, ("a", number, 0), ("b", number, 64))
    either = btf.struct("", 16, ("", pair, 0), ("whole", number, 0), kind=Kind.UNION)
    qualified = btf.add(Kind.CONST, "", either)
    btf.struct("top", 24, ("head", number, 0), ("", qualified, 64))
    members = BtfLayouts(Btf(btf.data(), "btf"))["top"].members
    assert {name: member.offset for name, member in members.items()} == {
        "head": 0,
        "a": 8,
        "b": 16,
        "whole": 8,
    }


def test_bit_fields_are_read_in_the_new_form_and_in_the_old() -> None:
    new, old = BtfWriter(), BtfWriter()
    number = new.integer("unsigned int", 4)
    new.struct(
        "bits", 8, ("a", number, 3 << 24), ("b", number, 7 << 24 | 35), ("plain", number, 0), flag=True
    )
    three, seven = old.integer("unsigned int", 4, bits=3), old.integer("unsigned int", 4, bits=7, offset=3)
    number = old.integer("unsigned int", 4)
    old.struct("bits", 8, ("a", three, 0), ("b", seven, 32), ("plain", number, 0))
    word = Integer(4, False)
    for writer in (new, old):
        members = BtfLayouts(Btf(writer.data(), "btf"))["bits"].members
        assert list(members.values()) == [
            Member("a", 0, word, 0, 3),
            Member("b", 4, word, 3, 7),
            Member("plain", 0, word),
        ]


def test_pointers_name_the_struct_they_point_to() -> None:
    btf = BtfWriter()
    tagged = btf.add(Kind.TYPE_TAG, "rcu", btf.next + 1)
    known = btf.struct("known", 0)
    opaque = btf.add(Kind.FWD, "opaque")
    union = btf.add(Kind.FWD, "either", flag=True)
    nameless = btf.struct("", 0)
    typedef = btf.add(Kind.TYPEDEF, "named_t", nameless)
    prototype = btf.add(Kind.FUNC_PROTO)
    targets = {"tagged": tagged, "known": known, "opaque": opaque, "union": union, "nameless": nameless}
    targets |= {"typedef": typedef, "call": prototype, "any": 0}
    pointers = {name: btf.add(Kind.PTR, "", target) for name, target in targets.items()}
    btf.struct("top", 8, *((name, number, 0) for name, number in pointers.items()))
    layouts = BtfLayouts(Btf(btf.data(), "btf"))
    assert {name: member.type for name, member in layouts["top"].members.items()} == {
        "tagged": Pointer("known"), "known": Pointer("known"), "opaque": Pointer("opaque"),
        "union": Pointer("union either"), "nameless": Pointer(None), "typedef": Pointer("named_t"),
        "call": Pointer(None), "any": Pointer(None),
    }  # fmt: skip
    assert layouts["named_t"] == StructLayout("named_t", 0, {})


def test_numbers_have_their_sizes_and_signs() -> None:
    btf = BtfWriter()
    types = {
        "flag": btf.integer("_Bool", 1, encoding=4),
        "signed": btf.add(Kind.ENUM, "s", 4, vlen=0, flag=True),
        "plain": btf.add(Kind.ENUM, "p", 4),
        "wide": btf.add(Kind.ENUM64, "w", 8),
        "real": btf.add(Kind.FLOAT, "double", 8),
    }
    btf.struct("top", 8, *((name, number, 0) for name, number in types.items()))
    members = BtfLayouts(Btf(btf.data(), "btf"))["top"].members
    assert {name: member.type for name, member in members.items()} == {
        "flag": Integer(1, False, is_bool=True),
        "signed": INT,
        "plain": Integer(4, False),
        "wide": ULONG,
        "real": Array(Integer(1, False), 8),
    }


def test_the_first_of_two_structs_of_one_name_is_taken() -> None:
    btf = BtfWriter()
    btf.struct("twice", 8)
    btf.struct("twice", 16)
    btf.struct("twice", 24, kind=Kind.UNION)
    layouts = BtfLayouts(Btf(btf.data(), "btf"))
    assert (layouts["twice"].size, layouts["union twice"].size) == (8, 24)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((("a", 1, 0), ("a", 1, 0)), "'top' has two members 'a'"),
        ((("a", 1, 800),), "'top' has 8 bytes and 'a' at 100"),
        ((("a", 0, 0),), "'top.a' is of type 0, a VOID, which has no size"),
        ((("a", 2, 0),), "'top.a' is of type 2, a FWD"),
        ((("a", 77, 0),), "type 77 does not exist"),
        ((("a", 3, 0),), "type 3 refers to itself"),
        ((("", 4, 0),), "a struct contains itself"),
        ((("a", 5, 0),), "a struct contains itself"),
        ((("", 6, 0),), "a struct contains itself"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_asked_for(
    members: tuple[tuple[str, int, int], ...], message: str
) -> None:
    btf = BtfWriter()
    btf.integer("int", 4)
    btf.add(Kind.FWD, "opaque")
    btf.add(Kind.TYPEDEF, "circle", 3)
    btf.struct("", 8, ("", 4, 0))
    btf.array(5, 1)
    btf.struct("", 8, ("", 6, 0), ("", 6, 0))
    btf.struct("top", 8, *members)
    btf.struct("good", 4, ("number", 1, 0))
    layouts = BtfLayouts(Btf(btf.data(), "btf"))
    assert layouts["good"].size == 4
    with pytest.raises(ElfError, match=message):
        layouts["top"]


def test_structs_that_double_at_every_level_are_refused_soon() -> None:
    btf = BtfWriter()
    number = btf.struct("", 8)
    for _ in range(50):
        number = btf.struct("", 8, ("", number, 0), ("", number, 0))
    btf.struct("top", 8, ("", number, 0))
    with pytest.raises(ElfError, match="a struct contains itself, or has more members than any has"):
        BtfLayouts(Btf(btf.data(), "btf"))["top"]
