"""Whatever a file holds, nothing but a `KlpemuError` comes out, soon, and with little memory."""

import resource
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from struct import pack_into

import pytest
from elf_writer import GLOBAL_FUNC, LOCAL_SECTION, SHT_RELA, Section, module, rela
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from objects import BUILT, KERNEL_FLAGS, run

from elf.errors import KlpemuError
from elf.image import Image
from elf.layout import struct_layouts
from elf.mcount import fentry_sites, functions_at, patchable_sites
from elf.relocation import apply_relocations, relocations

EXTREMES = sorted(
    {0, 1, 2, 7, 8, 24, 64}
    | {(1 << bits) + delta for bits in (7, 8, 15, 16, 31, 32, 60, 63, 64) for delta in (-1, 0, 1)}
)
SMALL_SOURCE = """
    typedef struct { int c; } counter; struct list { struct list *next; };
    struct s { struct list l; union { int a; char b[3][2]; }; counter c; unsigned bits:3; } x;
    int f(struct s *s) { return s->a + x.a; } int (*pointer)(struct s *) = f;
"""


def everything(data: bytes) -> None:
    """All that this room can say of a file; each part on its own, so that one refusal hides no other."""
    try:
        image = Image.parse(data)
    except KlpemuError:
        return
    for part in (names_and_sites, tables, relocated, layouts):
        with suppress(KlpemuError):
            part(image)


def names_and_sites(image: Image) -> None:
    sites = fentry_sites(image) + patchable_sites(image)
    assert len(functions_at(image, sites)) == len(sites)
    for site in sites:
        assert site.code
        assert bytes(image.contents(image.sections[site.section])[site.offset :][:5]) == site.code


def tables(image: Image) -> None:
    assert isinstance(image.modinfo, dict)
    for section in image.sections:
        assert len(image.contents(section)) in (0, section.size)
        for rela_section in image.relocation_sections(section):
            assert sum(1 for _ in relocations(image, rela_section)) == rela_section.size // 24
    assert [symbol.index for symbol in image.symbols] == list(range(len(image.symbols)))


def relocated(image: Image) -> None:
    values = [0xFFFF_FFFF_8100_0000 + symbol.value for symbol in image.symbols]
    for section in image.sections:
        for rela_section in image.relocation_sections(section):
            target = bytearray(image.contents(section))
            apply_relocations(
                image, rela_section, target=target, target_address=0xFFFF_FFFF_8200_0000, symbol_values=values
            )


def layouts(image: Image) -> None:
    for layout in struct_layouts(image).values():
        assert all(0 <= member.offset <= layout.size for member in layout.members.values())


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """A written object, the smaller built ones, and one compiled here if nothing is built."""
    sites = Section("__mcount_loc", bytes(8))
    sites_rela = Section(".rela__mcount_loc", rela((0, 1, 1, 0)), SHT_RELA, 0, link=3, info=5, entry_size=24)
    named = (("", LOCAL_SECTION, 1, 0, 0), ("f", GLOBAL_FUNC, 1, 0, 8))
    found = [module(bytes.fromhex("0f1f440000") + bytes(8), rela((8, 2, 2, -4)), named, sites, sites_rela)]
    found += [data for path in BUILT if len(data := path.read_bytes()) < 12_000]
    if len(found) == 1:
        folder = tmp_path_factory.mktemp("small")
        (folder / "s.c").write_text(SMALL_SOURCE)
        run("gcc", *KERNEL_FLAGS, "-c", folder / "s.c", "-o", folder / "s.o")
        found.append((folder / "s.o").read_bytes())
    return found


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """No file of some kilobytes may make the reader take hundreds of megabytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def regions(data: bytes) -> list[tuple[int, int]]:
    """The parts of a file worth damaging, each as likely as the other: headers, tables, every section."""
    image = Image.parse(data)
    headers = len(data) - 64 * len(image.sections)
    inner = [(s.offset, s.size) for s in image.sections if s.size and not s.is_nobits]
    return [(0, 64), (headers, len(data) - headers), (headers, len(data) - headers), *inner]


@st.composite
def damages(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    data = bytearray(draw(st.sampled_from(originals)))
    places = regions(bytes(data))
    for _ in range(draw(st.integers(1, 4))):
        start, size = draw(st.sampled_from(places))
        offset = start + draw(st.integers(0, size - 1))
        if draw(st.booleans()):
            data[offset] = draw(st.integers(0, 255))
        else:
            width, form = draw(st.sampled_from([(2, "<H"), (4, "<I"), (8, "<Q")]))
            value = draw(st.sampled_from(EXTREMES)) % (1 << 8 * width)
            pack_into(form, data, min(offset - offset % width, len(data) - width), value)
    if draw(st.integers(0, 9)) == 0:
        del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


@settings(
    max_examples=2000,
    deadline=timedelta(seconds=3),
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_but_never_breaks_the_reader(
    originals: list[bytes], data: st.DataObject
) -> None:
    everything(data.draw(damages(originals)))


@pytest.mark.parametrize("which", range(4))
def test_a_file_cut_off_anywhere_never_breaks_the_reader(originals: list[bytes], which: int) -> None:
    original = originals[which % len(originals)]
    for length in range(0, len(original), 7):
        everything(original[:length])


@settings(max_examples=400, deadline=timedelta(seconds=3))
@given(st.binary(max_size=400))
def test_noise_behind_a_good_header_never_breaks_the_reader(noise: bytes) -> None:
    everything(module(noise[:64], noise[64:136].ljust(72, b"\0"), ())[:64] + noise)


def test_the_originals_are_whole(originals: list[bytes]) -> None:
    """If these were refused, the damage above would test nothing."""
    assert len(originals) > 1
    assert any(
        struct_layouts(Image.parse(data)) for data in originals if Image.parse(data).section(".debug_info")
    )
    assert sum(len(fentry_sites(Image.parse(data))) for data in originals) > 1
