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


def test_a_child_that_dies_is_an_error() -> None:
    forked = Forked()
    if forked.is_child:
        os._exit(3)
    with pytest.raises(KlpemuError, match="exit status 3"):
        forked.answer()
