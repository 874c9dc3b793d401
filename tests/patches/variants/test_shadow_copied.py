"""The first API of shadow variables: data are copied, and a wrong size is nobody's but the caller's."""

from collections.abc import Iterator

import pytest
from livepatches import Raw
from shadow_orders import explore
from shadow_table import HEADER, neighbours, variables

from elf.errors import KlpemuError
from klpemu import Func, Kernel, Patch
from patches import shadow
from patches.variants.shadow_copied import shadow_data_copied

OBJ, OTHER = neighbours(2)
GFP_KERNEL = 0xCC0
FREE = Func("sta_info_free", "new_sta_info_free")
POINTER, PS_LOCK = 8, 24  # bytes


@pytest.fixture
def kernel() -> Kernel:
    """Two vCPUs, the stations, and guest code that writes down which destructors were called."""
    kernel = Kernel.load(cpus=2)
    kernel.load_module("builtin:sta_info.o")
    kernel.load_module("builtin:shadow.o")
    return kernel


@pytest.fixture
def v4_15(kernel: Kernel) -> Iterator[Kernel]:
    with shadow_data_copied():
        yield kernel


def fix_sta_copied(alloc: str) -> Patch:
    funcs = [Func("sta_info_alloc", alloc), FREE]
    return Patch("fix_sta_copied", {"sta_info": funcs}, code="builtin:fix_sta_copied.o")


def enable(kernel: Kernel, patch: Patch) -> None:
    kernel.enable(patch)
    kernel.tasks.wait_for_transition()


def some_data(kernel: Kernel, text: bytes) -> int:
    address = kernel.machine.slab.kmalloc(len(text), "data of the caller")
    kernel.machine.space.write(address, text)
    return address


# The arguments are (obj, id, data, size, gfp_flags).


@pytest.mark.parametrize("function", ["klp_shadow_alloc", "klp_shadow_get_or_alloc"])
def test_the_data_are_a_copy(v4_15: Kernel, function: str) -> None:
    source = some_data(v4_15, b"sixteen bytes...")
    made = v4_15.call(function, OBJ, 1, source, 16, GFP_KERNEL)
    assert v4_15.machine.space.read(made, 16) == b"sixteen bytes..."
    v4_15.machine.space.write(source, b"changed later...")
    assert v4_15.machine.space.read(made, 16) == b"sixteen bytes..."
    assert v4_15.machine.slab.live[made - HEADER][0] == HEADER + 16
    assert v4_15.call("klp_shadow_get", OBJ, 1) == made


def test_without_data_it_is_zero(v4_15: Kernel) -> None:
    made = v4_15.call("klp_shadow_alloc", OBJ, 1, 0, 16, GFP_KERNEL)
    assert v4_15.machine.space.read(made, 16) == bytes(16)


def test_data_that_cannot_be_read_fault(v4_15: Kernel) -> None:
    with pytest.raises(KlpemuError, match="0xffffffffdeadb000"):
        v4_15.call("klp_shadow_alloc", OBJ, 1, 0xFFFF_FFFF_DEAD_B000, 16, GFP_KERNEL)
    assert variables(v4_15) == []


def test_a_second_allocation_warns_and_a_second_get_or_alloc_finds(v4_15: Kernel) -> None:
    source = some_data(v4_15, b"first second")
    made = v4_15.call("klp_shadow_alloc", OBJ, 1, source, 6, GFP_KERNEL)
    before = dict(v4_15.machine.slab.live)
    assert v4_15.call("klp_shadow_get_or_alloc", OBJ, 1, source + 6, 6, GFP_KERNEL) == made
    assert v4_15.log == []
    assert v4_15.call("klp_shadow_alloc", OBJ, 1, source + 6, 6, GFP_KERNEL) == 0
    assert v4_15.log[0] == f"Duplicate shadow variable <{OBJ:016x}, 1>"
    assert v4_15.machine.space.read(made, 6) == b"first "
    assert v4_15.machine.slab.live == before


def test_more_than_kmalloc_gives_is_null(v4_15: Kernel) -> None:
    assert v4_15.call("klp_shadow_alloc", OBJ, 1, 0, 1 << 22, GFP_KERNEL) == 0


