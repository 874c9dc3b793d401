"""What each function of the shadow variable API does: called from guest code, looked at in guest memory."""

from dataclasses import dataclass

import pytest
from livepatches import Raw
from shadow_table import HEADER, Variable, bucket_of, neighbours, variables

from elf.errors import KlpemuError
from emu.events import EventKind
from klpemu import Kernel

GFP_KERNEL = 0xCC0
OBJ = 0xFFFF_8880_0BAD_CAF0
ENOMEM = 12


@dataclass
class Api:
    """The functions by name, as the modules that use them call them."""

    kernel: Kernel

    def get(self, obj: int, id_: int) -> int:
        return self.kernel.call("klp_shadow_get", obj, id_)

    def alloc(self, obj: int, id_: int, size: int = 8, ctor: str = "", ctor_data: int = 0) -> int:
        return self.kernel.call(
            "klp_shadow_alloc", obj, id_, size, GFP_KERNEL, self._function(ctor), ctor_data
        )

    def get_or_alloc(self, obj: int, id_: int, size: int = 8, ctor: str = "", ctor_data: int = 0) -> int:
        return self.kernel.call(
            "klp_shadow_get_or_alloc", obj, id_, size, GFP_KERNEL, self._function(ctor), ctor_data
        )

    def free(self, obj: int, id_: int, dtor: str = "") -> None:
        self.kernel.call("klp_shadow_free", obj, id_, self._function(dtor))

    def free_all(self, id_: int, dtor: str = "") -> None:
        self.kernel.call("klp_shadow_free_all", id_, self._function(dtor))

    def _function(self, name: str) -> int:
        return self.kernel.address_of(f"shadow:{name}") if name else 0


@dataclass(frozen=True)
class Record:
    """A call that the guest wrote down."""

    called: str
    obj: int
    id: int
    result: int


CALLED = ("", "get", "alloc", "get_or_alloc", "free", "free_all", "ctor", "dtor")


@pytest.fixture
def kernel() -> Kernel:
    """The built-in kernel with the guest code that uses shadow variables."""
    kernel = Kernel.load(cpus=2)
    kernel.load_module("builtin:shadow.o")
    return kernel


@pytest.fixture
def api(kernel: Kernel) -> Api:
    return Api(kernel)


def records(kernel: Kernel, raw: Raw) -> list[Record]:
    at, count = kernel.address_of("shadow:records"), raw.u64(kernel.address_of("shadow:nr_records"))
    rows = [[raw.u64(at + 32 * row + 8 * column) for column in range(4)] for row in range(count)]
    return [Record(CALLED[row[0]], *row[1:]) for row in rows]


def count_of(kernel: Kernel, raw: Raw, name: str) -> int:
    return raw.u64(kernel.address_of(f"shadow:{name}"))


# The kernel's own test.


def test_the_kernels_own_sequence_gives_what_its_test_expects(kernel: Kernel, raw: Raw) -> None:
    """lib/livepatch/test_klp_shadow_vars.c, call by call; the constructor runs before its caller returns."""
    assert kernel.call("shadow_passes") == 0
    parents = [kernel.address_of("shadow:parents") + 8 * i for i in range(3)]
    short_id, long_id = 0x1234, 0x1235
    found = records(kernel, raw)
    made = [each.result for each in found if each.called in ("alloc", "get_or_alloc")][:6]
    shorts, longs = made[0::2], made[1::2]
    assert len({*made}) == 6

    expected = [Record("get", parents[0], short_id, 0)]
    for i, maker in enumerate(("get_or_alloc", "alloc", "get_or_alloc")):
        expected += [
            Record("ctor", parents[i], 0, shorts[i]),
            Record(maker, parents[i], short_id, shorts[i]),
            Record("ctor", parents[i], 0, longs[i]),
            Record("alloc", parents[i], long_id, longs[i]),
        ]
    for i in range(3):
        expected += [
            Record("get", parents[i], short_id, shorts[i]),
            Record("get", parents[i], long_id, longs[i]),
        ]
    expected += [Record("get_or_alloc", parents[i], short_id, shorts[i]) for i in range(3)]
    for i in range(3):
        expected += [
            Record("dtor", parents[i], 0, shorts[i]),
            Record("free", parents[i], short_id, 0),
            Record("get", parents[i], short_id, 0),
        ]
    expected += [Record("get", parents[i], long_id, longs[i]) for i in range(3)]
    expected += [Record("free_all", 0, long_id, 0)]
    expected += [Record("get", parents[i], long_id, 0) for i in range(3)]
    assert found == expected
    assert variables(kernel) == []
    assert kernel.log == []
    kernel.verify().raise_for_findings()


# get


def test_what_was_never_allocated_is_null(api: Api) -> None:
    assert api.get(OBJ, 1) == 0


def test_object_and_id_must_both_match(api: Api) -> None:
    one, other = neighbours(2)
    made = api.alloc(one, 1)
    assert api.get(one, 1) == made
    assert api.get(one, 2) == 0
    assert api.get(other, 1) == 0, "the same bucket, another object"


