"""What printk() puts into the log."""

import pytest
from machines import boot

from emu.machine import Machine


@pytest.fixture(scope="module")
def machine() -> Machine:
    return boot()


def printed(machine: Machine, *calls: tuple[bytes, int]) -> list[str]:
    """The lines that calls of _printk() with one argument each add to the log."""
    fmt = machine.slab.kzalloc(256, "format")
    before = len(machine.log.lines)
    for text, argument in calls:
        machine.space.write(fmt, text + b"\0")
        machine.call(machine.symbol("_printk"), fmt, argument)
    return machine.log.since(before)


def test_levels_are_dropped_and_conversions_carried_out(machine: Machine) -> None:
    assert printed(machine, (b"\x016lamp %d\n", 7), (b"\x01\x33plain\n", 0)) == ["lamp 7", "plain"]


def test_a_line_goes_on_with_kern_cont_until_its_newline(machine: Machine) -> None:
    assert printed(machine, (b"\x016one", 0), (b"\x01c, two", 0), (b"\x01c, three\n", 0)) == [
        "one, two, three"
    ]
    assert printed(machine, (b"\x016done\n", 0), (b"\x01cnew\n", 0)) == ["done", "new"]


def test_another_message_ends_an_open_line(machine: Machine) -> None:
    assert printed(machine, (b"\x016open", 0), (b"\x016other\n", 0), (b"\x01clate\n", 0)) == [
        "open",
        "other",
        "late",
    ]


def test_the_kernels_own_lines_end_an_open_one(machine: Machine) -> None:
    before = len(machine.log.lines)
    machine.log.vprintk_store("\x016open")
    machine.log.pr_info("livepatch: in between")
    machine.log.vprintk_store("\x01clate\n")
    assert machine.log.since(before) == ["open", "livepatch: in between", "late"]


def test_a_message_of_several_lines_is_as_many(machine: Machine) -> None:
    assert printed(machine, (b"\x016one\ntwo %d\n", 2)) == ["one", "two 2"]


def test_listeners_are_told_every_line(machine: Machine) -> None:
    heard: list[str] = []
    machine.log.listeners.append(heard.append)
    printed(machine, (b"\x016a\nb", 0), (b"\x01c c\n", 0))
    machine.log.listeners.remove(heard.append)
    assert heard == ["a", "b", "b c"]
