"""A module that was patched could not be loaded a second time.

For each module that comes, a livepatch's klp relocations are written into the livepatch's own text and
data.  When the module went they stayed, and the next time the relocator found a target that was not zero
and refused to write.  6.1 does that to this day; what is shown as the kernel without the bug is v6.3, by
the variant relocation_targets_cleared().
"""

from contextlib import nullcontext

from patches.museum import Bug, Kind
from patches.variants.clear_relocations import relocation_targets_cleared

__all__ = ["BUG"]

BUG = Bug(
    title="Klp relocation targets are not cleared when their module goes",
    kind=Kind.SHIPPED,
    commit='0c05e7bd2d01 ("livepatch,x86: Clear relocation targets on a module removal") (in v6.3)',
    invariant="the_step_succeeds",
    breaks="nothing: the reference has it; without the bug klp_free_object_loaded() clears the targets",
    bug=nullcontext,
    fixed=relocation_targets_cleared,
)
