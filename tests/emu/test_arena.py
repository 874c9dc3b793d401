"""Physical memory: frames, pools, checkpoints."""

import pytest

from elf.errors import KlpemuError
from emu.arena import Arena
from emu.machine import Machine
from emu.memory import PAGE_SIZE


def test_frames_come_zeroed_and_never_twice() -> None:
    arena = Arena(64 * PAGE_SIZE)
    frames = [arena.writable_frames(1) for _ in range(10)] + [arena.image_frames(1) for _ in range(10)]
    assert len(set(frames)) == 20
    assert 0 not in frames
    for pool, frame in ((arena.writable_frames, frames[0]), (arena.image_frames, frames[-1])):
        arena.bytes[frame : frame + PAGE_SIZE] = b"x" * PAGE_SIZE
        arena.release(frame)
        assert pool(1) == frame
        assert arena.bytes[frame : frame + PAGE_SIZE] == bytes(PAGE_SIZE)


def test_text_frames_are_above_all_that_a_checkpoint_copies() -> None:
    arena = Arena(64 * PAGE_SIZE)
    data, text = arena.writable_frames(3), arena.image_frames(2)
    assert data + 3 * PAGE_SIZE <= len(arena.checkpoint()) <= text


def test_restoring_a_checkpoint_puts_every_writable_byte_back() -> None:
    arena = Arena(64 * PAGE_SIZE)
    frame = arena.writable_frames(2)
    arena.bytes[frame : frame + 4] = b"then"
    checkpoint = arena.checkpoint()
    arena.bytes[frame : frame + 4] = b"now!"
    arena.bytes[frame + PAGE_SIZE] = 9
    arena.restore(checkpoint)
    assert arena.checkpoint() == checkpoint


def test_a_request_that_does_not_fit_is_refused_and_leaves_the_pools_as_they_were() -> None:
    arena = Arena(8 * PAGE_SIZE)
    arena.writable_frames(4)
    before = len(arena.checkpoint())
    for pool in (arena.writable_frames, arena.image_frames):
        with pytest.raises(KlpemuError, match="used up"):
            pool(4)
    assert len(arena.checkpoint()) == before
    arena.image_frames(3)
    with pytest.raises(KlpemuError, match="used up"):
        arena.writable_frames(1)


def test_a_restored_machine_computes_what_it_computed_before(machine: Machine) -> None:
    spin = machine.symbol("checked_div")
    checkpoint = machine.space.arena.checkpoint()
    machine.call(spin, 9, 0)
    assert machine.variable("div_errors").get() == 9
    machine.space.arena.restore(checkpoint)
    assert machine.variable("div_errors").get() == 0
    machine.call(spin, 4, 0)
    assert machine.variable("div_errors").get() == 4
