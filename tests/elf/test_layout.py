"""Struct layouts: against gdb, and what each C declaration becomes."""

import re
from pathlib import Path

import pytest
from elf_writer import Section, elf_file
from objects import compiled, each_built, run

from elf.errors import ElfError
from elf.image import Image
from elf.layout import Array, Integer, Member, Pointer, StructRef, struct_layouts

SOURCE = """
typedef struct { int counter; } atomic_t; typedef atomic_t my_atomic_t;
typedef unsigned long ulong_t; typedef const volatile ulong_t quantity;
struct list_head { struct list_head *next, *prev; };
struct incomplete; enum sign { MINUS = -1, PLUS }; enum plain { X, Y };
union either { int number; char bytes[7]; };
struct everything {
    char c; _Bool flag; short s; unsigned low:3, middle:7; int high:5; long l;
    struct list_head list, *list_pointer; void (*function)(int); void *any; const struct incomplete *opaque;
    union either either, *either_pointer; enum sign sign; enum plain plain; quantity quantity;
    my_atomic_t atomic; atomic_t *atomic_pointer;
    struct { int inner; unsigned nested:3; union { long a; struct { char b0, b1; }; }; };
    struct { int z; struct { int k; } deep; } named;
    int grid[3][4]; struct list_head lists[2]; struct { int m; } row[5];
    double real; unsigned long long big; __int128 huge; int none[0]; const char *text;
    struct everything **twice; int tail; char flexible[];
};
struct packed { char a; int b:20; long c:40; } __attribute__((packed));
struct everything everything; struct packed packed;
int function(void) { struct everything { int other; } local = {1}; return local.other; }
"""
INT, ULONG, CHAR = Integer(4, True), Integer(8, False), Integer(1, True)
EXPECTED = {
    "c": CHAR, "flag": Integer(1, False, is_bool=True), "s": Integer(2, True),
    "l": Integer(8, True), "list": StructRef("list_head"), "list_pointer": Pointer("list_head"),
    "function": Pointer(None), "any": Pointer(None), "opaque": Pointer("incomplete"),
    "either": StructRef("union either"), "either_pointer": Pointer("union either"), "sign": INT,
    "plain": Integer(4, False), "quantity": ULONG, "atomic": StructRef("atomic_t"),
    "atomic_pointer": Pointer("atomic_t"), "inner": INT, "a": Integer(8, True), "b0": CHAR,
    "b1": CHAR, "named": StructRef("everything.named"), "grid": Array(Array(INT, 4), 3),
    "lists": Array(StructRef("list_head"), 2), "row": Array(StructRef("everything.row"), 5),
    "real": Array(Integer(1, False), 8), "big": ULONG, "huge": Integer(16, True),
    "none": Array(INT, 0), "text": Pointer(None), "twice": Pointer(None), "tail": INT,
    "flexible": Array(CHAR, 0),
}  # fmt: skip
DWARF = pytest.mark.parametrize("flags", ["-gdwarf-4", "-gdwarf-5", "-gdwarf-5 -gz=zlib", "-gdwarf-4 -O2"])


@DWARF
def test_every_kind_of_member_has_its_type(tmp_path: Path, flags: str) -> None:
    layouts = struct_layouts(Image.open(compiled(tmp_path, SOURCE, *flags.split())))
    members = layouts["everything"].members
    assert {name: member.type for name, member in members.items() if not member.bit_size} == EXPECTED
    assert members["low"] == Member("low", 4, Integer(4, False), 0, 3)
    assert members["middle"] == Member("middle", 4, Integer(4, False), 3, 7)
    assert members["high"] == Member("high", 4, INT, 10, 5)
    assert members["nested"] == Member("nested", members["inner"].offset + 4, Integer(4, False), 0, 3)
    assert members["b1"].offset == members["a"].offset + 1
    assert layouts["everything.named.deep"].members["k"] == Member("k", 0, INT)
    assert layouts["union either"].size == 8
    assert layouts["my_atomic_t" if "my_atomic_t" in layouts else "atomic_t"].members["counter"].type == INT
    assert "incomplete" not in layouts


@DWARF
def test_a_packed_bit_field_may_cross_words(tmp_path: Path, flags: str) -> None:
    members = struct_layouts(Image.open(compiled(tmp_path, SOURCE, *flags.split())))["packed"].members
    assert 8 * members["b"].offset + members["b"].bit_offset == 8
    assert members["c"] == Member("c", 3, Integer(8, True), 4, 40)


