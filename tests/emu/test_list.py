"""Lists: the kernel's stores in the kernel's order, and lists that stay whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import boot

from emu.events import EventKind
from emu.list import (
    LIST_POISON1,
    LIST_POISON2,
    init_list_head,
    list_add,
    list_add_rcu,
    list_add_tail,
    list_del,
    list_del_rcu,
    list_empty,
    list_is_singular,
)
from emu.machine import Machine

NEXT, PREV = 0, 8


class Nodes:
    """Named list heads in guest memory; every node but the first two starts unlinked."""

    def __init__(self, machine: Machine, names: str) -> None:
        self.machine = machine
        self.addresses = {name: machine.slab.kzalloc(16, name) for name in names}
        self.views = {name: machine.view("list_head", at) for name, at in self.addresses.items()}
        init_list_head(self.views[names[0]])

    def stores_since(self, start: int) -> list[tuple[str, str, str]]:
        """Stores as (node, member, node or value stored)."""
        values = {at: name for name, at in self.addresses.items()}
        values |= {LIST_POISON1: "POISON1", LIST_POISON2: "POISON2"}
        found = []
        for event in self.machine.events.since(start):
            if event.kind is EventKind.STORE:
                at = event.address & ~15
                member = "next" if event.address & 15 == NEXT else "prev"
                found.append((values[at], member, values[int.from_bytes(event.after, "little")]))
        return found


@pytest.fixture
def nodes(machine: Machine) -> Nodes:
    """H -> a -> H, and n that is in no list."""
    found = Nodes(machine, "Han")
    list_add(found.views["a"], found.views["H"])
    return found


ADDED_FIRST = [("a", "prev", "n"), ("n", "next", "a"), ("n", "prev", "H"), ("H", "next", "n")]
ADDED_LAST = [("H", "prev", "n"), ("n", "next", "H"), ("n", "prev", "a"), ("a", "next", "n")]
ADDED_RCU = [("n", "next", "a"), ("n", "prev", "H"), ("H", "next", "n"), ("a", "prev", "n")]
UNLINKED = [("H", "prev", "H"), ("H", "next", "H")]


@pytest.mark.parametrize(
    ("operation", "names", "stores"),
    [
        # __list_add() of include/linux/list.h
        (list_add, "nH", ADDED_FIRST),
        (list_add_tail, "nH", ADDED_LAST),
        # __list_add_rcu() of include/linux/rculist.h: reachable only when its own pointers are set
        (list_add_rcu, "nH", ADDED_RCU),
        (list_del, "a", [*UNLINKED, ("a", "next", "POISON1"), ("a", "prev", "POISON2")]),
        (list_del_rcu, "a", [*UNLINKED, ("a", "prev", "POISON2")]),
        (init_list_head, "n", [("n", "next", "n"), ("n", "prev", "n")]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_stores_come_in_the_kernels_order(
    nodes: Nodes, operation: object, names: str, stores: list[tuple[str, str, str]]
) -> None:
    assert callable(operation)
    start = nodes.machine.events.total
    operation(*(nodes.views[name] for name in names))
    assert nodes.stores_since(start) == stores


def test_a_reader_going_forwards_never_falls_off_while_an_entry_is_added_the_rcu_way(nodes: Nodes) -> None:
    machine, head = nodes.machine, nodes.addresses["H"]
    start = machine.events.total
    before = machine.space.snapshot()
    list_add_rcu(nodes.views["n"], nodes.views["H"])
    memory = {at: int.from_bytes(before.read(at, 8), "little") for at in nodes.addresses.values()}
    for event in machine.events.since(start):
        memory[event.address] = int.from_bytes(event.after, "little")
        at, walked = memory[head], []
        while at != head:
            walked.append(at)
            at = memory[at]
        assert walked in ([nodes.addresses["a"]], [nodes.addresses["n"], nodes.addresses["a"]])


def test_poison_is_that_of_x86_64() -> None:
    # include/linux/poison.h, with CONFIG_ILLEGAL_POINTER_VALUE=0xdead000000000000
    assert (LIST_POISON1, LIST_POISON2) == (0xDEAD_0000_0000_0100, 0xDEAD_0000_0000_0122)


@settings(max_examples=60)
@given(steps=st.lists(st.tuples(st.sampled_from("fbrdx"), st.integers(0, 7)), max_size=40))
def test_a_list_is_whole_in_both_directions_whatever_is_added_and_removed(
    steps: list[tuple[str, int]],
) -> None:
    machine = boot()
    names = "Habcdefgh"
    nodes = Nodes(machine, names)
    head = nodes.views["H"]
    model: list[str] = []
    for operation, number in steps:
        name = names[1 + number]
        view = nodes.views[name]
        if operation in "fbr":
            if name in model:
                continue
            {"f": list_add, "b": list_add_tail, "r": list_add_rcu}[operation](view, head)
            model.insert(len(model) if operation == "b" else 0, name)
        elif name in model:
            {"d": list_del, "x": list_del_rcu}[operation](view)
            model.remove(name)
        expected = [nodes.addresses[each] for each in model]
        for member, order in (("next", expected), ("prev", expected[::-1])):
            at = getattr(head, member)
            walked: list[int] = []
            while at != head.address_ and len(walked) < 10:
                walked.append(at)
                at = getattr(machine.view("list_head", at), member)
            assert walked == order
        assert list_empty(head) == (not model)
        assert list_is_singular(head) == (len(model) == 1)
