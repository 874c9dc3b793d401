"""In the first design every klp_func had an ftrace_ops of its own.

A livepatch's ops has FTRACE_OPS_FL_IPMODIFY, and of these ftrace allows one on a site: two handlers that
both want to say where the call goes cannot both have their way.  So the second patch of a function could
only have come after the first had gone, with a moment in between in which the function ran unpatched.
3c33f5b99d68 gave all patches of a function one ops and a stack of funcs behind it; going from one to the
other is one store since then.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from patches import patch
from patches.klp import Klp
from patches.museum import Bug, Kind
from patches.variants import replaced

__all__ = ["BUG", "ops_per_func"]


@contextmanager
def ops_per_func() -> Iterator[None]:
    """Give each func that is patched a klp_ops of its own."""
    klp_patch_func = patch._klp_patch_func

    def _klp_patch_func(klp: Klp, func: Any) -> None:
        with replaced(patch, "klp_find_ops", lambda klp, old_func: None):
            klp_patch_func(klp, func)

    with replaced(patch, "_klp_patch_func", _klp_patch_func):
        yield


BUG = Bug(
    title="One ftrace_ops for each klp_func: two patches of a function exclude each other",
    kind=Kind.CAUGHT,
    commit='3c33f5b99d68 ("livepatch: support for repatching a function") (in v4.0)',
    invariant="the_step_succeeds",
    breaks="klp_patch_func() never finds a klp_ops that the function has already",
    bug=ops_per_func,
)
