"""System states: which livepatch can follow which, and what its callbacks learn of the others.

The rules are those of Documentation/livepatch/system-state.rst and kernel/livepatch/state.c.
"""

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from livepatches import BUILD, Raw, fix_area, fix_area2

from emu.errno import KernelErrno
from klpemu import Kernel
from patches.state import klp_is_patch_compatible

ONE, TWO, THREE = (BUILD / f"{name}.ko" for name in ("klp_state", "klp_state2", "klp_state3"))
NOT_COMPATIBLE = "livepatch: Livepatch patch ({}) is not compatible with the already installed livepatches."
WARNING = "WARNING at klp_get_prev_state: !klp_transition_patch"


def value(kernel: Kernel, name: str) -> int:
    """A variable of a loaded livepatch, `module:name`."""
    return int.from_bytes(kernel.machine.space.read(kernel.address_of(name), 8), "little")


def refused(kernel: Kernel, path: object, name: str) -> None:
    """The patch is refused for its states, with the kernel's line, and nothing of it is left."""
    lines, live = len(kernel.log), dict(kernel.machine.slab.live)
    with pytest.raises(KernelErrno, match="not compatible") as caught:
        kernel.insmod(str(path))
    assert caught.value.name == "EINVAL"
    assert kernel.log[lines:] == [NOT_COMPATIBLE.format(name)]
    assert name not in kernel.machine.modules.objects
    assert dict(kernel.machine.slab.live) == live
    kernel.verify().raise_for_findings()


def test_the_first_livepatch_finds_its_own_state_and_no_earlier_one(kernel: Kernel) -> None:
    kernel.insmod(ONE)
    assert value(kernel, "klp_state:own_version") == 1
    assert value(kernel, "klp_state:prev_version") == 0
    kernel.verify().raise_for_findings()


def test_a_cumulative_one_takes_over_what_the_earlier_one_saved(kernel: Kernel) -> None:
    """It is the state's `data` that goes from one to the next; the replaced one's post_unpatch stays out."""
    kernel.insmod(ONE)
    saved = set(kernel.machine.slab.live)
    kernel.insmod(TWO)
    assert value(kernel, "klp_state2:own_version") == 2
    assert value(kernel, "klp_state2:prev_version") == 1
    assert value(kernel, "klp_state2:taken_over") == 1001
    (mine,) = (at for at in saved if " by " in kernel.machine.slab.live.get(at, (0, ""))[1])
    kernel.disable("klp_state2")
    assert mine not in kernel.machine.slab.live, "its last owner frees it"
    assert kernel.call("area_of", 3, 4) == 7
    kernel.verify().raise_for_findings()


def test_a_takeover_that_is_reversed_leaves_the_data_to_the_earlier_one(kernel: Kernel) -> None:
    """klp_get_prev_state() also answers in post_unpatch of a transition that goes back."""
    data = takes_over_slowly(kernel)
    assert value(kernel, "klp_state2:taken_over") == 1001
    kernel.reverse("klp_state2")
    kernel.tasks.wait_for_transition()
    assert data in kernel.machine.slab.live
    assert [each.patch.name for each in kernel.enabled] == ["klp_state"]
    assert kernel.call("area_of", 3, 4) == 12
    kernel.verify().raise_for_findings()


def takes_over_slowly(kernel: Kernel) -> int:
    """klp_state2 is in transition, as a task is asleep in klp_state's nap(); returns the data."""
    kernel.insmod(str(ONE))
    kernel.tasks.spawn("sleeper", ["nap(2500)"], repeat=None)
    kernel.tasks.run(100)
    (data,) = (at for at, (_, tag) in kernel.machine.slab.live.items() if " by " in tag)
    kernel.insmod(str(TWO))
    assert kernel.in_transition == "klp_state2"
    return data


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [(TWO, ONE, "klp_state"), (ONE, THREE, "klp_state3"), (TWO, THREE, "klp_state3")],
    ids=["a lower version", "cumulative, a state is missing", "the same after a cumulative one"],
)
def test_what_cannot_deal_with_the_installed_states_is_refused(
    first: object, second: object, name: str, kernel: Kernel
) -> None:
    kernel.insmod(str(first))
    refused(kernel, second, name)
    assert kernel.call("area_of", 3, 4) == 12 * (2 if first == TWO else 1)


