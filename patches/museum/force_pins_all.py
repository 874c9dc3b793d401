"""After one forced transition no livepatch could ever be unloaded again.

Forcing gives up to know whether a task is still in the code that is being removed, so that code must stay.
But every patch on the list was marked, also those that the transition had nothing to do with, and those
that were being added.  Since then a force pins only what the transition removes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from patches import transition
from patches.klp import Klp
from patches.museum import Bug, Kind
from patches.variants import replaced

__all__ = ["BUG", "force_pins_all"]


@contextmanager
def force_pins_all() -> Iterator[None]:
    """Mark every patch there is as forced."""
    force = transition.klp_force_transition

    def klp_force_transition(klp: Klp) -> None:
        force(klp)
        for patch_ in klp.patches():
            patch_.forced = True

    with replaced(transition, "klp_force_transition", klp_force_transition):
        yield


BUG = Bug(
    title="A forced transition pins every patch",
    kind=Kind.SHIPPED,
    commit='2957308343fa ("livepatch: Don\'t block removal of patches that are safe to unload") (in v5.18)',
    invariant="a_force_pins_what_it_removes",
    breaks="klp_force_transition() sets patch->forced of all patches",
    bug=force_pins_all,
)
