"""Which pages were written since a moment, and putting that moment back."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emu import written_pages
from emu.arena import Arena
from emu.memory import PAGE_SIZE

PAGES = 40


def arena_with_data() -> Arena:
    """Writable pages 1 to 9 and, at the end, 6 of an image, none of them empty; a base was made of them."""
    arena = Arena(PAGES * PAGE_SIZE)
    first, image = arena.writable_frames(9), arena.image_frames(6)
    arena.bytes[first : first + 9 * PAGE_SIZE] = b"data" * (9 * PAGE_SIZE // 4)
    arena.bytes[image : image + 6 * PAGE_SIZE] = b"text" * (6 * PAGE_SIZE // 4)
    assert arena.written.written(arena.in_use()) == []
    return arena


def test_the_pages_that_were_written_are_known_and_no_others() -> None:
    arena = arena_with_data()
    arena.bytes[2 * PAGE_SIZE] = 1
    arena.bytes[4 * PAGE_SIZE - 1 : 4 * PAGE_SIZE + 1] = b"xx"
    arena.bytes[-PAGE_SIZE] = 1
    assert arena.bytes[7 * PAGE_SIZE : 7 * PAGE_SIZE + 4] == b"data"  # to read is not to write
    assert arena.written.written(arena.in_use()) == [range(2, 5), range(PAGES - 1, PAGES)]


def test_a_page_that_is_put_back_counts_as_not_written() -> None:
    arena = arena_with_data()
    empty = arena.written.take(arena.in_use())
    arena.bytes[2 * PAGE_SIZE] = 1
    assert arena.written.take(arena.in_use()).size == PAGE_SIZE
    arena.written.put(empty, arena.written.written(arena.in_use()))
    assert arena.bytes[2 * PAGE_SIZE] == ord("d")
    assert arena.written.written(arena.in_use()) == []


writes = st.lists(
    st.tuples(st.integers(0, PAGES * PAGE_SIZE - 9), st.binary(min_size=1, max_size=9)), max_size=8
)


@given(st.lists(st.one_of(writes, st.integers(0, 3)), max_size=12), st.booleans())
def test_any_moment_can_be_put_back_from_any_other(steps: list[object], told: bool) -> None:
    """Compared with whole copies; also where the host does not tell what was written."""
    with pytest.MonkeyPatch.context() as patched:
        if not told:
            patched.setattr(written_pages, "_pagemap", lambda pid: -1)
        arena, everything = Arena(PAGES * PAGE_SIZE), [range(PAGES * PAGE_SIZE)]
        arena.bytes[: 3 * PAGE_SIZE] = b"base" * (3 * PAGE_SIZE // 4)
        moments = [(arena.written.take(everything), arena.bytes[:])]
        for step in steps:
            if isinstance(step, int):
                contents, copy = moments[step % len(moments)]
                arena.written.put(contents, arena.written.written(everything))
                assert arena.bytes[:] == copy
                continue
            assert isinstance(step, list)
            for at, data in step:
                arena.bytes[at : at + len(data)] = data
            moments.append((arena.written.take(everything), arena.bytes[:]))
            contents, copy = moments[-1]
            for page in range(PAGES):
                kept = contents.page(page) or arena.written.base(page)
                assert kept == copy[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]


def test_a_forked_process_sees_its_own_writes() -> None:
    arena = arena_with_data()
    arena.written.take(arena.in_use())
    pid = os.fork()
    if pid == 0:
        arena.bytes[3 * PAGE_SIZE] = 1
        os._exit(0 if arena.written.written(arena.in_use()) == [range(3, 4)] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert arena.written.written(arena.in_use()) == []
