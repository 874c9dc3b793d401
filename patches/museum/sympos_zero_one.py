"""A cumulative patch brought a nop for a function that it patched itself.

For a name that is unique, sympos 0 and sympos 1 mean the same function, and which of them a livepatch says
depends on the tool that made it. klp_find_func() compared the numbers: a replacing patch that said 0 where
the older one had said 1 did not find its own func, made a nop, and failed on the second directory of the
same name in sysfs.  Debian's 6.1 has the fix.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from patches import init_patch
from patches.klp import Klp
from patches.museum import Bug, Kind
from patches.variants import replaced

__all__ = ["BUG", "sympos_zero_one"]


@contextmanager
def sympos_zero_one() -> Iterator[None]:
    """Compare the name and the number."""

    def _func_key(klp: Klp, func: Any) -> tuple[str, int]:
        return klp.string(func.old_name), func.old_sympos

    with replaced(init_patch, "_func_key", _func_key):
        yield


BUG = Bug(
    title="old_sympos 0 and 1 are taken for two functions",
    kind=Kind.SHIPPED,
    commit='139560e8b973 ("livepatch: Match old_sympos 0 and 1 in klp_find_func()") (in v6.19)',
    invariant="the_step_succeeds",
    breaks="klp_find_func() compares old_sympos as it is",
    bug=sympos_zero_one,
)
