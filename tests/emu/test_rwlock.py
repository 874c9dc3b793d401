"""Reader-writer locks: many readers, or one writer."""

from collections.abc import Callable

import pytest
from interleavings import interleavings
from machines import boot

from elf.errors import KlpemuError
from emu.hub import RunToCompletion
from emu.machine import Machine
from emu.memory import read_u32
from emu.rwlock import read_locked, write_locked

LOCK = "tasklist_lock"


def count(machine: Machine) -> int:
    return read_u32(machine.space, machine.symbol(LOCK))


def test_the_word_counts_readers_and_marks_a_writer(machine: Machine) -> None:
    """include/asm-generic/qrwlock.h: _QR_BIAS is 1 << 9, _QW_LOCKED 0xff."""

    def body() -> list[int]:
        seen = []
        with read_locked(machine, LOCK), read_locked(machine, LOCK):
            seen.append(count(machine))
        with write_locked(machine, LOCK):
            seen.append(count(machine))
        return [*seen, count(machine)]

    assert machine.service("locks", body) == [2 << 9, 0xFF, 0]


@pytest.mark.parametrize("locked", [read_locked, write_locked])
def test_an_error_in_the_block_releases_the_lock(machine: Machine, locked: Callable[..., object]) -> None:
    def body() -> None:
        with locked(machine, LOCK):
            raise ValueError("a bug of ours")

    with pytest.raises(ValueError, match="bug"):
        machine.service("fails", body)
    assert count(machine) == 0


@pytest.mark.parametrize("locked", [read_locked, write_locked])
def test_an_abandoned_holder_releases_the_lock(locked: Callable[..., object]) -> None:
    machine = boot(cpus=2)

    def body() -> None:
        with locked(machine, LOCK):
            machine.hub.wait(lambda: False, "for ever")

    machine.hub.serve(machine.init_task, "holds", body)
    machine.hub.advance(machine.init_task)
    assert count(machine)
    machine.hub.abandon(machine.init_task)
    assert count(machine) == 0


def test_a_writer_that_never_gets_it_is_named(machine: Machine) -> None:
    def body() -> None:
        with read_locked(machine, LOCK), write_locked(machine, LOCK):
            pass

    with pytest.raises(KlpemuError, match=f"deadlock: init waits for {LOCK}"):
        machine.service("both", body)
    assert count(machine) == 0


def play(machine: Machine, roles: str, seen: list[str]) -> None:
    """One service for each letter, r or w; `seen` gets who else was inside with it."""
    inside: list[str] = []

    def body(role: str) -> None:
        locked = read_locked if role == "r" else write_locked
        with locked(machine, LOCK):
            inside.append(role)
            machine.hub.door("inside")
            seen.append("".join(sorted(inside)))
            machine.hub.door("still inside")
            inside.remove(role)

    tasks = machine.tasks[: len(roles)]
    services = [
        machine.hub.serve(task, role, lambda role=role: body(role))
        for task, role in zip(tasks, roles, strict=True)
    ]
    for task, service in zip(tasks, services, strict=True):
        machine.hub.finish(task, service)


@pytest.mark.parametrize(("roles", "bound"), [("rr", 3), ("rw", 3), ("ww", 3), ("rrw", 2), ("rww", 2)])
def test_no_writer_is_inside_with_anybody_under_any_interleaving(roles: str, bound: int) -> None:
    machine = boot(cpus=len(roles))
    together: set[str] = set()
    for schedule in interleavings(bound):
        machine.hub.schedule = schedule
        seen: list[str] = []
        play(machine, roles, seen)
        assert len(seen) == len(roles)
        assert count(machine) == 0
        together.update(seen)
    readers = roles.count("r")
    assert together == {"r" * number for number in range(1, readers + 1)} | ({"w"} if "w" in roles else set())


def test_without_interleaving_nobody_waits() -> None:
    machine = boot(cpus=2)
    machine.hub.schedule = RunToCompletion()
    seen: list[str] = []
    play(machine, "wr", seen)
    assert sorted(seen) == ["r", "w"]
