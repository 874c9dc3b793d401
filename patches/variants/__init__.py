"""Behaviour of other kernels than the reference, each as one small replacement of the code that it changes.

A variant is a context manager that puts functions of its own in the place of named ones, and takes them away
again. The product has no flag and no `if` for any of them.  Which commit brought the behaviour, or ended it,
stands in the variant's docstring.
"""

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import ModuleType
from typing import Any, Final

from elf.errors import KlpemuError

__all__ = ["VARIANTS", "replaced", "variant", "variants"]

# By name, the module that has it: they are loaded when they are asked for.
VARIANTS: Final = {
    "funcs_immediate": "immediate",
    "nops_kept": "keep_nops",
    "patches_immediate": "immediate",
    "patches_registered": "registration",
    "relocation_targets_cleared": "clear_relocations",
    "replace_attribute": "sysfs_attributes",
    "shadow_data_copied": "shadow_copied",
    "stack_order_attribute": "sysfs_attributes",
    "switching_in_cond_resched": "sched_try_switch",
    "switching_in_schedule": "sched_try_switch",
    "target_state_stale": "stale_target",
}
MUSEUM: Final = "museum:"  # in front of the name of a bug (patches/museum/)
_NAMED: Final = re.compile(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*")


def variant(text: str) -> AbstractContextManager[None]:
    """The variant of that name, with its arguments: "nops_kept", "patches_immediate(fix_area, fix_area2)".

    "museum:NAME" is a bug of the museum.

    Raises KlpemuError that names the known ones.
    """
    if text.strip().startswith(MUSEUM):
        # Asked for here, not above: an exhibit imports what is in this file.
        return importlib.import_module("patches.museum").broken_by(text.strip().removeprefix(MUSEUM))  # type: ignore[no-any-return]
    found = _NAMED.fullmatch(text)
    if found is None or found[1] not in VARIANTS:
        close = difflib.get_close_matches(found[1] if found else text, VARIANTS, 1)
        advice = f"did you mean {close[0]}?" if close else f"there are {', '.join(VARIANTS)}"
        raise KlpemuError(f"no variant is called '{found[1] if found else text}'", advice=advice)
    name, arguments = found[1], [each.strip() for each in (found[2] or "").split(",") if each.strip()]
    factory = getattr(importlib.import_module(f"{__name__}.{VARIANTS[name]}"), name)
    if bool(arguments) != bool(inspect.signature(factory).parameters):
        wanted = f"{name}(NAME, ...)" if not arguments else name
        raise KlpemuError(f"variant '{text.strip()}'", advice=f"write {wanted}")
    made: AbstractContextManager[None] = factory(*arguments)
    return made


@contextmanager
def variants(texts: Iterable[str]) -> Iterator[None]:
    """Several variants at once, as `variant` reads each."""
    with ExitStack() as stack:
        for each in [variant(text) for text in texts]:
            stack.enter_context(each)
        yield


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