def test_what_is_gone_does_not_count(kernel: Kernel) -> None:
    kernel.insmod(TWO)
    kernel.disable("klp_state2")
    kernel.insmod(ONE)
    assert value(kernel, "klp_state:prev_version") == 0


def test_what_is_not_cumulative_need_not_know_the_states(kernel: Kernel) -> None:
    kernel.insmod(TWO)
    kernel.enable(fix_area())
    assert kernel.call("area_of", 3, 4) == 12
    refused_by_python = fix_area2(replace=True)
    with pytest.raises(KernelErrno, match="not compatible"):
        kernel.enable(refused_by_python)
    kernel.verify().raise_for_findings()


def test_outside_of_a_transition_there_is_no_earlier_state_and_one_warning(kernel: Kernel) -> None:
    kernel.insmod(ONE)
    assert kernel.call("klp_state:prev_version_now") == 0
    assert kernel.call("klp_state:prev_version_now") == 0
    assert kernel.machine.warnings == [WARNING], "WARN_ON_ONCE"


def test_in_a_transition_anybody_may_ask(kernel: Kernel) -> None:
    """It is the newest before the patch in transition that answers."""
    takes_over_slowly(kernel)
    assert kernel.call("klp_state:prev_version_now") == 1
    kernel.tasks.wait_for_transition()
    assert kernel.machine.warnings == []


# The rule itself, against a second telling of it.

States = Mapping[int, int]
STATES = st.dictionaries(st.integers(1, 3), st.integers(0, 3), max_size=3)


def put_states(kernel: Kernel, guest: object, states: States) -> None:
    """Give a klp_patch an array of states, which ends with id 0."""
    machine = kernel.machine
    size = machine.layouts.sizeof("klp_state")
    array = machine.slab.kzalloc(size * (len(states) + 1), "klp_state[]")
    for number, (id_, version) in enumerate(states.items()):
        state = machine.view("klp_state", array + size * number)
        state.id, state.version = id_, version
    guest.states = array  # type: ignore[attr-defined] # a view


@given(installed=st.lists(STATES, max_size=3), new=STATES, replace=st.booleans())
def test_a_patch_is_compatible_if_it_covers_what_is_installed(
    installed: Sequence[States], new: States, replace: bool
) -> None:
    """No version goes back; and a cumulative patch forgets none."""
    kernel = COMPARED
    list_head = Raw(kernel).symbol("klp_patches")
    machine, offset = kernel.machine, kernel.machine.layouts.offsetof("klp_patch", "list")
    guests = []
    for states in (*installed, new):
        at = machine.slab.kzalloc(machine.layouts.sizeof("klp_patch"), "klp_patch")
        guests.append(machine.layouts.view("klp_patch", machine.space, at))
        put_states(kernel, guests[-1], states)
    ring = [list_head, *(guest.address_ + offset for guest in guests[:-1])]
    for here, after in zip(ring, [*ring[1:], ring[0]], strict=True):
        node = machine.layouts.view("list_head", machine.space, here)
        node.next = after
        machine.layouts.view("list_head", machine.space, after).prev = here
    guests[-1].replace = replace
    try:
        answer = machine.service("ask", lambda: klp_is_patch_compatible(kernel.klp, guests[-1]))
    finally:
        head = machine.layouts.view("list_head", machine.space, list_head)
        head.next = head.prev = list_head
    modified = [(id_, version) for states in installed for id_, version in states.items()]
    covers = all(new[id_] >= version if id_ in new else not replace for id_, version in modified)
    assert answer is covers


COMPARED = Kernel.load()
