"""Two tasks use the same shadow variable at once: whoever of them comes first, at whatever moment."""

from collections import Counter
from collections.abc import Callable

import pytest
from livepatches import Raw
from shadow_orders import explore
from shadow_table import HEADER, neighbours, variables

from emu.hub import RunToCompletion
from emu.schedules import Seeded
from klpemu import Kernel

OBJ, OTHER = neighbours(2)
ID = 1
GET_OR_ALLOC = ("shadow:attach", (OBJ, ID))
ALLOC = ("shadow:attach_new", (OBJ, ID))
GET = ("klp_shadow_get", (OBJ, ID))
FREE = ("shadow:detach", (OBJ, ID))


class Pair:
    """What two tasks did, and what is left of it; `clear` makes room for the next two."""

    def __init__(self) -> None:
        self.kernel = Kernel.load(cpus=2)
        self.kernel.load_module("builtin:shadow.o")
        self.kernel.machine.recorder.enabled = False
        self.raw = Raw(self.kernel)
        self.live = self.kernel.machine.slab.live
        self.outcomes: Counter[str] = Counter()
        self.before = set(self.live)

    @property
    def made(self) -> list[int]:
        """Addresses of the variables that are attached."""
        return [each.data for each in variables(self.kernel)]

    def count(self, name: str) -> int:
        return self.raw.u64(self.kernel.address_of(f"shadow:{name}"))

    def warnings(self) -> int:
        return len(self.kernel.machine.warnings)

    def clear(self) -> None:
        """Free all, and see that what is left is what was there before."""
        leaked = set(self.live) - self.before - {each - HEADER for each in self.made}
        assert leaked == set()
        self.kernel.call("klp_shadow_free_all", ID, 0)
        assert set(self.live) == self.before
        assert self.raw.u64(self.raw.symbol("klp_shadow_lock")) == 0
        for name in ("ctor_calls", "dtor_calls"):
            self.raw.put(self.kernel.address_of(f"shadow:{name}"), 0)
        self.kernel.machine.warnings.clear()


@pytest.fixture
def pair() -> Pair:
    return Pair()


def both_get_the_same(pair: Pair) -> Callable[[int, int], None]:
    def check(one: int, other: int) -> None:
        assert one == other != 0
        assert pair.made == [one]
        assert pair.count("ctor_calls") == 1
        assert pair.raw.u64(one) == 1, "what the constructor wrote"
        assert pair.warnings() == 0
        pair.clear()

    return check


def test_of_two_get_or_alloc_both_get_the_one_variable(pair: Pair) -> None:
    """The constructor runs once, and the allocation of whoever comes second is thrown away."""
    tried = explore(pair.kernel, GET_OR_ALLOC, GET_OR_ALLOC, both_get_the_same(pair), switches=2)
    assert tried > 100


def test_of_two_get_or_alloc_both_get_it_in_every_order_there_is(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any number of switches, at each load and store of what is shared: the table and its lock.

    The new struct belongs to one task until it is linked, and whatever is done to it in between.
    """
    machine = pair.kernel.machine
    table, lock = machine.symbol("klp_shadow_hash"), machine.symbol("klp_shadow_lock")
    door, at_door = machine.hub.door, False

    def shared_door(kind: str, address: int = 0) -> None:
        nonlocal at_door
        at_door = table <= address < table + (8 << 12) or address == lock
        if at_door:
            door(kind, address)
            at_door = False

    monkeypatch.setattr(machine.hub, "door", shared_door)
    check = both_get_the_same(pair)
    tried = explore(pair.kernel, GET_OR_ALLOC, GET_OR_ALLOC, check, switches=99, matters=lambda: at_door)
    assert tried > 100


def test_of_two_get_or_alloc_both_get_the_one_variable_whatever_the_strides(pair: Pair) -> None:
    """Guest code is stopped between any two instructions, too."""
    machine = pair.kernel.machine
    entry, arguments = pair.kernel.address_of(GET_OR_ALLOC[0]), GET_OR_ALLOC[1]
    check = both_get_the_same(pair)
    for seed in range(20):
        machine.hub.schedule = Seeded(seed)
        calls = [machine.hub.call(task, entry, arguments) for task in machine.tasks[:2]]
        machine.run(lambda calls=calls: all(call.finished for call in calls))
        machine.hub.schedule = RunToCompletion()
        check(calls[0].result, calls[1].result)


def test_of_two_alloc_one_gets_it_and_the_other_a_warning(pair: Pair) -> None:
    def check(one: int, other: int) -> None:
        assert (one == 0) != (other == 0)
        assert pair.made == [one or other]
        assert pair.count("ctor_calls") == pair.warnings() == 1
        pair.outcomes["first" if one else "second"] += 1
        pair.clear()

    explore(pair.kernel, ALLOC, ALLOC, check, switches=2)
    assert pair.outcomes.keys() == {"first", "second"}


def test_alloc_warns_only_if_get_or_alloc_was_first(pair: Pair) -> None:
    def check(got: int, allocated: int) -> None:
        assert pair.made == [got]
        assert allocated in (got, 0)
        assert pair.warnings() == (allocated == 0)
        assert pair.count("ctor_calls") == 1
        pair.outcomes["warned" if pair.warnings() else "quiet"] += 1
        pair.clear()

    explore(pair.kernel, GET_OR_ALLOC, ALLOC, check, switches=2)
    assert pair.outcomes.keys() == {"warned", "quiet"}


def test_of_two_who_free_one_destroys(pair: Pair) -> None:
    pair.kernel.call("shadow:attach", OBJ, ID)

    def check(_one: int, _other: int) -> None:
        assert pair.made == []
        assert pair.count("dtor_calls") == 1
        pair.clear()
        pair.kernel.call("shadow:attach", OBJ, ID)

    explore(pair.kernel, FREE, FREE, check, switches=2)
    pair.clear()


def test_a_reader_finds_what_it_looks_for_behind_one_that_goes(pair: Pair) -> None:
    """Both are in one bucket, and the reader may stand on the one that is freed: it must find its way on.

    That is what the grace period is for; the reader takes no lock.
    """

    def attach_both() -> int:
        wanted = pair.kernel.call("shadow:attach", OTHER, ID)
        pair.kernel.call("shadow:attach", OBJ, ID)
        assert pair.made[1] == wanted
        return wanted

    wanted = attach_both()

    def check(_freed: int, found: int) -> None:
        nonlocal wanted
        assert found == wanted
        assert pair.made == [wanted]
        pair.clear()
        wanted = attach_both()

    tried = explore(pair.kernel, FREE, ("klp_shadow_get", (OTHER, ID)), check, switches=2)
    assert tried > 100
    pair.clear()


def test_a_reader_gets_a_variable_that_is_whole_or_none(pair: Pair) -> None:
    def check(made: int, found: int) -> None:
        assert found in (0, made)
        pair.outcomes["found" if found else "not yet"] += 1
        pair.clear()

    explore(pair.kernel, GET_OR_ALLOC, GET, check, switches=2)
    assert pair.outcomes.keys() == {"found", "not yet"}


def test_free_all_and_get_or_alloc_agree_on_what_is_left(pair: Pair) -> None:
    def check(_freed: int, made: int) -> None:
        assert pair.made in ([], [made])
        assert pair.count("dtor_calls") == (not pair.made)
        pair.outcomes["freed" if not pair.made else "left"] += 1
        pair.clear()

    destroy = pair.kernel.address_of("shadow:counting_dtor")
    explore(pair.kernel, ("klp_shadow_free_all", (ID, destroy)), GET_OR_ALLOC, check, switches=2)
    assert pair.outcomes.keys() == {"freed", "left"}
