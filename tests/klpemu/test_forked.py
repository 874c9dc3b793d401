"""Going on in two ways."""

import os

import pytest

from elf.errors import KlpemuError
from klpemu.forked import Forked


def test_the_child_answers_and_is_gone() -> None:
    forked = Forked()
    if forked.is_child:
        forked.reply({"found": "x" * 200_000})  # more than a pipe holds
    assert forked.answer() == {"found": "x" * 200_000}
    with pytest.raises(ChildProcessError):
        os.waitpid(forked.pid, 0)


def read(forked: Forked) -> bytes:
    data = b""
    while piece := os.read(forked.pipe, 1 << 16):
        data += piece
    return data


def test_a_child_that_dies_is_an_error() -> None:
    forked = Forked()
    if forked.is_child:
        os._exit(3)
    with pytest.raises(KlpemuError, match="exit status 3"):
        forked.ended(read(forked))


def test_who_waits_for_a_child_that_dies_dies_too() -> None:
    """What was to be found out there is not known, and must not look like a finding."""
    first = Forked()
    if first.is_child:
        second = Forked()
        if second.is_child:
            os._exit(3)
        first.reply(second.answer())
    with pytest.raises(KlpemuError, match="has died"):
        first.ended(read(first))