def test_nobody_is_asked_to_destroy(v4_15: Kernel, raw: Raw) -> None:
    """What lies in the third register is not an argument of these functions."""
    for obj in (OBJ, OTHER):
        v4_15.call("klp_shadow_alloc", obj, 1, 0, 8, GFP_KERNEL)
    left_over = v4_15.address_of("shadow:counting_dtor")
    v4_15.call("klp_shadow_free", OBJ, 1, left_over)
    assert [each.obj for each in variables(v4_15)] == [OTHER]
    v4_15.call("klp_shadow_free_all", 1, left_over)
    assert variables(v4_15) == []
    assert raw.u64(v4_15.address_of("shadow:dtor_calls")) == 0
    assert [tag for _, tag in v4_15.machine.slab.live.values() if tag.startswith("klp_shadow")] == []


def test_whoever_comes_second_throws_the_copy_away(v4_15: Kernel) -> None:
    v4_15.machine.recorder.enabled = False
    before = set(v4_15.machine.slab.live)
    arguments = [(OBJ, 1, some_data(v4_15, text), 8, GFP_KERNEL) for text in (b"the one.", b"another.")]
    before |= {each[2] for each in arguments}

    def check(one: int, other: int) -> None:
        assert one == other != 0
        assert v4_15.machine.space.read(one, 8) in (b"the one.", b"another.")
        assert set(v4_15.machine.slab.live) == before | {one - HEADER}
        v4_15.call("klp_shadow_free", OBJ, 1)

    calls = [("klp_shadow_get_or_alloc", each) for each in arguments]
    assert explore(v4_15, *calls, check, switches=1) > 10


# What that means for the lock of a station.


def test_the_size_of_the_lock_is_enough(v4_15: Kernel) -> None:
    enable(v4_15, fix_sta_copied("new_sta_info_alloc"))
    v4_15.call("sta_add", 0)
    (lock,) = variables(v4_15)
    assert v4_15.machine.slab.live[lock.address][0] == HEADER + PS_LOCK
    v4_15.verify().raise_for_findings()
    v4_15.call("sta_remove", 0)
    assert variables(v4_15) == []


def test_the_size_of_the_pointer_is_caught_by_the_red_zone(v4_15: Kernel) -> None:
    """ "the size of the spinlock structure should be allocated instead of the pointer"""
    enable(v4_15, fix_sta_copied("undersized_sta_info_alloc"))
    v4_15.call("sta_add", 0)
    (lock,) = variables(v4_15)
    assert v4_15.machine.slab.live[lock.address][0] == HEADER + POINTER
    (finding,) = v4_15.verify().findings
    assert finding.invariant == "heap_is_intact"
    assert finding.address == lock.data + POINTER, (
        "owner_cpu, which spin_lock_init() sets, is the first behind"
    )
    assert "red zone behind the object: klp_shadow by " in finding.what
    assert "[fix_sta_copied], 56 bytes" in finding.what


def test_a_lock_that_is_copied_while_it_is_held_is_held_for_ever(v4_15: Kernel, raw: Raw) -> None:
    """Why v4.17 calls a constructor: what is copied is whatever the model is at that moment."""
    enable(v4_15, fix_sta_copied("new_sta_info_alloc"))
    model = v4_15.address_of("fix_sta_copied:model_lock")
    raw.put(model, 1, 4)
    lock = v4_15.call("fix_sta_copied:copied_lock_of", OBJ)
    raw.put(model, 0, 4)
    assert raw.u64(lock) & 0xFFFF_FFFF == 1


# And without the variant.


def test_the_variant_is_gone_when_its_block_ends(kernel: Kernel, raw: Raw) -> None:
    before = shadow._klp_shadow_get_or_alloc, shadow.klp_shadow_free_struct
    with shadow_data_copied():
        assert shadow._klp_shadow_get_or_alloc is not before[0]
    assert (shadow._klp_shadow_get_or_alloc, shadow.klp_shadow_free_struct) == before
    ctor, dtor = (kernel.address_of(f"shadow:counting_{name}") for name in ("ctor", "dtor"))
    made = kernel.call("klp_shadow_alloc", OBJ, 1, 8, GFP_KERNEL, ctor, 0)
    kernel.call("klp_shadow_free", OBJ, 1, dtor)
    assert raw.u64(kernel.address_of("shadow:ctor_calls")) == 1
    assert raw.u64(kernel.address_of("shadow:dtor_calls")) == 1
    assert made