# alloc


def test_a_new_variable_is_zero_and_lies_behind_its_header(kernel: Kernel, api: Api, raw: Raw) -> None:
    made = api.alloc(OBJ, 0x77, 24)
    assert variables(kernel) == [Variable(bucket_of(OBJ), made - HEADER, OBJ, 0x77)]
    assert raw.space.read(made, 24) == bytes(24)
    assert kernel.machine.slab.live[made - HEADER][0] == HEADER + 24


def test_a_variable_may_have_no_data_at_all(kernel: Kernel, api: Api) -> None:
    made = api.alloc(OBJ, 1, 0)
    assert made
    assert api.get(OBJ, 1) == made
    assert kernel.machine.slab.live[made - HEADER][0] == HEADER


def test_the_newest_is_the_first_in_its_bucket(kernel: Kernel, api: Api) -> None:
    objects = neighbours(3)
    for obj in objects:
        api.alloc(obj, 5)
    assert [each.obj for each in variables(kernel)] == objects[::-1]
    assert {each.bucket for each in variables(kernel)} == {bucket_of(objects[0])}


def test_the_constructor_gets_object_data_and_its_own_data(kernel: Kernel, api: Api, raw: Raw) -> None:
    value = kernel.machine.slab.kmalloc(8, "a value")
    raw.put(value, 0x1122_3344_5566_7788)
    made = api.alloc(OBJ, 1, 8, "pointer_ctor", value)
    assert raw.u64(made) == 0x1122_3344_5566_7788
    assert records(kernel, raw) == [Record("ctor", OBJ, 0, made)]


def test_a_second_allocation_warns_and_gives_null(kernel: Kernel, api: Api, raw: Raw) -> None:
    made = api.alloc(OBJ, 0x2A, 8, "counting_ctor")
    before = dict(kernel.machine.slab.live)
    assert api.alloc(OBJ, 0x2A, 8, "counting_ctor") == 0
    assert kernel.log == [
        f"Duplicate shadow variable <{OBJ:016x}, 2a>",
        "WARNING: CPU: 0 PID: 1 at __klp_shadow_get_or_alloc",
    ]
    assert len(kernel.machine.warnings) == 1
    assert count_of(kernel, raw, "ctor_calls") == 1
    assert (api.get(OBJ, 0x2A), raw.u64(made)) == (made, 1)
    assert kernel.machine.slab.live == before


def test_a_constructor_that_fails_leaves_nothing_behind(kernel: Kernel, api: Api) -> None:
    before = dict(kernel.machine.slab.live)
    assert api.alloc(OBJ, 3, 8, "failing_ctor") == 0
    assert api.get_or_alloc(OBJ, 3, 8, "failing_ctor") == 0
    line = f"livepatch: Failed to construct shadow variable <{OBJ:016x}, 3> (-{ENOMEM})"
    assert kernel.log == [line, line]
    assert kernel.machine.warnings == []
    assert variables(kernel) == []
    assert kernel.machine.slab.live == before


@pytest.mark.parametrize(
    ("rax", "error"), [(1 << 32, ""), (0x1_FFFF_FFF4, "-12"), (0xDEAD_0000_0000_0001, "1")]
)
def test_a_constructor_returns_an_int(kernel: Kernel, api: Api, raw: Raw, rax: int, error: str) -> None:
    """What the upper half of rax holds is undefined (psABI 3.2.3)."""
    obj = kernel.machine.slab.kmalloc(8, "an object")
    raw.put(obj, rax)
    ctor = kernel.address_of("load_from")
    made = kernel.call("klp_shadow_alloc", obj, 1, 8, GFP_KERNEL, ctor, 0)
    if error:
        assert made == 0
        assert kernel.log[0].endswith(f"({error})")
    else:
        assert made == api.get(obj, 1) != 0


def test_more_than_kmalloc_gives_is_null(kernel: Kernel, api: Api) -> None:
    before = dict(kernel.machine.slab.live)
    assert api.alloc(OBJ, 1, (1 << 22) - HEADER + 1) == 0
    assert kernel.machine.slab.live == before
    assert api.alloc(OBJ, 1, (1 << 22) - HEADER) != 0


def test_a_size_that_wraps_around_ends_in_the_red_zone(kernel: Kernel, api: Api) -> None:
    """size + sizeof(*new_shadow) is not checked for overflow: 47 bytes, and the id alone ends at 48."""
    assert api.alloc(OBJ, 1, (1 << 64) - 1) != 0
    assert "heap_is_intact" in {each.invariant for each in kernel.verify().findings}


# get_or_alloc


def test_get_or_alloc_allocates_once_and_then_finds(kernel: Kernel, api: Api, raw: Raw) -> None:
    made = api.get_or_alloc(OBJ, 1, 8, "counting_ctor")
    assert raw.u64(made) == 1
    assert api.get_or_alloc(OBJ, 1, 8, "counting_ctor") == made
    assert api.get(OBJ, 1) == made
    assert count_of(kernel, raw, "ctor_calls") == 1
    assert kernel.log == []


