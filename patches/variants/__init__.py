"""Behaviour of other kernels than the reference, each as one small replacement of the code that it changes.

A variant is a context manager that puts functions of its own in the place of named ones, and takes them away
again. The product has no flag and no `if` for any of them.  Which commit brought the behaviour, or ended it,
stands in the variant's docstring.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from elf.errors import KlpemuError

__all__ = ["replaced"]


@contextmanager
def replaced(owner: ModuleType | type, name: str, by: Callable[..., Any]) -> Iterator[None]:
    """Have `by` in the place of the function `owner.name` until the block ends; of a class, of that method.

    Whoever calls it as `owner.name`, and whoever calls it inside that module, gets the replacement; a name
    bound by `from module import name` stays what it was.  Raises KlpemuError if there is no such function.
    """
    original = vars(owner).get(name)
    if not callable(original):
        raise KlpemuError(f"no function '{name}' to replace", where=owner.__name__)
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, original)