def gdb(path: Path, *commands: str) -> list[str]:
    """What gdb answers to each command; the empty string if it knows no answer."""
    arguments = [argument for command in commands for argument in ("-ex", r'printf "\n@@"', "-ex", command)]
    return [
        answer.strip()
        for answer in run("gdb", "-nx", "-batch", *arguments, "-ex", "quit 0", path).split("@@")[1:]
    ]


def against_gdb(path: Path, copy: Path) -> int:
    """Compare every struct and union that C can name with gdb's; the number of answers compared."""
    copy.write_bytes(path.read_bytes())
    layouts = {name: layout for name, layout in struct_layouts(Image.open(path)).items() if "." not in name}
    spellings = [name if name.startswith("union ") else f"struct {name}" for name in layouts]
    known = gdb(copy, *[f"whatis {spelling}" for spelling in spellings])
    commands, expected = [], []
    for (name, layout), spelling, answer in zip(layouts.items(), spellings, known, strict=True):
        type_ = spelling if answer else name  # only a typedef has this name
        commands.append(f"output (long)sizeof({type_})")
        expected.append(layout.size)
        for member in layout.members.values():
            if not member.bit_size:
                commands.append(f"output (long)&(({type_} *)0)->{member.name}")
                expected.append(member.offset)
    assert [int(answer) for answer in gdb(copy, *commands)] == expected
    return len(expected)


def test_offsets_and_sizes_are_those_of_gdb(tmp_path: Path) -> None:
    assert against_gdb(compiled(tmp_path, SOURCE), tmp_path / "copy.o") > 40


def test_a_struct_defined_inside_another_takes_no_members_from_it(tmp_path: Path) -> None:
    """DWARF 5, 2.3: a null entry ends the children; only C++ nests them as the source does."""
    (tmp_path / "s.cc").write_text("struct outer { int a; struct inner { int b; } i; int c; } x;")
    run("g++", "-g", "-c", tmp_path / "s.cc", "-o", tmp_path / "s.o")
    layouts = struct_layouts(Image.open(tmp_path / "s.o"))
    assert list(layouts["outer"].members) == ["a", "i", "c"]
    assert list(layouts["inner"].members) == ["b"]


def test_bit_fields_are_where_gdb_sees_them(tmp_path: Path) -> None:
    path = compiled(tmp_path, SOURCE)
    (listing,) = gdb(path, "ptype /o struct everything")
    seen = re.findall(r"/\*\s+(\d+): (\d+)\s+\|.*?\*/.*? (\w+) : (\d+);", listing)
    members = struct_layouts(Image.open(path))["everything"].members
    assert len(seen) == 4
    for byte, bit, name, width in seen:
        assert 8 * members[name].offset + members[name].bit_offset == 8 * int(byte) + int(bit)
        assert members[name].bit_size == int(width)


@each_built
def test_the_built_objects_have_the_layouts_gdb_sees(path: Path, tmp_path: Path) -> None:
    if Image.open(path).section(".debug_info") is None:
        pytest.skip("built without DWARF")
    against_gdb(path, tmp_path / "copy.o")


def test_an_image_without_dwarf_is_refused() -> None:
    with pytest.raises(ElfError, match=r"m\.ko: no DWARF; build with -g"):
        struct_layouts(Image.parse(elf_file(Section(".text", b"\xc3")), "m.ko"))


def linked_together(folder: Path, first: str, second: str) -> Image:
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    objects = compiled(folder / "a", first), compiled(folder / "b", second)
    run("ld", "-r", *objects, "-o", folder / "both.o")
    return Image.open(folder / "both.o")


def test_equal_definitions_in_two_units_are_one(tmp_path: Path) -> None:
    both = linked_together(tmp_path, "struct s { int a; } x;", "struct s { int a; } y;")
    assert struct_layouts(both)["s"].members == {"a": Member("a", 0, INT)}


def test_different_definitions_of_one_name_are_refused(tmp_path: Path) -> None:
    both = linked_together(tmp_path, "struct s { int a; } x;", "struct s { long a; } y;")
    with pytest.raises(ElfError, match="two different definitions of 's'"):
        struct_layouts(both)
