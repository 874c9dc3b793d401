"""Whether anything has changed that a check of a state looks at, as the machine's events tell."""

from emu.events import Event, EventKind
from emu.machine import Machine

__all__ = ["Changes"]


class Changes:
    """Follows one machine.

    Every store of a service and of the text poker is an event.  What guest code stores by itself is none:
    that is noticed by the check at the end of a run.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._changed = False
        self._seen = self._counted()
        machine.events.listen(self._event, EventKind.STORE, EventKind.POKE)

    def any_since(self) -> bool:
        """Something has changed since this was last asked."""
        before, self._seen = self._seen, self._counted()
        changed, self._changed = self._changed, False
        return changed or before != self._seen

    def _event(self, event: Event) -> None:
        self._changed = True

    def _counted(self) -> tuple[int, int, int]:
        """What is changed without an event: memory that comes and goes, modules, and tasks."""
        machine = self._machine
        return len(machine.slab.live), len(machine.modules.objects), machine.last_pid - len(machine.tasks)