# free, free_all


def test_free_detaches_destroys_and_frees(kernel: Kernel, api: Api, raw: Raw) -> None:
    made = api.alloc(OBJ, 1)
    kept = api.alloc(OBJ, 2)
    api.free(OBJ, 1, "pointer_dtor")
    assert records(kernel, raw) == [Record("dtor", OBJ, 0, made)]
    assert (api.get(OBJ, 1), api.get(OBJ, 2)) == (0, kept)
    assert made - HEADER not in kernel.machine.slab.live
    assert [each.data for each in variables(kernel)] == [kept]


@pytest.mark.parametrize("victim", range(3), ids=["oldest", "middle", "newest"])
def test_any_one_of_a_bucket_can_be_freed(kernel: Kernel, api: Api, victim: int) -> None:
    objects = neighbours(3)
    for obj in objects:
        api.alloc(obj, 1)
    api.free(objects[victim], 1)
    del objects[victim]
    assert [each.obj for each in variables(kernel)] == objects[::-1]


def test_freeing_what_does_not_exist_does_nothing(kernel: Kernel, api: Api, raw: Raw) -> None:
    made = api.alloc(OBJ, 1)
    api.free(OBJ, 2, "counting_dtor")
    api.free(OBJ + 8, 1, "counting_dtor")
    assert count_of(kernel, raw, "dtor_calls") == 0
    assert [each.data for each in variables(kernel)] == [made]


def test_free_all_frees_one_id_of_every_object_in_the_tables_order(
    kernel: Kernel, api: Api, raw: Raw
) -> None:
    objects = [*neighbours(3), OBJ, OBJ + 0x40]
    for obj in objects:
        api.alloc(obj, 1)
        api.alloc(obj, 2)
    order = [each.obj for each in variables(kernel) if each.id == 1]
    kernel.call("klp_shadow_free_all", 1, kernel.address_of("shadow:pointer_dtor"))
    assert [each.obj for each in records(kernel, raw)] == order
    assert sorted(order) == sorted(objects)
    assert [(each.obj, each.id) for each in variables(kernel)] == [(obj, 2) for obj in order]


def test_a_freed_variable_waits_for_a_grace_period(kernel: Kernel, api: Api) -> None:
    """While the other vCPU is in kernel code that does not schedule, a reader could stand on it."""
    made = api.alloc(OBJ, 1)
    machine, live = kernel.machine, kernel.machine.slab.live
    task = kernel.tasks.spawn("reader", ["crunch(20000)"], cpu=1)
    kernel.tasks.run(1000, lambda: task.running)
    machine.call(kernel.address_of("klp_shadow_free"), OBJ, 1, 0)
    kernel.tasks.run(40)
    assert made - HEADER in live
    kernel.tasks.run(5000, lambda: task.dead)
    kernel.tasks.run(8)
    assert made - HEADER not in live
    assert api.get(OBJ, 1) == 0


# Under the lock.


def test_nobody_sees_a_variable_before_it_is_whole(kernel: Kernel, api: Api) -> None:
    number = kernel.machine.events.total
    made = api.alloc(OBJ, 9, 8, "counting_ctor") - HEADER
    stores = [event.address for event in kernel.machine.events.since(number) if event.kind is EventKind.STORE]
    head = kernel.machine.symbol("klp_shadow_hash") + 8 * bucket_of(OBJ)
    own = [at for at in stores if made <= at < made + HEADER]
    assert sorted(at - made for at in own) == [0, 8, 32, 40]
    assert stores.index(head) > max(stores.index(at) for at in own)


def test_a_constructor_that_allocates_another_waits_for_itself(kernel: Kernel, api: Api) -> None:
    """klp_shadow_lock is held around the constructor, and a spinlock does not ask by whom."""
    with pytest.raises(KlpemuError, match="init waits for klp_shadow_lock"):
        api.alloc(OBJ, 1, 8, "nested_ctor")
    assert api.alloc(OBJ, 1, 8) != 0, "whoever was torn out of it has given the lock back"


def test_the_vcpu_cannot_be_taken_away_under_the_lock(kernel: Kernel, api: Api) -> None:
    """spin_lock_irqsave() disables preemption, interrupts or not."""
    machine = kernel.machine
    base, offset = machine.cpus[0].gs_base, machine.vmlinux.symbols["__preempt_count"]
    seen = []
    answer = machine.traps.exports["klp_shadow_get"]

    def look(*arguments: object) -> int | None:
        seen.append(int.from_bytes(machine.space.read(base + offset, 4), "little"))
        return answer(*arguments)

    machine.traps.exports["klp_shadow_get"] = look  # a constructor may look at its object
    enabled = int.from_bytes(machine.space.read(base + offset, 4), "little")
    kernel.call("klp_shadow_alloc", OBJ, 1, 8, GFP_KERNEL, kernel.address_of("klp_shadow_get"), 0)
    assert seen == [enabled + 1]
    assert int.from_bytes(machine.space.read(base + offset, 4), "little") == enabled
