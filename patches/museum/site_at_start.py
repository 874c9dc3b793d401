"""Livepatch took the address of a function for the address of its fentry site.

With CONFIG_X86_KERNEL_IBT a function that can be called through a pointer begins with ENDBR, and its site
lies four bytes further on; no record has the function's own address, so the patch is refused.  Since then
ftrace_location() looks for the site anywhere in the function whose start it is asked for, and everybody
asks it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from emu.ftrace import Ftrace
from patches.museum import Bug, Kind
from patches.variants import replaced

__all__ = ["BUG", "site_at_start"]


@contextmanager
def site_at_start() -> Iterator[None]:
    """Find a site only where it begins."""

    def ftrace_location(ftrace: Ftrace, ip: int) -> int:
        record = ftrace.records.lookup_rec(ip, ip)
        return record.ip if record is not None else 0

    with replaced(Ftrace, "ftrace_location", ftrace_location):
        yield


BUG = Bug(
    title="The site of a function is assumed to be at its start, ENDBR or not",
    kind=Kind.CAUGHT,
    commit='aebfd12521d9 ("x86/ibt,ftrace: Search for __fentry__ location") (in v5.18)',
    invariant="the_step_succeeds",
    breaks="ftrace_location() does not search the function that starts at the address",
    bug=site_at_start,
)
