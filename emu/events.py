"""What happened, in order: every store of a kernel service, every sync, every switch.

A test that asks "in which order did the kernel store these?" reads it here.  The trace keeps the last
`EVENTS_KEPT` events; `total` says how many there were.
"""

import enum
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["EVENTS_KEPT", "Event", "EventKind", "EventTrace"]

EVENTS_KEPT = 1 << 16


class EventKind(enum.Enum):
    """What an event is."""

    STORE = "store"  # a service stored to data
    POKE = "poke"  # the text poker stored to text
    SYNC = "sync"  # every vCPU has passed the predicate named in `note`
    TRAP = "trap"  # a vCPU executed an int3
    EMULATE = "emulate"  # a breakpoint handler dealt with it
    SWITCH = "switch"  # a vCPU went from one task to another
    SWITCH_POINT = "switch point"  # the task at `address` may change its version of what is patched
    CALL = "call"  # a watched function was entered (emu/observer.py)


@dataclass(frozen=True, slots=True)
class Event:
    """One event: a number that only grows, a guest virtual address, and a store's bytes before and after."""

    number: int
    kind: EventKind
    address: int = 0
    before: bytes = b""
    after: bytes = b""
    note: str = ""


class EventTrace:
    """The events of one machine."""

    def __init__(self) -> None:
        self.total = 0
        self._kept: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self.listeners: list[Callable[[Event], None]] = []

    def record(
        self, kind: EventKind, address: int = 0, before: bytes = b"", after: bytes = b"", note: str = ""
    ) -> None:
        """Append one event."""
        self.total += 1
        event = Event(self.total, kind, address, before, after, note)
        self._kept.append(event)
        for listener in self.listeners:
            listener(event)

    def since(self, number: int) -> list[Event]:
        """Events recorded after event `number`, oldest first, as far as they are kept."""
        return [event for event in self._kept if event.number > number]

    def __iter__(self) -> Iterator[Event]:
        return iter(self._kept)
